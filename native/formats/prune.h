// Zeros in place of the smallest magnitudes: exact counts, the first of equal ones first.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace penjing {

// Bits of the count-th smallest magnitude of n values (count in [1, n]); bits of magnitudes are in their order.
uint32_t magnitude_at(const void *values, Float type, int64_t n, int64_t count);

// In each of `parts` runs of n values that follow each other, zero the `count` smallest magnitudes.
void prune(void *values, Float type, int64_t parts, int64_t n, int64_t count);

} // namespace penjing
