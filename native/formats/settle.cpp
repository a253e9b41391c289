#include "formats/settle.h"

#include <algorithm>
#include <cmath>

#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int64_t width = 128; // outputs at a time: the errors of 128 columns stay in the second cache

// Outputs do not depend on one another, so each thread goes through all columns for its own.
void settle_outputs(const Columns &c, const Steps *steps, int64_t first, int64_t count, int16_t *codes, float *error) {
  float best[width];
  for (int64_t i = 0; i < c.n; ++i) {
    const int64_t row = i * c.out + first;
    std::copy_n(c.base + row, count, best);
    for (int64_t j = 0; j < i; ++j) {
      const float share = c.coupling[j * c.n + i];
      const float *passed = error + j * c.out + first;
      for (int64_t o = 0; o < count; ++o)
        best[o] += share * passed[o];
    }
    if (steps) {
      const int64_t at = steps->group[i] * c.out + first;
      const float *scale = steps->scale + at, *inverse = steps->inverse + at, *low = steps->low + at,
                  *high = steps->high + at;
      for (int64_t o = 0; o < count; ++o) {
        float code = std::min(std::max(std::nearbyint(best[o] * inverse[o]), low[o]), high[o]);
        code = c.kept && !c.kept[row + o] ? 0.0f : code;
        codes[row + o] = static_cast<int16_t>(code);
        best[o] = code * scale[o];
      }
    } else {
      for (int64_t o = 0; o < count; ++o)
        best[o] = c.kept && !c.kept[row + o] ? 0.0f : best[o];
    }
    for (int64_t o = 0; o < count; ++o)
      error[row + o] = c.reference[row + o] - best[o];
  }
}

} // namespace

void settle(const Columns &columns, const Steps *steps, int16_t *codes, float *error) {
  parallel_for((columns.out + width - 1) / width, [&](int64_t task) {
    const int64_t first = task * width;
    settle_outputs(columns, steps, first, std::min(width, columns.out - first), codes, error);
  });
}

} // namespace penjing
