// Matrices as bitmask and kept values, the layout of src/penjing/formats/bitmask.py.
#pragma once

#include <cstdint>
#include <functional>

namespace penjing {

struct Elements {
  int width;            // bytes: 1, 2 or 4
  uint32_t significant; // bits that make an element count as non-zero: all, or all but a float's sign
};

// bitmask (rows, ceil(columns / 8)), offsets (rows); then allocate(kept) gives the memory for the kept values.
void bitmask_encode(const void *matrix, int64_t rows, int64_t columns, Elements elements, uint8_t *bitmask,
                    int64_t *offsets, const std::function<void *(int64_t)> &allocate);

// Bits that are set in each row (rows).
void bitmask_counts(const uint8_t *bitmask, int64_t rows, int64_t columns, int64_t *counts);

// Row r's values begin at values[offsets[r]].
void bitmask_decode(const void *values, const uint8_t *bitmask, const int64_t *offsets, int64_t rows, int64_t columns,
                    int width, void *matrix);

} // namespace penjing
