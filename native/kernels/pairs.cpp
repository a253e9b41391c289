#include "kernels/pairs.h"

#include <algorithm>
#include <stdexcept>

#include "runtime/buffer.h"
#include "runtime/cpu.h"
#include "runtime/pool.h"

namespace penjing {

#if defined(__x86_64__)

using pairs::tile, pairs::width;

namespace {

constexpr int64_t stretch = 1024; // pairs of rows: two panels of them, 384 KB, stay in the second cache

// A stretch of rows, packed in panels.
class Packed {
public:
  explicit Packed(const PairRows &x)
      : x_(x), panels_((x.columns + width - 1) / width), data_(panels_ * std::min(stretch, (x.rows + 1) / 2) * width) {}

  int64_t panels() const { return panels_; }
  int64_t columns(int64_t panel) const { return std::min(width, x_.columns - panel * width); }
  const uint32_t *at(int64_t column) const { return data_.data() + column / width * size_ + column % width; }

  void pack(int64_t first, int64_t count) {
    size_ = count * width;
    parallel_for(panels_, [&](int64_t panel) { pairs::pack(x_, panel, first, count, data_.data() + panel * size_); });
  }

private:
  const PairRows &x_;
  int64_t panels_, size_ = 0;
  Buffer<uint32_t> data_;
};

// Calls part(first, count) for each stretch of pairs.
template <class Part>
void stretches(int64_t rows, Part &&part) {
  const int64_t all = (rows + 1) / 2;
  for (int64_t first = 0; first < all; first += stretch)
    part(first, std::min(stretch, all - first));
}

} // namespace

bool has_pairs() {
  __builtin_cpu_init();
  return active_isa() == Isa::avx512_vnni && __builtin_cpu_supports("avx512bf16");
}

void add_gram(const PairRows &x, float *total) {
  Packed packed(x);
  stretches(x.rows, [&](int64_t first, int64_t count) {
    packed.pack(first, count);
    const auto above = [&](int64_t panel) { // the products of a panel's columns with all up to themselves
      const int64_t right = panel * width;
      for (int64_t top = 0; top < std::min(right + width, x.columns); top += tile)
        pairs::add_tile(packed.at(top), packed.at(right), count, std::min(tile, x.columns - top), packed.columns(panel),
                        x.columns, total + top * x.columns + right);
    };
    const int64_t panels = packed.panels();
    parallel_for((panels + 1) / 2, [&](int64_t i) { // a long and a short one, so that all tasks are as long
      above(panels - 1 - i);
      if (i != panels - 1 - i)
        above(i);
    });
  });
}

PairMatrix::PairMatrix(const PairRows &x)
    : rows_(x.rows), columns_(x.columns), panels_((x.columns + width - 1) / width), pairs_((x.rows + 1) / 2),
      data_(panels_ * pairs_ * width) {
  put(x, 0, rows_);
}

void PairMatrix::put(const PairRows &x, int64_t low, int64_t high) {
  const int64_t first = low / 2, count = (high + 1) / 2 - first;
  parallel_for(panels_, [&](int64_t panel) {
    pairs::pack(x, panel, first, count, data_.data() + (panel * pairs_ + first) * width);
  });
}

void PairMatrix::add_product(const PairRows &a, float *total) const {
  Packed left(a);
  stretches(a.rows, [&](int64_t first, int64_t count) {
    left.pack(first, count);
    parallel_for(panels_, [&](int64_t panel) {
      const uint32_t *right = data_.data() + (panel * pairs_ + first) * width;
      for (int64_t top = 0; top < a.columns; top += tile)
        pairs::add_tile(left.at(top), right, count, std::min(tile, a.columns - top),
                        std::min(width, columns_ - panel * width), columns_, total + top * columns_ + panel * width);
    });
  });
}

#else

bool has_pairs() { return false; }

void add_gram(const PairRows &, float *) { throw std::logic_error("no products of pairs on this processor"); }
PairMatrix::PairMatrix(const PairRows &) { add_gram({}, nullptr); }
void PairMatrix::put(const PairRows &, int64_t, int64_t) {}
void PairMatrix::add_product(const PairRows &, float *) const {}

#endif

} // namespace penjing
