// Kept values spread over the places that a mask gives them, zeros elsewhere.
#pragma once

#include "kernels/simd.h"

namespace penjing::PENJING_ISA {

#if defined(__AVX512VNNI__)

PENJING_INLINE F16 expand_floats(const float *p, uint32_t mask) {
  return _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(mask), p);
}

PENJING_INLINE __m256i expand_words(const uint16_t *p, uint32_t mask) {
  const __m256i kept = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  return _mm256_maskz_expand_epi16(static_cast<__mmask16>(mask), kept);
}

PENJING_INLINE F16 expand_bf16(const uint16_t *p, uint32_t mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(expand_words(p, mask)), 16));
}

PENJING_INLINE F16 expand_f16(const uint16_t *p, uint32_t mask) { return _mm512_cvtph_ps(expand_words(p, mask)); }

using Codes = __m512i; // sixteen codes of each of four columns

PENJING_INLINE Codes expand_bytes(const int8_t *p, uint64_t mask) {
  return _mm512_maskz_expand_epi8(mask, _mm512_loadu_si512(p));
}

// Nibbles are two's complement, the low one first.
PENJING_INLINE Codes expand_nibbles(const uint8_t *p, uint64_t mask) {
  const __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  const __m512i nibbles = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
  const __m512i sign = _mm512_set1_epi8(8);
  return _mm512_maskz_expand_epi8(mask, _mm512_sub_epi8(_mm512_xor_si512(nibbles, sign), sign));
}

template <int k>
PENJING_INLINE F16 column(Codes codes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(codes, k)));
}

#else

PENJING_INLINE F16 expand_floats(const float *p, uint32_t mask) {
  float out[16];
  for (int i = 0; i < 16; ++i) {
    const uint32_t bit = mask >> i & 1;
    out[i] = bit ? *p : 0.0f;
    p += bit;
  }
  return load(out);
}

struct HalfFloats {
  uint16_t v[16];
};

PENJING_INLINE HalfFloats expand_words(const uint16_t *p, uint32_t mask) {
  HalfFloats out;
#if defined(PENJING_NEON)
  const auto eight = [&](uint32_t bits, uint16_t *to) __attribute__((always_inline)) {
    const uint8x8_t at = vld1_u8(places.of[bits]), twice = vqadd_u8(at, at); // 255: none
    const uint8x16_t second = vreinterpretq_u8_u16(vdupq_n_u16(0x0100));
    const uint8x16_t pairs = vorrq_u8(vcombine_u8(vzip1_u8(twice, twice), vzip2_u8(twice, twice)), second);
    vst1q_u16(to, vreinterpretq_u16_u8(vqtbl1q_u8(vreinterpretq_u8_u16(vld1q_u16(p)), pairs)));
    p += __builtin_popcount(bits);
  };
  eight(mask & 255, out.v);
  eight(mask >> 8 & 255, out.v + 8);
#else
  for (int i = 0; i < 16; ++i) {
    const uint32_t bit = mask >> i & 1;
    out.v[i] = bit ? *p : uint16_t{0};
    p += bit;
  }
#endif
  return out;
}

PENJING_INLINE F16 expand_bf16(const uint16_t *p, uint32_t mask) { return from_bf16(expand_words(p, mask).v); }

PENJING_INLINE F16 expand_f16(const uint16_t *p, uint32_t mask) { return from_f16(expand_words(p, mask).v); }

#if defined(PENJING_NEON)

using Codes = B64; // sixteen codes of each of four columns

PENJING_INLINE Codes expand_bytes(const int8_t *p, uint64_t mask) {
  const auto kept = [&](int at) __attribute__((always_inline)) { return vreinterpretq_u8_s8(vld1q_s8(p + at)); };
  const uint8x16_t none = vdupq_n_u8(0);
  return spread({kept(0), kept(16), kept(32), kept(48)}, mask, {none, none, none, none});
}

PENJING_INLINE Codes expand_nibbles(const uint8_t *p, uint64_t mask) {
  const auto *bytes = reinterpret_cast<const int8_t *>(p);
  const int8x16_t first = vld1q_s8(bytes), second = vld1q_s8(bytes + 16);
  const auto low = [](int8x16_t v) __attribute__((always_inline)) { return vshrq_n_s8(vshlq_n_s8(v, 4), 4); };
  const auto zip = [](int8x16_t l, int8x16_t h, bool end) __attribute__((always_inline)) {
    return vreinterpretq_u8_s8(end ? vzip2q_s8(l, h) : vzip1q_s8(l, h));
  };
  const int8x16_t lows[2] = {low(first), low(second)}, highs[2] = {vshrq_n_s8(first, 4), vshrq_n_s8(second, 4)};
  const uint8x16_t none = vdupq_n_u8(0);
  return spread({zip(lows[0], highs[0], false), zip(lows[0], highs[0], true), zip(lows[1], highs[1], false),
                 zip(lows[1], highs[1], true)},
                mask, {none, none, none, none});
}

template <int k>
PENJING_INLINE F16 column(Codes codes) {
  const uint8x16_t one = k == 0 ? codes.a : k == 1 ? codes.b : k == 2 ? codes.c : codes.d;
  return to_float(widened(vreinterpretq_s8_u8(one)));
}

#else

struct Codes {
  int8_t v[64]; // sixteen codes of each of four columns
};

PENJING_INLINE Codes expand_bytes(const int8_t *p, uint64_t mask) {
  Codes out;
#if defined(__AVX2__)
  for (int i = 0; i < 64; i += 8) {
    const uint64_t places = _pdep_u64(mask >> i & 255, 0x0101010101010101u) * 255;
    uint64_t kept;
    std::memcpy(&kept, p, sizeof kept);
    kept = _pdep_u64(kept, places);
    std::memcpy(out.v + i, &kept, sizeof kept);
    p += __builtin_popcountll(mask >> i & 255);
  }
#else
  for (int i = 0; i < 64; ++i) {
    const uint64_t bit = mask >> i & 1;
    out.v[i] = bit ? *p : int8_t{0};
    p += bit;
  }
#endif
  return out;
}

PENJING_INLINE Codes expand_nibbles(const uint8_t *p, uint64_t mask) {
  int8_t codes[72];
  for (int i = 0; i < 32; ++i) {
    codes[2 * i] = static_cast<int8_t>(static_cast<int8_t>(p[i] << 4) >> 4);
    codes[2 * i + 1] = static_cast<int8_t>(static_cast<int8_t>(p[i]) >> 4);
  }
  std::memset(codes + 64, 0, 8);
  return expand_bytes(codes, mask);
}

template <int k>
PENJING_INLINE F16 column(const Codes &codes) {
  return from_int8(codes.v + k * 16);
}

#endif

#endif

} // namespace penjing::PENJING_ISA
