// Keys and values of one position into a cached block.
#include "kernels/cached.h"
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

PENJING_INLINE F16 some(const float *x, int left) {
  return left >= lanes ? load(x) : left > 0 ? load(x, left) : zero();
}

// What is infinite becomes NaN, so that it spoils results as it would in float32.
void halves(const float *x, int n, KvType type, uint16_t *row) {
  for (int i = 0; i < n; i += lanes) {
    const F16 v = some(x + i, n - i);
    if (type == KvType::bf16)
      store_bf16(row + i, add(v, sub(v, v)));
    else
      store_f16(row + i, add(max(splat(-65504), min(splat(65504), v)), sub(v, v)));
  }
}

// Codes, one a byte, of 32 elements each with a step: int8 of ±127, its largest magnitude / 127; int4 of −8…7, the
// element of largest magnitude / −8, so that one end of the range is exact. An infinite element or a NaN makes the
// step a NaN.
void codes(const float *x, int n, KvType type, int8_t *row, uint16_t *steps, int step_stride) {
  for (int first = 0; first < n; first += kv_group, steps += step_stride) {
    const F16 a = some(x + first, n - first), b = some(x + first + lanes, n - first - lanes);
    const float high = greatest(max(a, b)), low = least(min(a, b));
    const float far = high > -low ? high : low;
    float none[lanes], spoil = 0;
    store(none, add(sub(a, a), sub(b, b)));
    for (float each : none)
      spoil += each;
    const bool wide = type == KvType::int8;
    const float step = far / (wide ? (far > 0 ? 127.0f : -127.0f) : -8.0f) + spoil;
    uint16_t kept[lanes];
    store_bf16(kept, splat(step));
    float exact[lanes];
    store(exact, from_bf16(kept));
    *steps = kept[0];
    const float size = exact[0] < 0 ? -exact[0] : exact[0];
    const F16 inverse = splat(size < 1e-37f ? 0 : 1 / exact[0]);
    const F16 bottom = splat(wide ? -127 : -8), top = splat(wide ? 127 : 7);
    store_int8(row + first, round(max(bottom, min(top, mul(a, inverse)))));
    store_int8(row + first + lanes, round(max(bottom, min(top, mul(b, inverse)))));
  }
}

template <class T>
void spread(const T *row, int n, T *panel) {
  for (int c = 0; c < n; ++c)
    panel[c * lanes] = row[c];
}

uint8_t pair(int8_t low, int8_t high) { return static_cast<uint8_t>((low + 8) | (high + 8) << 4); }

struct Row { // a key or value as it is kept, but for the order
  alignas(64) uint16_t halves[max_kv_dim];
  int8_t codes[max_kv_dim];
};

void write_key(const KvHead &h, uint8_t *part, int position, const float *key, Row &row) {
  const int panel = position / lanes * h.key_rows * lanes, lane = position % lanes;
  auto *steps = reinterpret_cast<uint16_t *>(part + h.key_steps) + position;
  switch (h.type) {
  case KvType::f32: spread(key, h.key_dim, reinterpret_cast<float *>(part) + panel + lane); break;
  case KvType::f16:
  case KvType::bf16:
    halves(key, h.key_dim, h.type, row.halves);
    spread(row.halves, h.key_dim, reinterpret_cast<uint16_t *>(part) + panel + lane);
    break;
  case KvType::int8:
    codes(key, h.key_dim, h.type, row.codes, steps, kv_tokens);
    spread(row.codes, h.key_dim, reinterpret_cast<int8_t *>(part) + panel + lane);
    break;
  case KvType::int4:
    codes(key, h.key_dim, h.type, row.codes, steps, kv_tokens);
    for (int c = 0; c < h.key_dim; c += 2)
      part[panel / 2 + c / 2 * lanes + lane] = pair(row.codes[c], row.codes[c + 1]);
  }
}

void write_value(const KvHead &h, uint8_t *part, int position, const float *value, Row &row) {
  uint8_t *to = part + h.values;
  const int d = h.value_dim, stride = h.value_stride, groups = (stride + kv_group - 1) / kv_group;
  auto *steps = reinterpret_cast<uint16_t *>(part + h.value_steps) + position * groups;
  switch (h.type) {
  case KvType::f32:
    for (int c = 0; c < stride; c += lanes)
      store(reinterpret_cast<float *>(to) + position * stride + c, some(value + c, d - c));
    break;
  case KvType::f16:
  case KvType::bf16: halves(value, d, h.type, reinterpret_cast<uint16_t *>(to) + position * stride); break;
  case KvType::int8:
    codes(value, d, h.type, row.codes, steps, 1);
    std::memcpy(to + position * stride, row.codes, static_cast<size_t>(stride));
    break;
  case KvType::int4:
    codes(value, d, h.type, row.codes, steps, 1);
    to += position * stride / 2;
    for (int first = 0; first < stride; first += kv_group)
      for (int i = 0; i < lanes; ++i)
        *to++ = pair(row.codes[first + i], row.codes[first + lanes + i]);
  }
}

} // namespace

void write_cached(const KvHead &h, uint8_t *part, int position, const float *key, const float *value) {
  Row row;
  write_key(h, part, position, key, row);
  write_value(h, part, position, value, row);
}

} // namespace penjing::PENJING_ISA
