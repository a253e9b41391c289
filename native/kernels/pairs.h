// Products over rows that are rounded to bfloat16 and multiplied in pairs (AVX512_BF16): exact products, sums float32,
// at twice the speed of float32. What calibration and the solvers multiply most.
#pragma once

#include <cstdint>

#include "runtime/buffer.h"

namespace penjing {

// Does this processor multiply pairs of bfloat16, and may it be used? Nothing else here works without.
bool has_pairs();

// Rows of bfloat16 or float32, of which `columns` count, `stride` elements from row to row.
struct PairRows {
  const void *x;
  bool bfloat16;
  int64_t rows, columns, stride;
};

// total (columns, columns) += xᵀx, in its upper triangle; what is below it may change as well.
void add_gram(const PairRows &x, float *total);

// What many products are made with while blocks of its rows change: kept in bfloat16, in the order that they read.
class PairMatrix {
public:
  explicit PairMatrix(const PairRows &x);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

  // Rows [low, high) become those of x; of an odd one the pair does, so that x is to have the row beside it as well.
  void put(const PairRows &x, int64_t low, int64_t high);
  // total (columns of a, columns) += aᵀ times the first rows of this, as many as a has; where that is odd, the row
  // after it counts as zeros.
  void add_product(const PairRows &a, float *total) const;

private:
  int64_t rows_, columns_, panels_, pairs_;
  Buffer<uint32_t> data_; // (panels, pairs, width)
};

namespace pairs {

constexpr int64_t width = 48, tile = 8; // columns of a panel; of a tile, whose 8 × 48 sums take 24 of 32 registers

// Pairs of rows [first, first + pairs) of a panel's columns, two rows' elements in each 32 bits: (pairs, width). Rows
// and columns that x has not are zeros.
void pack(const PairRows &x, int64_t panel, int64_t first, int64_t pairs, uint32_t *packed);
// total (count of eight columns, columns of a panel), a row of it `stride` long, += their products over all pairs.
void add_tile(const uint32_t *eight, const uint32_t *panel, int64_t pairs, int64_t count, int64_t columns,
              int64_t stride, float *total);

} // namespace pairs
} // namespace penjing
