// e^x and tanh of sixteen floats.
#pragma once

#include "kernels/simd.h"

namespace penjing::PENJING_ISA {

// e^x = 2^n (1 + m) for x in [−87, 88]; less counts as −87. After Cephes' expf.
struct Power {
  F16 scale, m; // 2^n; m in [−0.3, 0.42], itself to 2 units in the last place
};
PENJING_INLINE Power power(F16 x) {
  x = max(splat(-87), x); // in this order a NaN stays one
  const I16 n = round(mul(x, splat(1.44269504f)));
  const F16 whole = to_float(n);
  const F16 r = fma(whole, splat(2.12194440e-4f), fma(whole, splat(-0.693359375f), x));
  F16 p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  return {as_float(shift_left<23>(iadd(n, isplat(127)))), fma(mul(p, r), r, r)};
}

// To 2 units in the last place.
PENJING_INLINE F16 exponential(F16 x) {
  const Power e = power(x);
  return mul(add(e.m, splat(1)), e.scale);
}

// (e^2x − 1) / (e^2x + 1), without the cancellation for small x. A NaN stays one.
PENJING_INLINE F16 tanh(F16 x) {
  const Power e = power(min(splat(40), add(x, x)));
  const F16 less_one = fma(e.m, e.scale, sub(e.scale, splat(1)));
  return div(less_one, add(less_one, splat(2)));
}

} // namespace penjing::PENJING_ISA
