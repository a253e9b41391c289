// What methods that decide column by column do inside of a group of columns: a weight lies as (in, out), so that a
// vector holds one column's weights of sixteen outputs, and outputs do not depend on one another.
#pragma once

#include <cstdint>

namespace penjing {

enum class Float;

constexpr int64_t settle_width = 64; // outputs at a time: their sums are in registers

// Steps of the groups, (groups, out) each; a centred code is round(clamp(x · inverse, low, high)).
struct Steps {
  const float *scale, *inverse, *low, *high;
  const int32_t *group; // of each of the n columns
};

// Columns decided on one after the other, each error passed on to the columns after it: the inner loop of GPTQ,
// SparseGPT, their joint form, and coordinate descent.
// For i in [0, n): best = base[i] + Σ_{j<i} coupling[j, i] · error[j]; where kept, it is rounded to the steps, or stays
// as it is without steps; elsewhere it becomes 0; error[i] = reference[i] − that.
struct Columns {
  const float *base, *reference; // (n, out)
  const float *coupling;         // (n, n)
  const uint8_t *kept;           // (n, out), or null: all
  const Steps *steps;            // or null
  int64_t n, out;
  int16_t *codes; // (n, out), with steps
  float *error;   // (n, out)
};

// The step and zero point of each output's n weights, of a spread of ranges those with the least error weighted by
// importance: see methods/steps.py.
struct StepSearch {
  const float *values;     // (n, out)
  const float *importance; // (n, out), or (n, 1)
  bool each;               // the former
  int64_t n, out;
  float least_code, greatest_code;
  bool symmetric;
  Float stored;        // the steps' type
  const float *shares; // trial ranges
  int64_t share_count;
  const float *near; // steps tried with the zero points beside the best
  int64_t near_count;
  float *scale, *zero; // (out)
};

void settle(const Columns &columns);
void search_steps(const StepSearch &search);

} // namespace penjing
