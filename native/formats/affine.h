// Weights onto an affine grid in one pass, bit for bit as src/penjing/formats/affine.py.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace penjing {

struct Grid {
  int bits;
  int64_t group; // columns that share a step, a divisor of all columns; 0: one step for the whole matrix
  bool symmetric;
  Float scale_type;
};

struct WeightView {
  const void *values;
  Float type;
  int64_t rows, columns;
  const uint8_t *kept; // (rows, columns) of 0 or 1: where 0, the weight counts as zero; or null
};

// Where codes go: bytes (rows, columns), or packed words; one of them null.
struct Encoded {
  int8_t *codes;
  int32_t *packed;
  float *scale;       // (rows, groups) or (1, 1)
  int8_t *zero_point; // shaped like scale; null when symmetric
};

void quantize(const WeightView &weight, const Grid &grid, const Encoded &out);

} // namespace penjing
