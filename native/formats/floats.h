// float32 rounded to sixteen bits, to nearest, ties to even; and back.
#pragma once

#include <bit>
#include <cstdint>

namespace penjing {

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) // keep a NaN one
    return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Through the float whose exponent is 112 less (exact, also for what is subnormal in half precision).
inline float from_f16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, rest = (half & 0x7fffu) << 13;
  const auto finite = std::bit_cast<uint32_t>(std::bit_cast<float>(rest) * 0x1p112f);
  return std::bit_cast<float>((rest >= 0x7c00u << 13 ? rest | 0x7f800000u : finite) | sign);
}

inline uint16_t to_f16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000u)
    return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x47800000u) // 65536 and more
    return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000u) { // subnormal: its last bit is 2^-24, as that of the floats from 0.5 to 1
    const float shifted = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

} // namespace penjing
