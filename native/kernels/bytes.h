// Sixty-four unsigned bytes at a time: the codes of sixteen rows × four columns, and their products with signed bytes.
//
//   B64   sixty-four uint8           Quad<wide>   four int8 of x, for all rows
//   dot(sum, w, quad)  sum + the products         dot_at(sum, w, x)   the same with the quad at x, used once
//
// Codes are `wide` when they may exceed 127: where products of bytes are summed in 16 bits, or bytes are signed, those
// need another way. dot counts each code as less by code_less<wide>.
#pragma once

#include "kernels/group.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {

#if defined(__AVX512VNNI__)

using B64 = __m512i;

PENJING_INLINE B64 bload(const void *p) { return _mm512_loadu_si512(p); }
PENJING_INLINE void bstore(void *p, B64 v) { _mm512_storeu_si512(p, v); }
PENJING_INLINE B64 bsplat(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
PENJING_INLINE B64 bor(B64 a, B64 b) { return _mm512_or_si512(a, b); }
// (v >> shift) & mask, or to the left when shift < 0, of each byte.
template <int shift, int mask>
PENJING_INLINE B64 field(B64 v) {
  const B64 moved = shift < 0 ? _mm512_slli_epi16(v, -shift) : shift > 0 ? _mm512_srli_epi16(v, shift) : v;
  return _mm512_and_si512(moved, bsplat(mask));
}
PENJING_INLINE B64 lookup(const uint8_t (&table)[16], B64 index) {
  const __m128i row = _mm_loadu_si128(reinterpret_cast<const __m128i *>(table));
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(row), index);
}
PENJING_INLINE B64 as_bytes(I16 v) { return v; }

template <bool wide>
constexpr int code_less = 0;
template <bool wide>
using Quad = __m512i;
template <bool wide>
PENJING_INLINE Quad<wide> quad(const int8_t *p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}
template <bool wide>
PENJING_INLINE I16 dot(I16 sum, B64 w, Quad<wide> x) {
  return _mm512_dpbusd_epi32(sum, w, x);
}
// In one instruction, which GCC makes three of (a load, and a copy of the sum): 8 % of a product with one row.
template <bool wide>
PENJING_INLINE I16 dot_at(I16 sum, B64 w, const int8_t *x) {
  struct Four {
    int8_t each[4];
  };
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Four *>(x)));
  return sum;
}

// Kept bytes over the places of the mask; the others stay as in `rest`.
PENJING_INLINE B64 expand(const uint8_t *p, uint64_t mask, B64 rest) {
  return _mm512_mask_expand_epi8(rest, mask, bload(p)); // from a register: from memory it is microcode on Zen
}
// Kept nibbles, the low one first. Eight nibbles of each four bytes go to eight bytes in one multishift.
PENJING_INLINE B64 expand_nibbles(const uint8_t *p, uint64_t mask, B64 rest) {
  const B64 fours = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
  const B64 places = _mm512_set1_epi64(0x1c1814100c080400);
  const B64 nibbles = _mm512_and_si512(_mm512_multishift_epi64_epi8(places, fours), bsplat(15));
  return _mm512_mask_expand_epi8(rest, mask, nibbles);
}

#else

#if defined(PENJING_NEON)

PENJING_INLINE B64 bload(const void *p) {
  const auto *from = static_cast<const uint8_t *>(p);
  return {vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)};
}
PENJING_INLINE void bstore(void *p, B64 v) {
  auto *to = static_cast<uint8_t *>(p);
  vst1q_u8(to, v.a);
  vst1q_u8(to + 16, v.b);
  vst1q_u8(to + 32, v.c);
  vst1q_u8(to + 48, v.d);
}
PENJING_INLINE B64 bor(B64 a, B64 b) { return each<vorrq_u8>(a, b); }
template <int shift, int mask>
PENJING_INLINE uint8x16_t quarter_field(uint8x16_t v) {
  if constexpr (shift < 0)
    v = vshlq_n_u8(v, -shift);
  else if constexpr (shift > 0)
    v = vshrq_n_u8(v, shift);
  if constexpr (mask == 255 >> (shift > 0 ? shift : 0)) // nothing else is left
    return v;
  else
    return vandq_u8(v, vdupq_n_u8(mask));
}
template <int shift, int mask>
PENJING_INLINE B64 field(B64 v) {
  return each<quarter_field<shift, mask>>(v);
}
PENJING_INLINE B64 lookup(const uint8_t (&table)[16], B64 index) {
  return each<vqtbl1q_u8>(all_of(vld1q_u8(table)), index);
}
PENJING_INLINE B64 as_bytes(I16 v) { return each<vreinterpretq_u8_s32>(v); }

// Both bytes of a product are signed: codes up to 127 are as they are, wide ones less 128.
template <bool wide>
constexpr int code_less = wide ? 128 : 0;
template <bool wide>
using Quad = int8x16_t;
template <bool wide>
PENJING_INLINE Quad<wide> quad(const int8_t *p) {
  return fours(p);
}
template <bool wide>
PENJING_INLINE I16 dot(I16 sum, B64 w, Quad<wide> x) {
  if constexpr (wide)
    w = each<veorq_u8>(w, all_of(vdupq_n_u8(128)));
  return each<vdotq_s32>(sum, each<vreinterpretq_s8_u8>(w), all_of(x));
}

#elif defined(__AVX2__)

template <bool wide>
constexpr int code_less = 0;

struct B64 {
  __m256i a, b;
};

PENJING_INLINE B64 bload(const void *p) { return {load256(p), load256(static_cast<const char *>(p) + 32)}; }
PENJING_INLINE void bstore(void *p, B64 v) { istore(p, {v.a, v.b}); }
PENJING_INLINE B64 bor(B64 a, B64 b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
template <int shift, int mask>
PENJING_INLINE __m256i half_field(__m256i v) {
  const __m256i moved = shift < 0 ? _mm256_slli_epi16(v, -shift) : shift > 0 ? _mm256_srli_epi16(v, shift) : v;
  return _mm256_and_si256(moved, _mm256_set1_epi8(mask));
}
template <int shift, int mask>
PENJING_INLINE B64 field(B64 v) {
  return {half_field<shift, mask>(v.a), half_field<shift, mask>(v.b)};
}
PENJING_INLINE B64 lookup(const uint8_t (&table)[16], B64 index) {
  const __m256i row = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(table)));
  return {_mm256_shuffle_epi8(row, index.a), _mm256_shuffle_epi8(row, index.b)};
}
PENJING_INLINE B64 as_bytes(I16 v) { return {v.a, v.b}; }

// maddubs sums two products in 16 bits, exact up to codes of 127; wide codes are multiplied as words, the even bytes
// and the odd ones apart.
template <bool wide>
struct Quad {
  __m256i all;
};
#if !defined(__AVXVNNI__)
template <>
struct Quad<true> {
  __m256i even, odd;
};
#endif
template <bool wide>
PENJING_INLINE Quad<wide> quad(const int8_t *p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  const __m256i all = _mm256_set1_epi32(four);
#if !defined(__AVXVNNI__)
  if constexpr (wide)
    return {_mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8), _mm256_srai_epi16(all, 8)};
  else
#endif
    return {all};
}
template <bool wide>
PENJING_INLINE __m256i half_dot(__m256i sum, __m256i w, Quad<wide> x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, w, x.all);
#else
  if constexpr (wide) {
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, x.even), _mm256_madd_epi16(odd, x.odd)));
  } else {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x.all), _mm256_set1_epi16(1)));
  }
#endif
}
template <bool wide>
PENJING_INLINE I16 dot(I16 sum, B64 w, Quad<wide> x) {
  return {half_dot<wide>(sum.a, w.a, x), half_dot<wide>(sum.b, w.b, x)};
}

#else

template <bool wide>
constexpr int code_less = 0;

typedef uint8_t B64 __attribute__((vector_size(64)));
typedef uint16_t Pairs __attribute__((vector_size(64)));

PENJING_INLINE B64 bload(const void *p) { return load_as<B64>(p); }
PENJING_INLINE void bstore(void *p, B64 v) { std::memcpy(p, &v, sizeof v); }
PENJING_INLINE B64 bor(B64 a, B64 b) { return a | b; }
template <int shift, int mask>
PENJING_INLINE B64 field(B64 v) {
  if constexpr (shift < 0)
    return (v << -shift) & static_cast<uint8_t>(mask);
  else
    return (v >> shift) & static_cast<uint8_t>(mask);
}
PENJING_INLINE B64 lookup(const uint8_t (&table)[16], B64 index) {
  uint8_t at[64];
  std::memcpy(at, &index, sizeof at);
  for (uint8_t &byte : at)
    byte = table[byte & 15];
  return bload(at);
}
PENJING_INLINE B64 as_bytes(I16 v) { return (B64)v; }

// A product of bytes fits into 16 bits, of which every machine multiplies vectors: the even bytes and the odd ones
// apart, a pair of each in a lane.
typedef int16_t Halves __attribute__((vector_size(64)));
template <bool wide>
struct Quad {
  int32_t even, odd;
};
template <bool wide>
PENJING_INLINE Quad<wide> quad(const int8_t *p) {
  const auto pair = [](int8_t low, int8_t high) { return (low & 0xffff) | (high * 65536); };
  return {pair(p[0], p[2]), pair(p[1], p[3])};
}
PENJING_INLINE I16 sum_of_pairs(Halves w, int32_t x) {
  const I16 products = (I16)(w * (Halves)isplat(x));
  return iadd(shift_left<16>(products) >> 16, products >> 16);
}
template <bool wide>
PENJING_INLINE I16 dot(I16 sum, B64 w, Quad<wide> x) {
  const I16 even = sum_of_pairs((Halves)((U16)w & 0x00ff00ffu), x.even);
  return iadd(sum, iadd(even, sum_of_pairs((Halves)((Pairs)w >> 8), x.odd)));
}

#endif

template <bool wide>
PENJING_INLINE I16 dot_at(I16 sum, B64 w, const int8_t *x) {
  return dot<wide>(sum, w, quad<wide>(x));
}

#if defined(PENJING_NEON)

PENJING_INLINE B64 expand(const uint8_t *p, uint64_t mask, B64 rest) { return spread(bload(p), mask, rest); }

PENJING_INLINE B64 expand_nibbles(const uint8_t *p, uint64_t mask, B64 rest) {
  const uint8x16_t first = vld1q_u8(p), second = vld1q_u8(p + 16), nibble = vdupq_n_u8(15);
  const uint8x16_t low[2] = {vandq_u8(first, nibble), vandq_u8(second, nibble)};
  const uint8x16_t high[2] = {vshrq_n_u8(first, 4), vshrq_n_u8(second, 4)};
  const B64 kept = {vzip1q_u8(low[0], high[0]), vzip2q_u8(low[0], high[0]), vzip1q_u8(low[1], high[1]),
                    vzip2q_u8(low[1], high[1])};
  return spread(kept, mask, rest);
}

#else

PENJING_INLINE B64 expand(const uint8_t *p, uint64_t mask, B64 rest) {
  uint8_t out[64];
  bstore(out, rest);
#if defined(__AVX2__)
  for (int i = 0; i < 64; i += 8) {
    const uint64_t places = _pdep_u64(mask >> i & 255, 0x0101010101010101u) * 255;
    uint64_t kept, eight;
    std::memcpy(&kept, p, sizeof kept);
    std::memcpy(&eight, out + i, sizeof eight);
    eight = (eight & ~places) | _pdep_u64(kept, places);
    std::memcpy(out + i, &eight, sizeof eight);
    p += __builtin_popcountll(mask >> i & 255);
  }
#else
  for (int i = 0; i < 64; ++i)
    if (mask >> i & 1)
      out[i] = *p++;
#endif
  return bload(out);
}

PENJING_INLINE B64 expand_nibbles(const uint8_t *p, uint64_t mask, B64 rest) {
  uint8_t codes[72];
  for (int i = 0; i < 32; ++i) {
    codes[2 * i] = p[i] & 15;
    codes[2 * i + 1] = p[i] >> 4;
  }
  std::memset(codes + 64, 0, 8);
  return expand(codes, mask, rest);
}

#endif

#endif

template <int n>
struct Which {
  static constexpr int value = n;
};

// Two quads of which two codes of each four are kept (see pair_quads): the v-th such pair of its 128 columns.
#if defined(__AVX512VNNI__)

// Of each lane's four kept codes their columns among eight: a, b of the first quad, a + 4, b + 4 of the second.
PENJING_INLINE B64 pair_columns(B64 places) {
  alignas(64) static constexpr uint16_t columns[32] = {0x0100, 0x0201, 0x0302, 0x0003, 0x0200, 0x0301, 0x0002, 0x0103,
                                                       0x0504, 0x0605, 0x0706, 0x0407, 0x0604, 0x0705, 0x0406, 0x0507,
                                                       0x0100, 0x0201, 0x0302, 0x0003, 0x0200, 0x0301, 0x0002, 0x0103,
                                                       0x0504, 0x0605, 0x0706, 0x0407, 0x0604, 0x0705, 0x0406, 0x0507};
  const B64 second = _mm512_set1_epi32(8 << 16), field = _mm512_set1_epi16(7);
  return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi64(places, field, second, 0xea), bload(columns)); // & |
}

PENJING_INLINE B64 pair_places(const uint8_t *places, int v) {
  if (v < 15)
    return _mm512_srl_epi16(bload(places + 64 * (v / 5)), _mm_cvtsi32_si128(3 * (v % 5)));
  const B64 low = _mm512_srli_epi16(bload(places), 15), middle = _mm512_srli_epi16(bload(places + 64), 15);
  return bor(low, bor(_mm512_slli_epi16(middle, 1), _mm512_slli_epi16(_mm512_srli_epi16(bload(places + 128), 15), 2)));
}

template <class Use>
PENJING_INLINE void expand_pairs(const uint8_t *places, const uint8_t *codes, int v, Use &&use) {
  const B64 nibbles = v & 1 ? field<4, 15>(bload(codes)) : field<0, 15>(bload(codes));
  const B64 columns = pair_columns(pair_places(places, v));
  const auto spread = [&](int quad) __attribute__((always_inline)) {
    const B64 here = _mm512_set1_epi32(0x03020100 + 0x04040404 * quad);
    B64 out = bsplat(pair_zero);
    for (int k = 2 * quad; k < 2 * quad + 2; ++k) {
      const B64 each = _mm512_add_epi8(_mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0), bsplat(k));
      out = _mm512_mask_shuffle_epi8(out, _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(columns, each), here), nibbles,
                                     each);
    }
    return out;
  };
  use(Which<0>{}, spread(0));
  use(Which<1>{}, spread(1));
}

#else

PENJING_INLINE uint32_t pair_place(const uint8_t *places, int v, int i) {
  uint16_t word[3];
  for (int k = 0; k < 3; ++k)
    std::memcpy(word + k, places + 64 * k + 2 * i, 2);
  return v < 15 ? word[v / 5] >> 3 * (v % 5) & 7 : word[0] >> 15 | word[1] >> 15 << 1 | word[2] >> 15 << 2;
}

template <class Use>
PENJING_INLINE void expand_pairs(const uint8_t *places, const uint8_t *codes, int v, Use &&use) {
  uint8_t out[2][64];
  std::memset(out, pair_zero, sizeof out);
  for (int i = 0; i < 32; ++i) {
    const uint32_t place = pair_place(places, v, i), a = place & 3, b = (a + 1 + (place >> 2)) & 3;
    uint8_t *four = out[i % 2] + i / 2 * 4;
    four[a] = codes[2 * i] >> 4 * (v & 1) & 15;
    four[b] = codes[2 * i + 1] >> 4 * (v & 1) & 15;
  }
  use(Which<0>{}, bload(out[0]));
  use(Which<1>{}, bload(out[1]));
}

#endif

// The same four bytes, all equal, in each lane.
PENJING_INLINE B64 lane_bytes(I16 values) { return as_bytes(imul(values, isplat(0x01010101))); }

// How codes are packed. Dense: block(p, use) unpacks `quads` quads from `bytes` bytes and calls use(which, B64) for
// each.
template <GroupCode code>
struct Packed;

template <>
struct Packed<GroupCode::int8> {
  static constexpr bool wide = true;
  static constexpr int quads = 1, bytes = 64;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    use(Which<0>{}, bload(p));
  }
};

// Two quads in a vector, the first in the low nibbles.
template <>
struct Packed<GroupCode::int4> {
  static constexpr bool wide = false;
  static constexpr int quads = 2, bytes = 64;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    const B64 both = bload(p);
    use(Which<0>{}, field<0, 15>(both));
    use(Which<1>{}, field<4, 15>(both));
  }
};

// Twice the value of E2M1 (OCP Microscaling Formats 1.0), plus 12.
template <>
struct Packed<GroupCode::mxfp4> {
  static constexpr bool wide = false;
  static constexpr int quads = 2, bytes = 64;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    constexpr uint8_t twice[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
    Packed<GroupCode::int4>::block(p, [&](auto k, B64 v) __attribute__((always_inline)) { use(k, lookup(twice, v)); });
  }
};

template <>
struct Packed<GroupCode::int2> {
  static constexpr bool wide = false;
  static constexpr int quads = 4, bytes = 64;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    const B64 four = bload(p);
    use(Which<0>{}, field<0, 3>(four));
    use(Which<1>{}, field<2, 3>(four));
    use(Which<2>{}, field<4, 3>(four));
    use(Which<3>{}, field<6, 3>(four));
  }
};

// Eight quads in three vectors: two with the low two bits of four quads each, one with the high bit of all.
template <>
struct Packed<GroupCode::int3> {
  static constexpr bool wide = false;
  static constexpr int quads = 8, bytes = 192;
  template <class Use>
  static PENJING_INLINE void block(const uint8_t *p, Use &&use) {
    const B64 low[2] = {bload(p), bload(p + 64)}, high = bload(p + 128);
    one<0>(low[0], high, use);
    one<1>(low[0], high, use);
    one<2>(low[0], high, use);
    one<3>(low[0], high, use);
    one<4>(low[1], high, use);
    one<5>(low[1], high, use);
    one<6>(low[1], high, use);
    one<7>(low[1], high, use);
  }
  template <int k, class Use>
  static PENJING_INLINE void one(B64 low, B64 high, Use &&use) {
    use(Which<k>{}, bor(field<2 * (k % 4), 3>(low), field<k - 2, 4>(high)));
  }
};

} // namespace penjing::PENJING_ISA
