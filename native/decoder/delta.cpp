// Linear attention with a state: the short convolution before it, and the delta rule.
#include "decoder/elements.h"
#include "kernels/exponential.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

constexpr int lanes = 16;

// `count` vectors of the state's columns, from `state` on.
template <int count>
PENJING_INLINE void delta_columns(float *state, const float *query, const float *key, const float *value, float decay,
                                  float beta, int64_t keys, int64_t values, float *y) {
  F16 known[count];
  for (F16 &v : known)
    v = zero();
  for (int64_t k = 0; k < keys; ++k)
    for (int i = 0; i < count; ++i)
      known[i] = fma(load(state + k * values + i * lanes), splat(key[k]), known[i]);
  F16 change[count], read[count];
  for (int i = 0; i < count; ++i) {
    change[i] = mul(splat(beta), sub(load(value + i * lanes), mul(splat(decay), known[i])));
    read[i] = zero();
  }
  for (int64_t k = 0; k < keys; ++k)
    for (int i = 0; i < count; ++i) {
      float *at = state + k * values + i * lanes;
      const F16 s = fma(splat(key[k]), change[i], mul(load(at), splat(decay)));
      store(at, s);
      read[i] = fma(s, splat(query[k]), read[i]);
    }
  for (int i = 0; i < count; ++i)
    store(y + i * lanes, read[i]);
}

void delta_column(float *state, const float *query, const float *key, float value, float decay, float beta,
                  int64_t keys, int64_t values, float *y) {
  float known = 0, read = 0;
  for (int64_t k = 0; k < keys; ++k)
    known += state[k * values] * key[k];
  const float change = beta * (value - decay * known);
  for (int64_t k = 0; k < keys; ++k) {
    state[k * values] = state[k * values] * decay + key[k] * change;
    read += state[k * values] * query[k];
  }
  *y = read;
}

} // namespace

void delta(float *state, const float *query, const float *key, const float *value, float decay, float beta,
           int64_t keys, int64_t values, float *y) {
  int64_t i = 0;
  for (; i + 4 * lanes <= values; i += 4 * lanes)
    delta_columns<4>(state + i, query, key, value + i, decay, beta, keys, values, y + i);
  for (; i + lanes <= values; i += lanes)
    delta_columns<1>(state + i, query, key, value + i, decay, beta, keys, values, y + i);
  for (; i < values; ++i)
    delta_column(state + i, query, key, value[i], decay, beta, keys, values, y + i);
}

void convolve(const float *const *rows, const float *weight, int64_t taps, int64_t channels, float *y) {
  for (int64_t c = 0; c < channels; c += lanes) {
    const int left = static_cast<int>(channels - c < lanes ? channels - c : lanes);
    const auto get = [&](const float *p) { return left == lanes ? load(p + c) : load(p + c, left); };
    F16 s = zero();
    for (int64_t j = 0; j < taps; ++j)
      s = fma(get(rows[j]), get(weight + j * channels), s);
    const F16 v = div(s, add(splat(1), exponential(min(splat(87), sub(zero(), s)))));
    left == lanes ? store(y + c, v) : store(y + c, v, left);
  }
}

} // namespace penjing::PENJING_ISA
