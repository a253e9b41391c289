// Columns of a weight decided on one after the other, each error passed on to the columns after it: the inner loop of
// GPTQ, SparseGPT, their joint form, and coordinate descent.
#pragma once

#include <cstdint>

namespace penjing {

// Steps of the groups, (groups, out) each; a centred code is clamp(round(x · inverse), low, high).
struct Steps {
  const float *scale, *inverse, *low, *high;
  const int32_t *group; // of each of the n columns
};

// For i in [0, n): best = base[i] + Σ_{j<i} coupling[j, i] · error[j]; where kept, it is rounded to the steps, or stays
// as it is without steps; elsewhere it becomes 0; error[i] = reference[i] − that.
struct Columns {
  const float *base, *reference; // (n, out)
  const float *coupling;         // (n, n)
  const uint8_t *kept;           // (n, out), or null: all
  int64_t n, out;
};

void settle(const Columns &columns, const Steps *steps, int16_t *codes, float *error);

} // namespace penjing
