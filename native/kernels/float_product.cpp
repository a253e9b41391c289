// Float activations times weights of any code: decoded in registers, column by column of a panel.
#include "kernels/decode.h"

namespace penjing::PENJING_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr int tile_rows = 12, tile_panels = 2; // 24 sums, in 32 registers
constexpr int few_rows = 8;                    // up to so many, weights are decoded in registers, once for all
#elif defined(PENJING_NEON)
constexpr int tile_rows = 6, tile_panels = 1; // a sum takes four registers of 32
constexpr int few_rows = 4;
#elif defined(__AVX2__)
constexpr int tile_rows = 3, tile_panels = 2; // 12 registers of 16
constexpr int few_rows = 2;
#else
constexpr int tile_rows = 4, tile_panels = 1;
constexpr int few_rows = 1;
#endif
constexpr int64_t chunk = 512; // columns decoded at once: they and their part of x stay in the second-level cache

PENJING_INLINE int lanes_of(const FloatWeight &w, int64_t panel) {
  const int64_t left = w.rows - panel * lanes;
  return static_cast<int>(left < lanes ? left : lanes);
}

PENJING_INLINE void write(float *y, F16 v, int n) { n == lanes ? store(y, v) : store(y, v, n); }

// A few rows: one pass over the panel, sums in registers, a step applied once a group.
template <class Decoder, int rows>
void few(const FloatProduct &p, int64_t panel, int64_t row) {
  constexpr int chains = rows == 1 ? 4 : rows == 2 ? 2 : 1; // independent sums hide the latency of an addition
  const FloatWeight &w = *p.weight;
  const float *x = p.x + row * w.columns;
  Decoder decoder(w, panel);
  F16 sum[rows]; // in registers only if every loop over it is unrolled, as in group_product.cpp
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    sum[r] = zero();
  const int64_t group = w.columns / w.groups;
  for (int64_t g = 0; g < w.groups; ++g) {
    F16 part[rows][chains];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < chains; ++c)
        part[r][c] = zero();
    decoder.start_group(g);
    for (int64_t k = 0; k < group; k += 16, x += 16)
      decoder.block([&](auto column, F16 value) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) {
          F16 &s = part[r][column.value % chains];
          s = fma(value, splat(x[r * w.columns + column.value]), s);
        }
      });
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int c = 1; c < chains; ++c)
        part[r][0] = add(part[r][0], part[r][c]);
      sum[r] = decoder.scaled() ? fma(part[r][0], decoder.scale, sum[r]) : add(sum[r], part[r][0]);
    }
  }
  const int n = lanes_of(w, panel);
  const F16 bias = p.bias ? load(p.bias + panel * lanes, n) : zero();
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
    write(p.y + (row + r) * p.y_stride + panel * lanes, add(sum[r], bias), n);
}

// rows × panels sums over `columns` decoded columns, kept in registers.
template <int rows, int panels>
void tile(const FloatProduct &p, const float *decoded, int64_t panel, int64_t row, int64_t column, int64_t columns) {
  const FloatWeight &w = *p.weight;
  const float *x = p.x + row * w.columns + column;
  float *y = p.y + row * p.y_stride + panel * lanes;
  F16 sum[rows][panels];
  for (int i = 0; i < panels; ++i) {
    const int n = lanes_of(w, panel + i);
    for (int r = 0; r < rows; ++r) {
      const float *before = column ? y + r * p.y_stride + i * lanes : p.bias ? p.bias + (panel + i) * lanes : nullptr;
      sum[r][i] = before ? load(before, n) : zero();
    }
  }
  for (int64_t k = 0; k < columns; ++k) {
    F16 value[panels];
    for (int i = 0; i < panels; ++i)
      value[i] = load(decoded + (i * chunk + k) * lanes);
    for (int r = 0; r < rows; ++r) {
      const F16 each = splat(x[r * w.columns + k]);
      for (int i = 0; i < panels; ++i)
        sum[r][i] = fma(value[i], each, sum[r][i]);
    }
  }
  for (int i = 0; i < panels; ++i)
    for (int r = 0; r < rows; ++r)
      write(y + r * p.y_stride + i * lanes, sum[r][i], lanes_of(w, panel + i));
}

template <int panels, int rows = tile_rows>
void tiles(const FloatProduct &p, const float *decoded, int64_t panel, int64_t row, int64_t row_end, int64_t column,
           int64_t columns) {
  for (; row + rows <= row_end; row += rows)
    tile<rows, panels>(p, decoded, panel, row, column, columns);
  if constexpr (rows > 1)
    tiles<panels, rows == 12 ? 8 : (rows + 1) / 2>(p, decoded, panel, row, row_end, column, columns);
}

float *decoded_columns() {
  alignas(64) static thread_local float columns[tile_panels * chunk * lanes];
  return columns;
}

// Many rows: a chunk of columns is decoded once and used for all of them.
template <class Decoder, int panels>
void many(const FloatProduct &p, int64_t panel, int64_t row_begin, int64_t row_end) {
  float *decoded = decoded_columns();
  const FloatWeight &w = *p.weight;
  Decoder decoders[2] = {Decoder(w, panel), Decoder(w, panel + panels - 1)};
  for (int64_t column = 0; column < w.columns; column += chunk) {
    const int64_t columns = w.columns - column < chunk ? w.columns - column : chunk;
    for (int i = 0; i < panels; ++i)
      decoders[i].values(column, columns, decoded + i * chunk * lanes);
    tiles<panels>(p, decoded, panel, row_begin, row_end, column, columns);
  }
}

template <class Decoder>
void product(const FloatProduct &p, int64_t panel, int64_t panel_end, int64_t row_begin, int64_t row_end) {
  if (row_end - row_begin > few_rows) {
    for (; panel + tile_panels <= panel_end; panel += tile_panels)
      many<Decoder, tile_panels>(p, panel, row_begin, row_end);
    for (; panel < panel_end; ++panel)
      many<Decoder, 1>(p, panel, row_begin, row_end);
    return;
  }
  for (; panel < panel_end; ++panel)
    unroll<few_rows>([&](auto rows) {
      if (row_end - row_begin == rows.value + 1)
        few<Decoder, rows.value + 1>(p, panel, row_begin);
    });
}

} // namespace

void float_product(const FloatProduct &p, int64_t panel_begin, int64_t panel_end, int64_t row_begin, int64_t row_end) {
  with_decoder(*p.weight, [&](auto kind) {
    product<typename decltype(kind)::Decoder>(p, panel_begin, panel_end, row_begin, row_end);
  });
}

void decode_panel(const FloatWeight &w, int64_t panel, float *values) {
  with_decoder(w, [&](auto kind) {
    typename decltype(kind)::Decoder decoder(w, panel);
    decoder.values(0, w.columns, values);
  });
}

} // namespace penjing::PENJING_ISA
