// Sixteen lanes at a time, in the instruction set that the file including this is compiled for.
//
//   F16   sixteen float32        I16   sixteen int32
//
// The kernels are written once in these; CMake compiles them once for each instruction set, in a namespace of its
// own (PENJING_ISA), so that no function compiled for a newer processor is ever linked into an older one's path.
// For the same reason those files use no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define PENJING_INLINE inline __attribute__((always_inline))

namespace penjing::PENJING_ISA {

#if defined(__AVX512VNNI__)

using F16 = __m512;
using I16 = __m512i;

PENJING_INLINE F16 zero() { return _mm512_setzero_ps(); }
PENJING_INLINE F16 splat(float x) { return _mm512_set1_ps(x); }
PENJING_INLINE F16 load(const float *p) { return _mm512_loadu_ps(p); }
PENJING_INLINE F16 load(const float *p, int n) { return _mm512_maskz_loadu_ps(_bzhi_u32(0xffff, n), p); }
PENJING_INLINE void store(float *p, F16 v) { _mm512_storeu_ps(p, v); }
PENJING_INLINE void store(float *p, F16 v, int n) { _mm512_mask_storeu_ps(p, _bzhi_u32(0xffff, n), v); }
PENJING_INLINE F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
PENJING_INLINE F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
PENJING_INLINE F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
PENJING_INLINE F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
PENJING_INLINE F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
// Of a NaN in a, b remains.
PENJING_INLINE F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
PENJING_INLINE F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
PENJING_INLINE float least(F16 v) { return _mm512_reduce_min_ps(v); }
PENJING_INLINE float greatest(F16 v) { return _mm512_reduce_max_ps(v); }
PENJING_INLINE F16 from_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))), 16));
}
PENJING_INLINE F16 from_f16(const uint16_t *p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
}
// Rounded to nearest, ties to even; a NaN stays one.
PENJING_INLINE void store_f16(uint16_t *p, F16 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
PENJING_INLINE void store_bf16(uint16_t *p, F16 v) {
  const I16 bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I16 rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 none = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const I16 kept = _mm512_mask_mov_epi32(rounded, none, _mm512_set1_epi32(0x7fc00000));
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
PENJING_INLINE F16 from_int8(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))));
}
// Zero where the mask has no bit.
PENJING_INLINE F16 keep(uint32_t mask, F16 v) { return _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), v); }

PENJING_INLINE I16 izero() { return _mm512_setzero_si512(); }
PENJING_INLINE I16 isplat(int32_t x) { return _mm512_set1_epi32(x); }
PENJING_INLINE I16 iload(const void *p) { return _mm512_loadu_si512(p); }
PENJING_INLINE void istore(void *p, I16 v) { _mm512_storeu_si512(p, v); }
PENJING_INLINE I16 iload_bytes(const uint8_t *p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
}
PENJING_INLINE I16 iadd(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
PENJING_INLINE I16 isub(I16 a, I16 b) { return _mm512_sub_epi32(a, b); }
PENJING_INLINE I16 imul(I16 a, I16 b) { return _mm512_mullo_epi32(a, b); }
PENJING_INLINE I16 imax(I16 a, I16 b) { return _mm512_max_epi32(a, b); }
PENJING_INLINE int32_t greatest(I16 v) { return _mm512_reduce_max_epi32(v); }
PENJING_INLINE int32_t total(I16 v) { return _mm512_reduce_add_epi32(v); }
// The bits of |v|: in the order of the magnitudes, and above them all those of a NaN.
PENJING_INLINE I16 magnitude_bits(F16 v) { return _mm512_castps_si512(_mm512_abs_ps(v)); }
PENJING_INLINE I16 ior(I16 a, I16 b) { return _mm512_or_si512(a, b); }
template <int n>
PENJING_INLINE I16 shift_left(I16 v) {
  return _mm512_slli_epi32(v, n);
}
PENJING_INLINE F16 to_float(I16 v) { return _mm512_cvtepi32_ps(v); }
PENJING_INLINE F16 as_float(I16 v) { return _mm512_castsi512_ps(v); } // the same bits
PENJING_INLINE I16 round(F16 v) { return _mm512_cvtps_epi32(v); }     // to nearest, ties to even
PENJING_INLINE void store_int8(int8_t *p, I16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(v));
}
PENJING_INLINE void store_int8(int8_t *p, I16 v, int n) {
  _mm512_mask_cvtepi32_storeu_epi8(p, _bzhi_u32(0xffff, n), v);
}

// The code in bits [shift, shift + bits) of each lane, less 2^(bits − 1): one look-up in a register.
template <int bits, int shift>
PENJING_INLINE F16 code(I16 v) {
  constexpr int m = (1 << bits) - 1, h = 1 << (bits - 1);
  const F16 values = _mm512_setr_ps((0 & m) - h, (1 & m) - h, (2 & m) - h, (3 & m) - h, (4 & m) - h, (5 & m) - h,
                                    (6 & m) - h, (7 & m) - h, (8 & m) - h, (9 & m) - h, (10 & m) - h, (11 & m) - h,
                                    (12 & m) - h, (13 & m) - h, (14 & m) - h, (15 & m) - h);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(v, shift), values);
}

// Adds to each lane the products of four unsigned bytes (the same for all lanes) and its own four signed bytes.
PENJING_INLINE I16 dot4(I16 sum, const uint8_t *x, I16 weight) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(quad), weight);
}
using Quads = I16;           // sixteen lanes of four signed bytes, as dot4 wants them
constexpr int dot4_less = 0; // what dot4 takes from each byte of x
PENJING_INLINE Quads quads(const int8_t *p) { return iload(p); }

#else

#if defined(PENJING_NEON)
} // namespace penjing::PENJING_ISA
#include "kernels/neon.h"
namespace penjing::PENJING_ISA {

#elif defined(__AVX2__)

constexpr int dot4_less = 0;
struct F16 {
  __m256 a, b;
};
struct I16 {
  __m256i a, b;
};

PENJING_INLINE F16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
PENJING_INLINE F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PENJING_INLINE F16 load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PENJING_INLINE void store(float *p, F16 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
PENJING_INLINE F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.a, b.a), _mm256_add_ps(a.b, b.b)}; }
PENJING_INLINE F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.a, b.a), _mm256_sub_ps(a.b, b.b)}; }
PENJING_INLINE F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.a, b.a), _mm256_mul_ps(a.b, b.b)}; }
PENJING_INLINE F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.a, b.a), _mm256_div_ps(a.b, b.b)}; }
PENJING_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm256_fmadd_ps(a.a, b.a, c.a), _mm256_fmadd_ps(a.b, b.b, c.b)}; }
PENJING_INLINE F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.a, b.a), _mm256_min_ps(a.b, b.b)}; }
PENJING_INLINE F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.a, b.a), _mm256_max_ps(a.b, b.b)}; }
PENJING_INLINE __m256i halves(const void *p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p)));
}
PENJING_INLINE F16 from_bf16(const uint16_t *p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(halves(p), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(halves(p + 8), 16))};
}
PENJING_INLINE F16 from_f16(const uint16_t *p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p + 8)))};
}
PENJING_INLINE void store_f16(uint16_t *p, F16 v) {
  constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(v.a, nearest));
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8), _mm256_cvtps_ph(v.b, nearest));
}
PENJING_INLINE void store_bf16(uint16_t *p, F16 v) {
  const auto upper = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 none = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(none)), 16);
  };
  _mm256_storeu_si256(reinterpret_cast<__m256i *>(p),
                      _mm256_permute4x64_epi64(_mm256_packus_epi32(upper(v.a), upper(v.b)), 0xd8));
}
PENJING_INLINE __m256i lane_mask(uint32_t mask) { // all bits of lane i where bit i is set
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit), bit);
}
PENJING_INLINE F16 keep(uint32_t mask, F16 v) {
  return {_mm256_and_ps(v.a, _mm256_castsi256_ps(lane_mask(mask))),
          _mm256_and_ps(v.b, _mm256_castsi256_ps(lane_mask(mask >> 8)))};
}
PENJING_INLINE I16 izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
PENJING_INLINE I16 isplat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
PENJING_INLINE __m256i load256(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
PENJING_INLINE I16 iload(const void *p) { return {load256(p), load256(static_cast<const char *>(p) + 32)}; }
PENJING_INLINE void istore(void *p, I16 v) {
  _mm256_storeu_si256(static_cast<__m256i *>(p), v.a);
  _mm256_storeu_si256(static_cast<__m256i *>(p) + 1, v.b);
}
PENJING_INLINE __m128i eight(const void *p) { return _mm_loadl_epi64(static_cast<const __m128i *>(p)); }
PENJING_INLINE I16 iload_bytes(const uint8_t *p) {
  return {_mm256_cvtepu8_epi32(eight(p)), _mm256_cvtepu8_epi32(eight(p + 8))};
}
PENJING_INLINE I16 iadd(I16 a, I16 b) { return {_mm256_add_epi32(a.a, b.a), _mm256_add_epi32(a.b, b.b)}; }
PENJING_INLINE I16 isub(I16 a, I16 b) { return {_mm256_sub_epi32(a.a, b.a), _mm256_sub_epi32(a.b, b.b)}; }
PENJING_INLINE I16 imul(I16 a, I16 b) { return {_mm256_mullo_epi32(a.a, b.a), _mm256_mullo_epi32(a.b, b.b)}; }
PENJING_INLINE I16 imax(I16 a, I16 b) { return {_mm256_max_epi32(a.a, b.a), _mm256_max_epi32(a.b, b.b)}; }
PENJING_INLINE I16 magnitude_bits(F16 v) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_castps_si256(_mm256_and_ps(v.a, mask)), _mm256_castps_si256(_mm256_and_ps(v.b, mask))};
}
PENJING_INLINE I16 ior(I16 a, I16 b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
template <int n>
PENJING_INLINE I16 shift_left(I16 v) {
  return {_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n)};
}
PENJING_INLINE F16 to_float(I16 v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
PENJING_INLINE F16 as_float(I16 v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
PENJING_INLINE I16 round(F16 v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
PENJING_INLINE F16 from_int8(const int8_t *p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(p))), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(p + 8)))};
}
PENJING_INLINE void store_int8(int8_t *p, I16 v) {
  const __m256i byte = _mm256_set1_epi32(255);
  const __m256i pairs = _mm256_packs_epi32(_mm256_and_si256(v.a, byte), _mm256_and_si256(v.b, byte));
  const __m256i words = _mm256_permute4x64_epi64(pairs, 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p),
                   _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
template <int bits, int shift>
PENJING_INLINE __m256 code_half(__m256i v) {
  const __m256i low = _mm256_and_si256(_mm256_srli_epi32(v, shift), _mm256_set1_epi32((1 << bits) - 1));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(low, _mm256_set1_epi32(1 << (bits - 1))));
}
template <int bits, int shift>
PENJING_INLINE F16 code(I16 v) {
  return {code_half<bits, shift>(v.a), code_half<bits, shift>(v.b)};
}

#if defined(__AVXVNNI__)
using Quads = I16;
PENJING_INLINE Quads quads(const int8_t *p) { return iload(p); }
PENJING_INLINE I16 dot4(I16 sum, const uint8_t *x, Quads weight) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  const __m256i each = _mm256_set1_epi32(quad);
  return {_mm256_dpbusd_avx_epi32(sum.a, each, weight.a), _mm256_dpbusd_avx_epi32(sum.b, each, weight.b)};
}
#else
// Bytes as two vectors of words, so that the products of unsigned and signed bytes are exact (maddubs saturates).
struct Quads {
  I16 even, odd;
};
PENJING_INLINE Quads quads(const int8_t *p) {
  const I16 v = iload(p);
  const auto even = [](__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); };
  return {{even(v.a), even(v.b)}, {_mm256_srai_epi16(v.a, 8), _mm256_srai_epi16(v.b, 8)}};
}
PENJING_INLINE I16 dot4(I16 sum, const uint8_t *x, Quads weight) {
  int32_t quad;
  std::memcpy(&quad, x, 4);
  const __m256i even = _mm256_set1_epi32(quad & 0x00ff00ff), odd = _mm256_set1_epi32((quad >> 8) & 0x00ff00ff);
  const auto both = [&](__m256i s, __m256i e, __m256i o) {
    return _mm256_add_epi32(s, _mm256_add_epi32(_mm256_madd_epi16(e, even), _mm256_madd_epi16(o, odd)));
  };
  return {both(sum.a, weight.even.a, weight.odd.a), both(sum.b, weight.even.b, weight.odd.b)};
}
#endif

#else // the compiler's own vectors: it makes of them what the processor has

constexpr int dot4_less = 0;
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t Words __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int8_t SignedBytes __attribute__((vector_size(16)));

template <class V>
PENJING_INLINE V load_as(const void *p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
PENJING_INLINE F16 splat(float x) { return F16{} + x; }
PENJING_INLINE F16 zero() { return F16{}; }
PENJING_INLINE F16 load(const float *p) { return load_as<F16>(p); }
PENJING_INLINE void store(float *p, F16 v) { std::memcpy(p, &v, sizeof v); }
PENJING_INLINE F16 add(F16 a, F16 b) { return a + b; }
PENJING_INLINE F16 sub(F16 a, F16 b) { return a - b; }
PENJING_INLINE F16 mul(F16 a, F16 b) { return a * b; }
PENJING_INLINE F16 div(F16 a, F16 b) { return a / b; }
PENJING_INLINE F16 fma(F16 a, F16 b, F16 c) { return a * b + c; }
PENJING_INLINE F16 min(F16 a, F16 b) { return a < b ? a : b; }
PENJING_INLINE F16 max(F16 a, F16 b) { return a > b ? a : b; }
PENJING_INLINE U16 halves(const uint16_t *p) { return __builtin_convertvector(load_as<Words>(p), U16); }
PENJING_INLINE F16 from_bf16(const uint16_t *p) { return (F16)(halves(p) << 16); }
// Through the float whose exponent is 112 less (exact, also for what is subnormal in half precision).
PENJING_INLINE F16 from_f16(const uint16_t *p) {
  const U16 all = halves(p), sign = (all & 0x8000u) << 16, rest = (all & 0x7fffu) << 13;
  const U16 finite = (U16)((F16)rest * 0x1p112f);
  return (F16)((rest >= (0x7c00u << 13) ? (rest | 0x7f800000u) : finite) | sign);
}
PENJING_INLINE void store_words(uint16_t *p, U16 v) {
  const Words words = __builtin_convertvector(v, Words);
  std::memcpy(p, &words, sizeof words);
}
PENJING_INLINE void store_f16(uint16_t *p, F16 v) {
  const U16 bits = (U16)v, sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  // What is subnormal has a last bit of 2^-24, as the floats from 0.5 to 1; 65520 and more are infinite.
  const U16 subnormal = (U16)((F16)rest + 0.5f) - 0x3f000000u;
  const U16 normal = (rest - (112u << 23) + 0xfffu + (rest >> 13 & 1u)) >> 13;
  const U16 finite = rest < 0x38800000u ? subnormal : normal;
  const U16 most = U16{} + 0x7c00u, none = U16{} + 0x7e00u;
  store_words(p, sign | (rest > 0x7f800000u ? none : rest >= 0x477ff000u ? most : finite));
}
PENJING_INLINE void store_bf16(uint16_t *p, F16 v) {
  const U16 bits = (U16)v, none = U16{} + 0x7fc0u;
  store_words(p, (bits & 0x7fffffffu) > 0x7f800000u ? none : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
PENJING_INLINE F16 keep(uint32_t mask, F16 v) {
  const U16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  return (F16)((mask & bit) != 0 ? (U16)v : U16{});
}
PENJING_INLINE I16 isplat(int32_t x) { return I16{} + x; }
PENJING_INLINE I16 izero() { return I16{}; }
PENJING_INLINE I16 iload(const void *p) { return load_as<I16>(p); }
PENJING_INLINE void istore(void *p, I16 v) { std::memcpy(p, &v, sizeof v); }
PENJING_INLINE I16 iload_bytes(const uint8_t *p) { return __builtin_convertvector(load_as<Bytes>(p), I16); }
// Arithmetic modulo 2^32, as in the vector units.
PENJING_INLINE I16 iadd(I16 a, I16 b) { return (I16)((U16)a + (U16)b); }
PENJING_INLINE I16 isub(I16 a, I16 b) { return (I16)((U16)a - (U16)b); }
PENJING_INLINE I16 imul(I16 a, I16 b) { return (I16)((U16)a * (U16)b); }
PENJING_INLINE I16 imax(I16 a, I16 b) { return a > b ? a : b; }
PENJING_INLINE I16 magnitude_bits(F16 v) { return (I16)v & 0x7fffffff; }
PENJING_INLINE I16 ior(I16 a, I16 b) { return a | b; }
template <int n>
PENJING_INLINE I16 shift_left(I16 v) {
  return (I16)((U16)v << n);
}
PENJING_INLINE F16 to_float(I16 v) { return __builtin_convertvector(v, F16); }
PENJING_INLINE F16 as_float(I16 v) { return (F16)v; }
// Adding 1.5 · 2^23 rounds to nearest even; exact for |x| < 2^22, and every caller has clamped to less.
PENJING_INLINE I16 round(F16 v) { return isub((I16)(v + 0x1.8p23f), (I16)splat(0x1.8p23f)); }
PENJING_INLINE F16 from_int8(const int8_t *p) {
  return to_float(__builtin_convertvector(load_as<SignedBytes>(p), I16));
}
PENJING_INLINE void store_int8(int8_t *p, I16 v) {
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
}
template <int bits, int shift>
PENJING_INLINE F16 code(I16 v) {
  return to_float((I16)((U16)v >> shift & ((1u << bits) - 1)) - (1 << (bits - 1)));
}
using Quads = I16;
PENJING_INLINE Quads quads(const int8_t *p) { return iload(p); }
PENJING_INLINE I16 dot4(I16 sum, const uint8_t *x, Quads w) {
  for (int i = 0; i < 4; ++i)
    sum = iadd(sum, ((I16)((U16)w << (24 - 8 * i)) >> 24) * x[i]);
  return sum;
}

#endif

PENJING_INLINE F16 load(const float *p, int n) {
  float lanes[16] = {};
  std::memcpy(lanes, p, static_cast<size_t>(n) * sizeof *p);
  return load(lanes);
}
PENJING_INLINE void store(float *p, const F16 &v, int n) {
  float lanes[16];
  store(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n) * sizeof *p);
}
PENJING_INLINE void store_int8(int8_t *p, const I16 &v, int n) {
  int8_t lanes[16];
  store_int8(lanes, v);
  std::memcpy(p, lanes, static_cast<size_t>(n));
}
PENJING_INLINE float least(const F16 &v) {
  float lanes[16];
  store(lanes, v);
  for (int i = 1; i < 16; ++i)
    lanes[0] = lanes[i] < lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
PENJING_INLINE float greatest(const F16 &v) {
  float lanes[16];
  store(lanes, v);
  for (int i = 1; i < 16; ++i)
    lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
PENJING_INLINE int32_t greatest(const I16 &v) {
  int32_t lanes[16];
  istore(lanes, v);
  for (int i = 1; i < 16; ++i)
    lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
}
PENJING_INLINE int32_t total(const I16 &v) {
  int32_t lanes[16];
  istore(lanes, v);
  for (int i = 1; i < 16; ++i)
    lanes[0] += lanes[i];
  return lanes[0];
}

#endif

} // namespace penjing::PENJING_ISA
