// What drawing a token does to every logit.
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

constexpr float infinite = __builtin_inff();

#if defined(__AVX512VNNI__)
constexpr int wide = 8;
#elif defined(__AVX2__)
constexpr int wide = 4;
#else
constexpr int wide = 2;
#endif
typedef float Floats __attribute__((vector_size(4 * wide)));
typedef double Doubles __attribute__((vector_size(8 * wide)));
typedef int64_t Integers __attribute__((vector_size(8 * wide)));
constexpr int sums_apart = 8; // on every machine, so that sums are the same

// e^x for x ≤ 0 to 1 unit in the last place, in the same operations and so the same bits on every machine; 0 below
// e^−700, and exactly 1 at 0. x = n ln 2 + r with |r| ≤ ln 2 / 2, and the series of e^r up to r^13 / 13!, whose rest
// is less than 2^−57. The product n · (head of ln 2) is exact.
PENJING_INLINE Doubles exponential(Doubles x) {
  const Doubles lowest = Doubles{} - 700, whole = Doubles{} + 0x1.8p52; // + 1.5 · 2^52 rounds; the low bits are then n
  const Doubles y = x > lowest ? x : lowest;
  const Doubles shifted = y * 0x1.71547652b82fep0 + whole, n = shifted - whole;
  const Doubles r = (y - n * 0x1.62e42feep-1) - n * 0x1.a39ef35793c76p-33;
  constexpr double inverse_factorials[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
      1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5};
  Doubles p = Doubles{} + 1.0 / 6227020800;
  for (double each : inverse_factorials)
    p = p * r + each;
  p = 1 + (r + r * r * p);
  return x > lowest ? (Doubles)((Integers)p + ((Integers)shifted << 52)) : Doubles{};
}

PENJING_INLINE Doubles weight(const float *x, const Softmax &s) {
  Floats v;
  std::memcpy(&v, x, sizeof v);
  const Doubles e = exponential((__builtin_convertvector(v, Doubles) - s.greatest) * s.inverse);
  return e >= s.least ? e : Doubles{};
}

// A block, whole: what is missing weighs nothing.
PENJING_INLINE const float *padded(const float *x, int64_t n, float *block) {
  if (n >= softmax_block)
    return x;
  std::memcpy(block, x, static_cast<size_t>(n) * sizeof *x);
  for (int64_t i = n; i < softmax_block; ++i)
    block[i] = -infinite;
  return block;
}

} // namespace

bool block_maxima(const float *x, int64_t n, float *maxima) {
  F16 spoiled = zero(); // 0 · x is NaN unless x is finite
  for (int64_t i = 0; i < n; i += softmax_block, ++maxima) {
    F16 v[4];
    if (i + softmax_block <= n)
      for (int j = 0; j < 4; ++j)
        v[j] = load(x + i + 16 * j);
    else // the last elements, some of them twice or more
      for (int j = 0; j < 4; ++j) {
        float some[16];
        for (int k = 0; k < 16; ++k)
          some[k] = x[i + 16 * j + k < n ? i + 16 * j + k : n - 1];
        v[j] = load(some);
      }
    for (int j = 0; j < 4; ++j)
      spoiled = add(spoiled, mul(v[j], zero()));
    *maxima = greatest(max(max(v[0], v[1]), max(v[2], v[3])));
  }
  float each[16];
  store(each, spoiled);
  bool finite = true;
  for (float e : each)
    finite &= e == 0;
  return finite;
}

void softmax_weights(const float *x, int64_t n, const Softmax &s, double *weights) {
  for (int64_t i = 0; i < n; i += softmax_block) {
    float block[softmax_block];
    double each[softmax_block];
    const float *from = padded(x + i, n - i, block);
    for (int j = 0; j < softmax_block; j += wide) {
      const Doubles w = weight(from + j, s);
      std::memcpy(each + j, &w, sizeof w);
    }
    const int64_t count = n - i < softmax_block ? n - i : softmax_block;
    std::memcpy(weights + i, each, static_cast<size_t>(count) * sizeof *each);
  }
}

void softmax_sums(const float *x, int64_t n, const Softmax &s, double *sums) {
  for (int64_t i = 0; i < n; i += softmax_block) {
    float block[softmax_block];
    const float *from = padded(x + i, n - i, block);
    Doubles sum[sums_apart / wide] = {};
    for (int j = 0; j < softmax_block; j += sums_apart)
      for (int k = 0; k < sums_apart / wide; ++k)
        sum[k] += weight(from + j + k * wide, s);
    double each[sums_apart];
    std::memcpy(each, sum, sizeof each);
    *sums++ = ((each[0] + each[1]) + (each[2] + each[3])) + ((each[4] + each[5]) + (each[6] + each[7]));
  }
}

} // namespace penjing::PENJING_ISA
