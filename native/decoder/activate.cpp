// Activations, gates and sums of rows. A NaN stays one.
#include "decoder/elements.h"
#include "kernels/exponential.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

// step(load, store, i) for each vector of n floats: load(p) and store(p, v) touch what is left of them at p + i.
template <class Step>
PENJING_INLINE void each_vector(int64_t n, const Step &step) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    step([i](const float *p) { return load(p + i); }, [i](float *p, const F16 &v) { store(p + i, v); });
  if (const int left = static_cast<int>(n - i))
    step([i, left](const float *p) { return load(p + i, left); },
         [i, left](float *p, const F16 &v) { store(p + i, v, left); });
}

PENJING_INLINE F16 sigmoid(const F16 &x) {
  return div(splat(1), add(splat(1), exponential(min(splat(87), sub(zero(), x)))));
}

PENJING_INLINE F16 silu(const F16 &x) { return mul(x, sigmoid(x)); }

// x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))), as x times a sigmoid.  Hendrycks and Gimpel, arXiv 1606.08415.
PENJING_INLINE F16 gelu_tanh(const F16 &x) {
  const F16 cubic = fma(mul(mul(x, x), splat(0.044715f)), x, x);
  return mul(x, sigmoid(mul(splat(1.5957691216f), cubic)));
}

// x Φ(x) = x/2 · erfc(−x/√2); erfc z = t exp(−z² + polynomial in t), t = 1 / (1 + z/2), for z ≥ 0 to 1.2e-7 of its
// size: the fit of Press et al., Numerical Recipes, 6.2.
PENJING_INLINE F16 gelu(const F16 &x) {
  const F16 size = max(sub(zero(), x), x), z = mul(size, splat(0.70710678f));
  const F16 t = div(splat(1), fma(z, splat(0.5f), splat(1)));
  F16 p = fma(splat(0.17087277f), t, splat(-0.82215223f));
  p = fma(p, t, splat(1.48851587f));
  p = fma(p, t, splat(-1.13520398f));
  p = fma(p, t, splat(0.27886807f));
  p = fma(p, t, splat(-0.18628806f));
  p = fma(p, t, splat(0.09678418f));
  p = fma(p, t, splat(0.37409196f));
  p = fma(p, t, splat(1.00002368f));
  p = fma(p, t, splat(-1.26551223f));
  const F16 tail = mul(mul(t, splat(0.5f)), exponential(sub(p, mul(z, z)))); // Φ(−|x|)
  return sub(max(zero(), x), mul(size, tail));
}

template <class Function>
PENJING_INLINE void apply(const Function &f, const float *gate, const float *up, int64_t n, float *y) {
  each_vector(n, [&](const auto &get, const auto &put) {
    const F16 v = f(get(gate));
    put(y, up ? mul(v, get(up)) : v);
  });
}

} // namespace

void activate(Activation kind, const float *gate, const float *up, int64_t n, float limit, float alpha, float *y) {
  switch (kind) {
  case Activation::silu: return apply([](const F16 &x) { return silu(x); }, gate, up, n, y);
  case Activation::gelu: return apply([](const F16 &x) { return gelu(x); }, gate, up, n, y);
  case Activation::gelu_tanh: return apply([](const F16 &x) { return gelu_tanh(x); }, gate, up, n, y);
  case Activation::clamped:
    each_vector(n, [&](const auto &get, const auto &put) {
      const F16 g = min(splat(limit), get(gate));
      const F16 u = max(splat(-limit), min(splat(limit), get(up)));
      put(y, mul(add(u, splat(1)), mul(g, sigmoid(mul(splat(alpha), g)))));
    });
  }
}

void gate(const float *by, int64_t n, float *y) {
  each_vector(n, [&](const auto &get, const auto &put) { put(y, mul(get(y), sigmoid(get(by)))); });
}

void add_scaled(const float *x, float factor, int64_t n, float *y) {
  each_vector(n, [&](const auto &get, const auto &put) { put(y, fma(get(x), splat(factor), get(y))); });
}

void multiply(float factor, int64_t n, float *y) {
  each_vector(n, [&](const auto &get, const auto &put) { put(y, mul(get(y), splat(factor))); });
}

void softcap(float cap, int64_t n, float *y) {
  each_vector(n, [&](const auto &get, const auto &put) { put(y, mul(splat(cap), tanh(div(get(y), splat(cap))))); });
}

// A number times 0 is 0, of what is none or infinite a NaN remains, and NaNs spread.
bool finite(const float *x, int64_t n) {
  F16 s = zero();
  each_vector(n, [&](const auto &get, const auto &) { s = fma(get(x), zero(), s); });
  float each[16];
  store(each, s);
  for (float v : each)
    if (v != 0)
      return false;
  return true;
}

} // namespace penjing::PENJING_ISA
