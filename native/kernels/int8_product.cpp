// Unsigned bytes times signed bytes, summed in int32: linear layers, and convolutions by their offsets.
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr int tile_rows = 6, tile_panels = 4; // 24 sums, in 32 registers
#elif defined(PENJING_NEON)
constexpr int tile_rows = 6, tile_panels = 1; // a sum takes four registers of 32
#elif defined(__AVX2__)
constexpr int tile_rows = 2, tile_panels = 2;
#else
constexpr int tile_rows = 4, tile_panels = 1;
#endif
#if defined(PENJING_NEON)
constexpr int narrow_rows = 6; // a tile of a single panel
#else
constexpr int narrow_rows = 8;
#endif

// The rows of a tile: where each begins, and where its quads are.
template <int rows>
struct Rows {
  const uint8_t *begin[rows];
  const int32_t *quad_offset;

  Rows(const Int8Product &p, int64_t row) : quad_offset(p.quad_offset) {
    for (int r = 0; r < rows; ++r)
      begin[r] = p.x + (p.row_offset ? p.row_offset[row + r] : (row + r) * 4 * p.weight->quads);
  }
};

// sum[r][i] = Σ x · w over all quads.
template <int rows, int panels, bool gathered>
PENJING_INLINE void multiply(const Int8Weight &w, const Rows<rows> &x, int64_t panel, I16 (&sum)[rows][panels]) {
  for (auto &row : sum)
    for (I16 &s : row)
      s = izero();
  const int8_t *values = w.values + panel * w.quads * 64;
  for (int64_t q = 0; q < w.quads; ++q) {
    const int64_t at = gathered ? x.quad_offset[q] : 4 * q;
    Quads weight[panels];
    for (int i = 0; i < panels; ++i)
      weight[i] = quads(values + (i * w.quads + q) * 64);
    for (int r = 0; r < rows; ++r)
      for (int i = 0; i < panels; ++i)
        sum[r][i] = dot4(sum[r][i], x.begin[r] + at, weight[i]);
  }
}

// Σ (x − dot4_less) of each row over the true columns, in every lane; the others are 0 in x.
template <int rows>
void row_sums(const Int8Weight &w, const Rows<rows> &x, I16 (&sum)[rows]) {
  alignas(64) int8_t ones[64];
  std::memset(ones, 1, sizeof ones);
  const Quads one = quads(ones);
  for (int r = 0; r < rows; ++r) {
    sum[r] = isplat(static_cast<int32_t>(dot4_less * (4 * w.quads - w.columns)));
    for (int64_t q = 0; q < w.quads; ++q)
      sum[r] = dot4(sum[r], x.begin[r] + (x.quad_offset ? x.quad_offset[q] : 4 * q), one);
  }
}

// From a raw sum to the exact one.
PENJING_INLINE I16 exact(const Int8Product &p, int64_t panel, int64_t row, I16 sum, I16 x_sum) {
  const Int8Weight &w = *p.weight;
  sum = isub(sum, imul(isplat(p.zero[row * p.x_stride] - dot4_less), iload(w.sum + panel * lanes)));
  return w.zero_point ? isub(sum, imul(x_sum, iload(w.zero_point + panel * lanes))) : sum;
}

PENJING_INLINE F16 scaled(const Int8Product &p, int64_t panel, int64_t row, I16 sum) {
  F16 y = mul(mul(to_float(sum), splat(p.step[row * p.x_stride])), load(p.scale + panel * lanes));
  if (p.bias)
    y = add(y, load(p.bias + panel * lanes));
  return p.relu ? max(y, zero()) : y;
}

// A tile of one panel, to rows × n places. An image has its outputs far apart, so each gets all of its pixels at once.
template <int rows, class T>
PENJING_INLINE void write(T *out, const T (&tile)[rows][lanes], int n, int64_t row_stride, int64_t output_stride) {
  for (int i = 0; i < n; ++i)
    for (int r = 0; r < rows; ++r)
      out[r * row_stride + i * output_stride] = tile[r][i];
}

template <int rows, int panels>
PENJING_INLINE void finish(const Int8Product &p, int64_t panel, int64_t row, const I16 (&sum)[rows][panels], int i,
                           const I16 (&x_sum)[rows]) {
  const int64_t left = p.weight->rows - (panel + i) * lanes;
  const int64_t at = row * p.row_stride + (panel + i) * lanes * p.output_stride;
  const int n = static_cast<int>(left < lanes ? left : lanes);
  if (p.sums) {
    alignas(64) int32_t sums[rows][lanes];
    for (int r = 0; r < rows; ++r)
      istore(sums[r], exact(p, panel + i, row + r, sum[r][i], x_sum[r]));
    return write(p.sums + at, sums, n, p.row_stride, p.output_stride);
  }
  F16 y[rows];
  for (int r = 0; r < rows; ++r)
    y[r] = scaled(p, panel + i, row + r, exact(p, panel + i, row + r, sum[r][i], x_sum[r]));
  if (p.output_stride == 1) {
    for (int r = 0; r < rows; ++r)
      n == lanes ? store(p.y + at + r * p.row_stride, y[r]) : store(p.y + at + r * p.row_stride, y[r], n);
    return;
  }
  alignas(64) float values[rows][lanes];
  for (int r = 0; r < rows; ++r)
    store(values[r], y[r]);
  write(p.y + at, values, n, p.row_stride, p.output_stride);
}

template <int rows, int panels>
void tile(const Int8Product &p, int64_t panel, int64_t row) {
  const Int8Weight &w = *p.weight;
  const Rows<rows> x(p, row);
  I16 sum[rows][panels], x_sum[rows];
  p.quad_offset ? multiply<rows, panels, true>(w, x, panel, sum) : multiply<rows, panels, false>(w, x, panel, sum);
  if (w.zero_point)
    row_sums<rows>(w, x, x_sum);
  else
    for (I16 &s : x_sum)
      s = izero();
  for (int i = 0; i < panels; ++i)
    finish(p, panel, row, sum, i, x_sum);
}

template <int rows, int panels>
void tiles(const Int8Product &p, int64_t panel, int64_t row, int64_t row_end) {
  for (; row + rows <= row_end; row += rows)
    tile<rows, panels>(p, panel, row);
  if constexpr (rows > 1)
    tiles<rows / 2, panels>(p, panel, row, row_end);
}

} // namespace

void int8_product(const Int8Product &p, int64_t panel, int64_t panel_end, int64_t row_begin, int64_t row_end) {
  for (; panel + tile_panels <= panel_end; panel += tile_panels)
    tiles<tile_rows, tile_panels>(p, panel, row_begin, row_end);
  if constexpr (tile_panels > 2)
    for (; panel + 2 <= panel_end; panel += 2)
      tiles<tile_rows, 2>(p, panel, row_begin, row_end);
  for (; panel < panel_end; ++panel)
    tiles<narrow_rows, 1>(p, panel, row_begin, row_end);
}

} // namespace penjing::PENJING_ISA
