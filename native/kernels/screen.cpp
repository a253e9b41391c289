#include "kernels/screen.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/stored.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr Segments segments{group_columns, 1, group_columns};
constexpr float span = 127;
constexpr double unit = 0x1p-24; // a float's rounding, relative

int64_t padded(int64_t columns) { return (columns + group_columns - 1) / group_columns * group_columns; }

// What n roundings in a row may add, relative (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
double rounding(int64_t n) {
  const double all = static_cast<double>(n) * unit;
  return all < 0.5 ? all / (1 - all) : INFINITY;
}

// Never less than the number.
float above(double x) { return static_cast<float>(x * (1 + 0x1p-20)); }

constexpr int64_t panels_together = 64; // whose bounds are a task

} // namespace

Screen::Screen(const Matrix &floats) : Matrix(floats.rows, padded(floats.columns)), error_(rows), length_(rows) {
  const int64_t own = floats.columns, groups = columns / group_columns;
  Buffer<int8_t> codes(rows * columns);
  Buffer<float> steps(rows * groups);
  parallel_for((rows + lanes - 1) / lanes, [&](int64_t panel) {
    struct Values;
    struct Sums;
    float *values = scratch<float, Values>(lanes * own);
    int32_t *sums = scratch<int32_t, Sums>(groups);
    int64_t wanted[lanes];
    const int64_t first = panel * lanes, count = std::min<int64_t>(lanes, rows - first);
    for (int64_t i = 0; i < count; ++i)
      wanted[i] = first + i;
    floats.decode(wanted, count, values);
    for (int64_t row = first; row < first + count; ++row, values += own) {
      int8_t *code = codes.data() + row * columns;
      float *step = steps.data() + row * groups;
      kernels().encode_segments(values, own, {own, groups, group_columns}, span, -span, code, step, sums);
      double error = 0, length = 0;
      for (int64_t k = 0; k < own; ++k) {
        const double copy = static_cast<double>(code[k]) * step[k / group_columns], rest = values[k] - copy;
        error += rest * rest;
        length += copy * copy;
      }
      error_[row] = above(std::sqrt(error));
      length_[row] = above(std::sqrt(length));
    }
  });
  codes_ = group_matrix({codes.data(), rows, columns, groups, 8, steps.data(), nullptr}, false, false);
  find_longest();
}

// Numbers and arrays of its copy, and two arrays more: error, length.
Screen::Screen(const StoredReader &in) : Matrix(in.header().rows, in.header().columns), codes_(restored_groups(in)) {
  in.check(columns % group_columns == 0 && in.header().numbers[0] == columns / group_columns &&
               codes_->layout() == "int8-int8-groups",
           "a screen in another layout");
  error_ = in.array<float>(2, rows);
  length_ = in.array<float>(3, rows);
  find_longest();
}

bool Screen::fits(const Matrix &floats) const {
  return can_be_of(floats) && floats.rows == rows && padded(floats.columns) == columns;
}

Stored Screen::stored() const {
  Stored s = codes_->stored();
  s.header.stock = Stock::screen;
  s.add(2, error_);
  s.add(3, length_);
  return s;
}

void Screen::find_longest() {
  for (int64_t row = 0; row < rows; ++row)
    if (const float both = error_[row] + length_[row]; both > longest_ || std::isnan(both))
      longest_ = std::isnan(both) ? INFINITY : both;
}

int64_t Screen::greatest(const Matrix &floats, const Rows &x, float scale, float *work, int64_t *found) const {
  struct Both;
  const int64_t m = x.m(), own = x.columns();
  float *both = scratch<float, Both>(2 * m * columns);
  for (int64_t row = 0; row < m; ++row) {
    float *to = std::copy_n(x.x() + row * own, own, both + row * columns);
    std::fill(to, both + (row + 1) * columns, 0.0f);
  }
  const Rows once(both, m, columns), twice(both, 2 * m, columns);
  const CodedRows coded = once.codes(segments, span);
  for (int64_t row = 0; row < m; ++row)
    for (int64_t k = 0; k < columns; ++k)
      both[(m + row) * columns + k] =
          both[row * columns + k] - static_cast<float>(coded.codes[row * coded.stride + k]) *
                                        coded.step[row * coded.segments + k / group_columns];
  Bound bounds[screen_rows];
  if (!bound(both, twice.codes(segments, span), m, own, bounds))
    return 0;
  codes_->multiply(twice, nullptr, work, rows);
  const std::vector<int64_t> panels = reaching(work, bounds, m);
  float *exact = work + 2 * m * rows;
  floats.multiply_panels(x, panels, exact, rows);
  for (int64_t row = 0; row < m; ++row, exact += rows) {
    float best = -INFINITY;
    for (const int64_t panel : panels)
      for (int64_t i = panel * lanes; i < std::min(rows, (panel + 1) * lanes); ++i)
        if (const float product = exact[i] * scale; product > best)
          best = product, found[row] = i;
  }
  return static_cast<int64_t>(panels.size());
}

// Every sum of `own` products in floats, and of the groups of both rows of bytes, is off by its roundings times
// Σ |w| |x| ≤ |w| |x| at most; a few more are for what is done with products and bounds here. What underflows
// anywhere is less than `least`. False where something could overflow, or x is not finite.
bool Screen::bound(const float *x, const CodedRows &coded, int64_t m, int64_t own, Bound *bounds) const {
  for (int64_t row = 0; row < m; ++row) {
    double squares = 0, rest = 0;
    const auto copy = [&](int64_t i, int64_t k) {
      return static_cast<double>(coded.codes[i * coded.stride + k]) *
             coded.step[i * coded.segments + k / group_columns];
    };
    for (int64_t k = 0; k < columns; ++k) {
      const double value = x[row * columns + k], left = value - copy(row, k) - copy(m + row, k);
      squares += value * value;
      rest += left * left;
    }
    const double size = std::sqrt(squares), floats = rounding(own + 32);
    if (!(size * longest_ < 0x1p60) || !(floats < 1))
      return false;
    const double off = size * (floats + 2 * rounding(columns / group_columns + 32));
    bounds[row] = {above(size + off), above(std::sqrt(rest) + off),
                   above(0x1p-100 * static_cast<double>(own) * (1 + size))};
  }
  return true;
}

// Panels in which an upper bound reaches the best lower one of its row of x, in ascending order.
std::vector<int64_t> Screen::reaching(const float *products, const Bound *bounds, int64_t m) const {
  const int64_t panels = (rows + lanes - 1) / lanes, parts = (panels + panels_together - 1) / panels_together;
  std::vector<float> best(static_cast<size_t>(parts * m * lanes), -INFINITY); // [part][row of x][lane]
  const auto each = [&](int64_t part, auto &&use) {
    for (int64_t panel = part * panels_together; panel < std::min(panels, (part + 1) * panels_together); ++panel)
      for (int64_t r = 0; r < m; ++r) {
        const float *first = products + r * rows, *second = first + m * rows;
        const Bound b = bounds[r];
        float product[lanes], off[lanes];
        const int64_t at = panel * lanes, count = std::min<int64_t>(lanes, rows - at);
        for (int64_t i = 0; i < count; ++i) {
          product[i] = first[at + i] + second[at + i];
          off[i] = error_[at + i] * b.of_error + length_[at + i] * b.of_length + b.least;
        }
        use(panel, r, product, off, count);
      }
  };
  parallel_for(parts, [&](int64_t part) {
    each(part, [&](int64_t, int64_t r, const float *product, const float *off, int64_t count) {
      float *own = best.data() + (part * m + r) * lanes;
      for (int64_t i = 0; i < count; ++i)
        own[i] = std::max(own[i], product[i] - off[i]);
    });
  });
  float least[screen_rows];
  std::fill_n(least, m, -INFINITY);
  for (size_t i = 0; i < best.size(); ++i) {
    float &own = least[static_cast<int64_t>(i) / lanes % m];
    own = std::max(own, best[i]);
  }
  std::vector<uint8_t> reaches(static_cast<size_t>(panels));
  parallel_for(parts, [&](int64_t part) {
    each(part, [&](int64_t panel, int64_t r, const float *product, const float *off, int64_t count) {
      for (int64_t i = 0; i < count; ++i)
        reaches[panel] |= product[i] + off[i] >= least[r];
    });
  });
  std::vector<int64_t> found;
  for (int64_t panel = 0; panel < panels; ++panel)
    if (reaches[panel])
      found.push_back(panel);
  return found;
}

std::unique_ptr<Matrix> restored_screen(const StoredReader &reader) { return std::make_unique<Screen>(reader); }

} // namespace penjing
