// Norms of one row, in float32.
#include "decoder/elements.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

constexpr int lanes = 16, sums = 4; // vectors of partial sums, so that additions need not wait for each other

PENJING_INLINE float total(F16 (&s)[sums]) {
  float each[lanes];
  store(each, add(add(s[0], s[1]), add(s[2], s[3])));
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      each[i] += each[i + half];
  return each[0];
}

PENJING_INLINE F16 some(const float *p, int64_t left) {
  return left >= lanes ? load(p) : load(p, static_cast<int>(left));
}

PENJING_INLINE void keep_some(float *p, const F16 &v, int64_t left) {
  left >= lanes ? store(p, v) : store(p, v, static_cast<int>(left));
}

float sum_of_squares(const float *x, int64_t n) {
  F16 s[sums] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + sums * lanes <= n; i += sums * lanes)
    for (int j = 0; j < sums; ++j) {
      const F16 v = load(x + i + j * lanes);
      s[j] = fma(v, v, s[j]);
    }
  for (int j = 0; i < n; i += lanes, ++j) {
    const F16 v = some(x + i, n - i);
    s[j] = fma(v, v, s[j]);
  }
  return total(s);
}

float sum(const float *x, int64_t n) {
  F16 s[sums] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < n; i += lanes)
    s[i / lanes % sums] = add(s[i / lanes % sums], some(x + i, n - i));
  return total(s);
}

} // namespace

void rms_norm(const float *x, const float *weight, int64_t n, float eps, float factor, float *y) {
  const F16 by = splat(factor / __builtin_sqrtf(sum_of_squares(x, n) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += lanes) {
    const F16 v = mul(some(x + i, n - i), by);
    keep_some(y + i, weight ? mul(v, some(weight + i, n - i)) : v, n - i);
  }
}

void layer_norm(const float *x, const float *weight, const float *bias, int64_t n, float eps, float *y) {
  const F16 mean = splat(sum(x, n) / static_cast<float>(n));
  for (int64_t i = 0; i < n; i += lanes)
    keep_some(y + i, sub(some(x + i, n - i), mean), n - i);
  const F16 by = splat(1 / __builtin_sqrtf(sum_of_squares(y, n) / static_cast<float>(n) + eps));
  for (int64_t i = 0; i < n; i += lanes) {
    F16 v = mul(some(y + i, n - i), by);
    v = weight ? mul(v, some(weight + i, n - i)) : v;
    keep_some(y + i, bias ? add(v, some(bias + i, n - i)) : v, n - i);
  }
}

} // namespace penjing::PENJING_ISA
