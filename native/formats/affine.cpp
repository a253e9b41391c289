#include "formats/affine.h"

#include <algorithm>
#include <cmath>

#include "formats/floats.h"
#include "formats/packed.h"
#include "runtime/buffer.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int64_t some_weights = 1 << 16; // a task's worth

struct Fitter {
  float qmin, qmax, span;
  bool symmetric;
  Float scale_type;

  explicit Fitter(const Grid &grid)
      : qmin(static_cast<float>(-(1 << (grid.bits - 1)))), qmax(static_cast<float>((1 << (grid.bits - 1)) - 1)),
        span(grid.symmetric ? (qmax - qmin) / 2 : qmax - qmin), symmetric(grid.symmetric), scale_type(grid.scale_type) {
  }

  float stored(float scale) const {
    switch (scale_type) {
    case Float::bf16: return from_bf16(to_bf16(scale));
    case Float::f16: return from_f16(to_f16(scale));
    default: return scale;
    }
  }

  float scale(float low, float high) const {
    const float step = stored((symmetric ? std::max(-low, high) : high - low) / span);
    return step == 0 ? 1 : step;
  }

  float zero_point(float low, float scale) const { return std::clamp(std::nearbyint(qmin - low / scale), qmin, qmax); }
};

// A row as float, in the thread's scratch memory.
const float *row_of(const WeightView &w, int64_t row) {
  struct Row;
  const int64_t width = w.type == Float::f32 ? 4 : 2;
  const void *values = static_cast<const char *>(w.values) + row * w.columns * width;
  if (w.type == Float::f32 && !w.kept)
    return static_cast<const float *>(values);
  float *out = scratch<float, Row>(w.columns);
  kernels().to_float(values, w.type, w.columns, out);
  if (w.kept)
    for (int64_t i = 0; i < w.columns; ++i)
      out[i] = w.kept[row * w.columns + i] ? out[i] : 0.0f;
  return out;
}

template <class Row>
void each_row(const WeightView &w, Row &&row) {
  const int64_t block = std::max<int64_t>(1, some_weights / std::max<int64_t>(w.columns, 1));
  parallel_for((w.rows + block - 1) / block, [&](int64_t task) {
    for (int64_t r = task * block; r < std::min(w.rows, (task + 1) * block); ++r)
      row(r);
  });
}

void write_codes(const WeightView &w, const Grid &grid, const Encoded &out, int64_t row, const float *x, int64_t groups,
                 const float *inverse, const float *zero) {
  struct Codes;
  const Fitter fitter(grid);
  int8_t *codes = out.codes ? out.codes + row * w.columns : scratch<int8_t, Codes>(w.columns);
  kernels().encode_groups(x, groups, w.columns / groups, inverse, zero, fitter.qmin, fitter.qmax, codes);
  if (out.packed)
    pack_row(codes, w.columns, grid.bits, out.packed + row * packed_words(w.columns, grid.bits));
}

void quantize_row(const WeightView &w, const Grid &grid, const Encoded &out, int64_t row) {
  struct Steps;
  const Fitter fitter(grid);
  const int64_t groups = w.columns / grid.group;
  const float *x = row_of(w, row);
  float *low = scratch<float, Steps>(2 * groups), *high = low + groups, *scale = out.scale + row * groups;
  kernels().group_ranges(x, groups, grid.group, low, high);
  for (int64_t g = 0; g < groups; ++g) {
    scale[g] = fitter.scale(low[g], high[g]);
    const float zero = grid.symmetric ? 0 : fitter.zero_point(low[g], scale[g]);
    if (out.zero_point)
      out.zero_point[row * groups + g] = static_cast<int8_t>(zero);
    low[g] = 1.0f / scale[g]; // from here on: what encoding needs
    high[g] = zero;
  }
  write_codes(w, grid, out, row, x, groups, low, high);
}

void quantize_whole(const WeightView &w, const Grid &grid, const Encoded &out) {
  Buffer<float> low(w.rows), high(w.rows);
  each_row(w, [&](int64_t row) { kernels().range(row_of(w, row), w.columns, &low[row], &high[row]); });
  const Fitter fitter(grid);
  const float lowest = *std::min_element(low.begin(), low.end());
  *out.scale = fitter.scale(lowest, *std::max_element(high.begin(), high.end()));
  const float inverse = 1.0f / *out.scale, zero = grid.symmetric ? 0 : fitter.zero_point(lowest, *out.scale);
  if (out.zero_point)
    *out.zero_point = static_cast<int8_t>(zero);
  each_row(w, [&](int64_t row) { write_codes(w, grid, out, row, row_of(w, row), 1, &inverse, &zero); });
}

} // namespace

void quantize(const WeightView &w, const Grid &grid, const Encoded &out) {
  if (grid.group == 0)
    return quantize_whole(w, grid, out);
  each_row(w, [&](int64_t row) { quantize_row(w, grid, out, row); });
}

} // namespace penjing
