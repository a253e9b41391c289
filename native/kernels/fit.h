// From a range of activations to their step and zero point.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/integer.h"

namespace penjing {

// One row's or sample's step and zero point. `bias` is added when encoding; `zero` belongs to the unsigned codes.
struct Step {
  float step, inverse, bias;
  int32_t zero;
};

inline Step fit(const float *x, int64_t n, const Activation &activation) {
  float low = 0, high = 0, step = activation.step;
  int zero = activation.zero;
  if (activation.kind == Activation::affine) {
    kernels().range(x, n, &low, &high);
    step = (high - low) / 255.0f;
    step = step == 0 ? 1 : step;
    zero = static_cast<int>(std::clamp(std::nearbyint(-128.0f - low / step), -128.0f, 127.0f));
  }
  const bool coded = activation.kind == Activation::codes;
  return {step, 1.0f / step, coded ? 0.0f : static_cast<float>(zero), zero + 128};
}

} // namespace penjing
