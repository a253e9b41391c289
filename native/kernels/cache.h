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

// Keys as panels, [element][16], of which the first `panels` are wanted; in `tile`, or where they are.
inline const float *float_keys(const KvHead &h, const uint8_t *part, int panels, float *tile) {
  if (h.type == KvType::f32)
    return reinterpret_cast<const float *>(part);
  if (h.type == KvType::f16 || h.type == KvType::bf16) {
    widen(h.type, reinterpret_cast<const uint16_t *>(part), panels * h.key_rows, tile);
    return tile;
  }
  const uint8_t *from = part;
  float *to = tile;
  for (int panel = 0; panel < panels; ++panel)
    for (int first = 0; first < h.key_rows; first += kv_group) {
      const auto *steps = reinterpret_cast<const uint16_t *>(part + h.key_steps) + first + panel * lanes;
      const F16 step = from_bf16(steps);
      const int count = h.key_rows - first < kv_group ? h.key_rows - first : kv_group;
      if (h.type == KvType::int8)
        for (int i = 0; i < count; ++i, from += lanes, to += lanes)
          store(to, mul(from_int8(reinterpret_cast<const int8_t *>(from)), step));
      else
        for (int i = 0; i < count; i += 2, from += lanes, to += 2 * lanes) {
          const I16 both = iload_bytes(from);
          store(to, mul(code<4, 0>(both), step));
          store(to + lanes, mul(code<4, 4>(both), step));
        }
    }
  return tile;
}

// Values [position][value_stride], of which the first `count` positions are wanted.
inline const float *float_values(const KvHead &h, const uint8_t *part, int count, float *tile) {
  const uint8_t *from = part + h.values;
  if (h.type == KvType::f32)
    return reinterpret_cast<const float *>(from);
  if (h.type == KvType::f16 || h.type == KvType::bf16) {
    widen(h.type, reinterpret_cast<const uint16_t *>(from), count * h.value_stride / lanes, tile);
    return tile;
  }
  const auto *step = reinterpret_cast<const uint16_t *>(part + h.value_steps);
  float *to = tile;
  for (int position = 0; position < count; ++position)
    for (int first = 0; first < h.value_stride; first += kv_group, ++step) {
      const uint32_t bits = static_cast<uint32_t>(*step) << 16;
      float each;
      std::memcpy(&each, &bits, sizeof each);
      if (h.type == KvType::int8)
        for (int i = first; i < h.value_stride && i < first + kv_group; i += lanes, from += lanes, to += lanes)
          store(to, mul(from_int8(reinterpret_cast<const int8_t *>(from)), splat(each)));
      else {
        const I16 both = iload_bytes(from);
        store(to, mul(code<4, 0>(both), splat(each)));
        store(to + lanes, mul(code<4, 4>(both), splat(each)));
        from += lanes, to += 2 * lanes;
      }
    }
  return tile;
}

} // namespace penjing::PENJING_ISA
