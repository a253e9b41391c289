// Activations onto bytes: ranges and codes.
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

// clamp(round(x · inverse + zero), −128, 127) + 128; the clamp comes first, so that rounding cannot overflow.
PENJING_INLINE I16 byte_codes(F16 x, F16 inverse, F16 zero_point) {
  const F16 clamped = min(max(add(mul(x, inverse), zero_point), splat(-128)), splat(127));
  return iadd(round(clamped), isplat(128));
}

// Codes of n columns and zeros up to `padded`; a step of 0 where all are (nearly) 0. A NaN makes the step NaN.
void encode_segment(const float *x, int64_t n, int64_t padded, float span, float least_code, int8_t *codes, float *step,
                    int32_t *minus_sum) {
  constexpr float nothing = 0x1p-100f; // below it the inverse might overflow
  const int tail = static_cast<int>(n % 16);
  I16 top = izero();
  for (int64_t i = 0; i + 16 <= n; i += 16)
    top = imax(top, magnitude_bits(load(x + i)));
  if (tail)
    top = imax(top, magnitude_bits(load(x + n - tail, tail)));
  const int32_t bits = greatest(top);
  float reach;
  std::memcpy(&reach, &bits, sizeof reach);
  *step = reach < nothing ? 0.0f : reach / span;
  const F16 inverse = splat(reach < nothing ? 0.0f : 1.0f / *step);
  const auto code = [&](F16 v) __attribute__((always_inline)) {
    return round(min(max(mul(v, inverse), splat(least_code)), splat(127)));
  };
  I16 sum = izero();
  for (int64_t i = 0; i + 16 <= n; i += 16) {
    const I16 c = code(load(x + i));
    sum = iadd(sum, c);
    store_int8(codes + i, c);
  }
  if (tail) {
    const I16 c = code(load(x + n - tail, tail));
    sum = iadd(sum, c);
    store_int8(codes + n - tail, c, tail);
  }
  *minus_sum = -total(sum);
  if (padded > n)
    std::memset(codes + n, 0, static_cast<size_t>(padded - n));
}

} // namespace

void encode_segments(const float *x, int64_t columns, const Segments &s, float span, float least_code, int8_t *codes,
                     float *step, int32_t *minus_sum) {
  for (int64_t group = 0; group < columns; group += s.group)
    for (int64_t part = 0; part < s.parts; ++part, codes += s.length, ++step, ++minus_sum) {
      const int64_t begin = part * s.length, left = s.group - begin;
      encode_segment(x + group + begin,
                     left < 0          ? 0
                     : left < s.length ? left
                                       : s.length,
                     s.length, span, least_code, codes, step, minus_sum);
    }
}

void range(const float *x, int64_t n, float *low, float *high) {
  F16 lows[2] = {zero(), zero()}, highs[2] = {zero(), zero()};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int j = 0; j < 2; ++j) {
      const F16 v = load(x + i + 16 * j);
      lows[j] = min(v, lows[j]);
      highs[j] = max(v, highs[j]);
    }
  for (; i < n; i += 16) {
    const F16 v = load(x + i, static_cast<int>(n - i < 16 ? n - i : 16));
    lows[0] = min(v, lows[0]);
    highs[0] = max(v, highs[0]);
  }
  *low = least(min(lows[0], lows[1]));
  *high = greatest(max(highs[0], highs[1]));
}

void encode_bytes(const float *x, int64_t n, float inverse, float zero_point, uint8_t *codes) {
  const F16 scale = splat(inverse), bias = splat(zero_point);
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    store_int8(reinterpret_cast<int8_t *>(codes + i), byte_codes(load(x + i), scale, bias));
  if (i < n) {
    const int left = static_cast<int>(n - i);
    store_int8(reinterpret_cast<int8_t *>(codes + i), byte_codes(load(x + i, left), scale, bias), left);
  }
}

void encode_quads(const float *const planes[4], int64_t n, float inverse, float zero_point, uint8_t *codes) {
  const F16 scale = splat(inverse), bias = splat(zero_point);
  for (int64_t i = 0; i < n; i += 16) {
    const int left = static_cast<int>(n - i < 16 ? n - i : 16);
    const auto plane = [&](int c) __attribute__((always_inline)) {
      return planes[c] ? byte_codes(left == 16 ? load(planes[c] + i) : load(planes[c] + i, left), scale, bias)
                       : izero();
    };
    const I16 quad =
        ior(ior(plane(0), shift_left<8>(plane(1))), ior(shift_left<16>(plane(2)), shift_left<24>(plane(3))));
    if (left == 16) {
      istore(codes + 4 * i, quad);
    } else {
      uint8_t bytes[64];
      istore(bytes, quad);
      std::memcpy(codes + 4 * i, bytes, static_cast<size_t>(4 * left));
    }
  }
}

} // namespace penjing::PENJING_ISA
