// The vocabulary of simd.h for 64-bit Arm with dot products: sixteen lanes are four of its thirty-two registers.
#pragma once

#include <arm_neon.h>

namespace penjing::PENJING_ISA {

template <class V>
struct Quarters {
  V a, b, c, d;
};
using F16 = Quarters<float32x4_t>;
using I16 = Quarters<int32x4_t>;

// A function of registers, register by register.
template <auto use, class... V>
PENJING_INLINE auto each(const Quarters<V> &...v) -> Quarters<decltype(use(v.a...))> {
  return {use(v.a...), use(v.b...), use(v.c...), use(v.d...)};
}

// The same register four times.
template <class V>
PENJING_INLINE Quarters<V> all_of(V v) {
  return {v, v, v, v};
}

PENJING_INLINE F16 splat(float x) { return all_of(vdupq_n_f32(x)); }
PENJING_INLINE F16 zero() { return splat(0); }
PENJING_INLINE F16 load(const float *p) {
  return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
}
PENJING_INLINE void store(float *p, F16 v) {
  vst1q_f32(p, v.a);
  vst1q_f32(p + 4, v.b);
  vst1q_f32(p + 8, v.c);
  vst1q_f32(p + 12, v.d);
}
PENJING_INLINE F16 add(F16 a, F16 b) { return each<vaddq_f32>(a, b); }
PENJING_INLINE F16 sub(F16 a, F16 b) { return each<vsubq_f32>(a, b); }
PENJING_INLINE F16 mul(F16 a, F16 b) { return each<vmulq_f32>(a, b); }
PENJING_INLINE F16 div(F16 a, F16 b) { return each<vdivq_f32>(a, b); }
PENJING_INLINE F16 fma(F16 a, F16 b, F16 c) { return each<vfmaq_f32>(c, a, b); }
// By comparison, as elsewhere: the processor's own minimum keeps a NaN of either.
PENJING_INLINE float32x4_t lesser_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
PENJING_INLINE float32x4_t greater_of(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
PENJING_INLINE F16 min(F16 a, F16 b) { return each<lesser_of>(a, b); }
PENJING_INLINE F16 max(F16 a, F16 b) { return each<greater_of>(a, b); }
PENJING_INLINE float32x4_t four_bf16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
PENJING_INLINE F16 from_bf16(const uint16_t *p) {
  return {four_bf16(p), four_bf16(p + 4), four_bf16(p + 8), four_bf16(p + 12)};
}
PENJING_INLINE float32x4_t four_f16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
PENJING_INLINE F16 from_f16(const uint16_t *p) {
  return {four_f16(p), four_f16(p + 4), four_f16(p + 8), four_f16(p + 12)};
}
PENJING_INLINE void store_f16(uint16_t *p, F16 v) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v.a)));
  vst1_u16(p + 4, vreinterpret_u16_f16(vcvt_f16_f32(v.b)));
  vst1_u16(p + 8, vreinterpret_u16_f16(vcvt_f16_f32(v.c)));
  vst1_u16(p + 12, vreinterpret_u16_f16(vcvt_f16_f32(v.d)));
}
PENJING_INLINE uint16x4_t four_to_bf16(float32x4_t x) {
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(x, x), rounded, vdupq_n_u32(0x7fc00000)), 16);
}
PENJING_INLINE void store_bf16(uint16_t *p, F16 v) {
  vst1_u16(p, four_to_bf16(v.a));
  vst1_u16(p + 4, four_to_bf16(v.b));
  vst1_u16(p + 8, four_to_bf16(v.c));
  vst1_u16(p + 12, four_to_bf16(v.d));
}
template <int first>
PENJING_INLINE float32x4_t four_kept(uint32x4_t mask, float32x4_t v) {
  const uint32x4_t bit = {1u << first, 2u << first, 4u << first, 8u << first};
  return vreinterpretq_f32_u32(vandq_u32(vtstq_u32(mask, bit), vreinterpretq_u32_f32(v)));
}
PENJING_INLINE F16 keep(uint32_t mask, F16 v) {
  const uint32x4_t all = vdupq_n_u32(mask);
  return {four_kept<0>(all, v.a), four_kept<4>(all, v.b), four_kept<8>(all, v.c), four_kept<12>(all, v.d)};
}

PENJING_INLINE I16 isplat(int32_t x) { return all_of(vdupq_n_s32(x)); }
PENJING_INLINE I16 izero() { return isplat(0); }
PENJING_INLINE I16 iload(const void *p) {
  const auto *from = static_cast<const int8_t *>(p);
  const auto four = [&](int at) __attribute__((always_inline)) { return vreinterpretq_s32_s8(vld1q_s8(from + at)); };
  return {four(0), four(16), four(32), four(48)};
}
PENJING_INLINE void istore(void *p, I16 v) {
  auto *to = static_cast<int8_t *>(p);
  vst1q_s8(to, vreinterpretq_s8_s32(v.a));
  vst1q_s8(to + 16, vreinterpretq_s8_s32(v.b));
  vst1q_s8(to + 32, vreinterpretq_s8_s32(v.c));
  vst1q_s8(to + 48, vreinterpretq_s8_s32(v.d));
}
PENJING_INLINE I16 widened(int8x16_t v) {
  const int16x8_t low = vmovl_s8(vget_low_s8(v)), high = vmovl_high_s8(v);
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
PENJING_INLINE I16 iload_bytes(const uint8_t *p) {
  const uint8x16_t v = vld1q_u8(p);
  const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v)));
  const int16x8_t high = vreinterpretq_s16_u16(vmovl_high_u8(v));
  return {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
}
PENJING_INLINE I16 iadd(I16 a, I16 b) { return each<vaddq_s32>(a, b); }
PENJING_INLINE I16 isub(I16 a, I16 b) { return each<vsubq_s32>(a, b); }
PENJING_INLINE I16 imul(I16 a, I16 b) { return each<vmulq_s32>(a, b); }
PENJING_INLINE I16 imax(I16 a, I16 b) { return each<vmaxq_s32>(a, b); }
PENJING_INLINE I16 ior(I16 a, I16 b) { return each<vorrq_s32>(a, b); }
PENJING_INLINE int32x4_t four_magnitudes(float32x4_t v) { return vreinterpretq_s32_f32(vabsq_f32(v)); }
PENJING_INLINE I16 magnitude_bits(F16 v) { return each<four_magnitudes>(v); }
template <int n>
PENJING_INLINE int32x4_t four_shifted(int32x4_t v) {
  return vshlq_n_s32(v, n);
}
template <int n>
PENJING_INLINE I16 shift_left(I16 v) {
  return each<four_shifted<n>>(v);
}
PENJING_INLINE F16 to_float(I16 v) { return each<vcvtq_f32_s32>(v); }
PENJING_INLINE F16 as_float(I16 v) { return each<vreinterpretq_f32_s32>(v); }
PENJING_INLINE I16 round(F16 v) { return each<vcvtnq_s32_f32>(v); }
PENJING_INLINE F16 from_int8(const int8_t *p) { return to_float(widened(vld1q_s8(p))); }
PENJING_INLINE void store_int8(int8_t *p, I16 v) { // the low bytes
  const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(v.a), vreinterpretq_s16_s32(v.b));
  const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(v.c), vreinterpretq_s16_s32(v.d));
  vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
}
template <int bits, int shift>
PENJING_INLINE int32x4_t four_codes(int32x4_t v) { // the field to the top, and back with its sign turned
  const int32x4_t top = vshlq_n_s32(v, 32 - bits - shift);
  return vshrq_n_s32(veorq_s32(top, vdupq_n_s32(INT32_MIN)), 32 - bits);
}
template <int bits, int shift>
PENJING_INLINE F16 code(I16 v) {
  return to_float(each<four_codes<bits, shift>>(v));
}

// Sixty-four bytes, and the dot products of their fours with the same signed four for all.
using B64 = Quarters<uint8x16_t>;
PENJING_INLINE int8x16_t fours(const void *p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// There is no product of unsigned and signed bytes: x counts as less by 128.
constexpr int dot4_less = 128;
using Quads = I16;
PENJING_INLINE Quads quads(const int8_t *p) { return iload(p); }
PENJING_INLINE I16 dot4(I16 sum, const uint8_t *x, Quads w) {
  const int8x16_t four = veorq_s8(fours(x), vdupq_n_s8(INT8_MIN));
  return each<vdotq_s32>(sum, each<vreinterpretq_s8_s32>(w), all_of(four));
}

// Of each mask of eight bits: which kept byte goes to each place; 128 where none does.
struct Places {
  uint8_t of[256][8];
};
constexpr Places places_of_masks() {
  Places places{};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0, kept = 0; i < 8; ++i)
      places.of[mask][i] = static_cast<uint8_t>(mask >> i & 1 ? kept++ : 128);
  return places;
}
alignas(64) constexpr Places places = places_of_masks();

// Where the kept bytes of sixteen places are; `before`: how many come before each eight.
template <int part>
PENJING_INLINE uint8x16_t kept_at(uint64_t mask, uint8x16_t before) {
  const uint8x8_t low = vld1_u8(places.of[mask >> 16 * part & 255]);
  const uint8x8_t high = vld1_u8(places.of[mask >> (16 * part + 8) & 255]);
  const uint8x16_t halves = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  return vaddq_u8(vcombine_u8(low, high), vqtbl1q_u8(vextq_u8(before, before, 2 * part), halves));
}
// Kept bytes over the places of the mask; the others stay as in `rest`. No byte moves down.
PENJING_INLINE B64 spread(B64 kept, uint64_t mask, B64 rest) {
  const uint64_t counts = vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(vcreate_u8(mask))), 0);
  const uint8x16_t before = vreinterpretq_u8_u64(vdupq_n_u64(counts * 0x0101010101010100u));
  return {vqtbx1q_u8(rest.a, kept.a, kept_at<0>(mask, before)),
          vqtbx2q_u8(rest.b, {{kept.a, kept.b}}, kept_at<1>(mask, before)),
          vqtbx3q_u8(rest.c, {{kept.a, kept.b, kept.c}}, kept_at<2>(mask, before)),
          vqtbx4q_u8(rest.d, {{kept.a, kept.b, kept.c, kept.d}}, kept_at<3>(mask, before))};
}

} // namespace penjing::PENJING_ISA
