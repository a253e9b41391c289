// Keys and values of a cached block as floats.
#pragma once

#include "kernels/cached.h"
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {

PENJING_INLINE void widen(KvType type, const uint16_t *from, int vectors, float *to) {
  if (type == KvType::f16)
    for (int i = 0; i < vectors; ++i)
      store(to + i * lanes, from_f16(from + i * lanes));
  else
    for (int i = 0; i < vectors; ++i)
      store(to + i * lanes, from_bf16(from + i * lanes));
}

PENJING_INLINE F16 int8_code(const uint8_t *p) { return from_int8(reinterpret_cast<const int8_t *>(p)); }

// `vectors` vectors of codes with one step, an even number of int4.
template <KvType type>
PENJING_INLINE void decode(const uint8_t *&from, int vectors, F16 step, float *&to) {
  if constexpr (type == KvType::int8)
    for (int i = 0; i < vectors; ++i, from += lanes, to += lanes)
      store(to, mul(int8_code(from), step));
  else
    for (int i = 0; i < vectors; i += 2, from += lanes, to += 2 * lanes) {
      const I16 both = iload_bytes(from);
      store(to, mul(code<4, 0>(both), step));
      store(to + lanes, mul(code<4, 4>(both), step));
    }
}

template <KvType type>
void decode_keys(const uint8_t *from, const uint16_t *steps, int panels, int rows, float *to) {
  for (int panel = 0; panel < panels; ++panel, steps += lanes) {
    int first = 0;
    for (; first + kv_group <= rows; first += kv_group)
      decode<type>(from, kv_group, from_bf16(steps + first), to);
    if (first < rows)
      decode<type>(from, rows - first, from_bf16(steps + first), to);
  }
}

template <KvType type>
void decode_values(const uint8_t *from, const uint16_t *steps, int count, int stride, float *to) {
  const auto step = [&steps] {
    const uint32_t bits = static_cast<uint32_t>(*steps++) << 16;
    float each;
    std::memcpy(&each, &bits, sizeof each);
    return splat(each);
  };
  for (int position = 0; position < count; ++position) {
    int first = 0;
    for (; first + kv_group <= stride; first += kv_group)
      decode<type>(from, kv_group / lanes, step(), to);
    if (first < stride) // int8 alone
      decode<type>(from, 1, step(), to);
  }
}

// Keys as panels, [element][16], of which the first `panels` are wanted; in `tile`, or where they are.
inline const float *float_keys(const KvHead &h, const uint8_t *part, int panels, float *tile) {
  const auto *steps = reinterpret_cast<const uint16_t *>(part + h.key_steps);
  switch (h.type) {
  case KvType::f32: return reinterpret_cast<const float *>(part);
  case KvType::int8: decode_keys<KvType::int8>(part, steps, panels, h.key_rows, tile); break;
  case KvType::int4: decode_keys<KvType::int4>(part, steps, panels, h.key_rows, tile); break;
  default: widen(h.type, reinterpret_cast<const uint16_t *>(part), panels * h.key_rows, tile);
  }
  return tile;
}

// Values [position][value_stride], of which the first `count` positions are wanted.
inline const float *float_values(const KvHead &h, const uint8_t *part, int count, float *tile) {
  const uint8_t *from = part + h.values;
  const auto *steps = reinterpret_cast<const uint16_t *>(part + h.value_steps);
  switch (h.type) {
  case KvType::f32: return reinterpret_cast<const float *>(from);
  case KvType::int8: decode_values<KvType::int8>(from, steps, count, h.value_stride, tile); break;
  case KvType::int4: decode_values<KvType::int4>(from, steps, count, h.value_stride, tile); break;
  default: widen(h.type, reinterpret_cast<const uint16_t *>(from), count * h.value_stride / lanes, tile);
  }
  return tile;
}

} // namespace penjing::PENJING_ISA
