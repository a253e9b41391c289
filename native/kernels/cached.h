// What the kernels of attention over a paged cache are given.
//
// A block of the cache has 32 positions. In it each head of each layer has a part of its own:
//
//   keys         [panel of 16 positions][element][16]: one vector holds an element of sixteen keys
//   key steps    [32 elements][32 positions], bfloat16    int8 and int4 only
//   values       [position][element], elements padded with zeros to whole vectors
//   value steps  [position][32 elements], bfloat16        int8 and int4 only
//
// int4: two codes a byte, less 8. Of keys, elements 2i and 2i + 1; of values, elements i and 16 + i of each 32.
#pragma once

#include <cstdint>

namespace penjing {

enum class KvType { f32, f16, bf16, int8, int4 };

constexpr int kv_tokens = 32;     // positions of a block
constexpr int kv_group = 32;      // elements of a key or value that share a step
constexpr int max_kv_dim = 576;   // of keys and of values
constexpr int span_tokens = 128;  // positions between two corrections of the softmax, at multiples of themselves
constexpr int rows_at_once = 128; // queries times heads of a group that are computed together

// The part of a block that belongs to one head: see above. Offsets are in bytes.
struct KvHead {
  KvType type;
  int key_dim, value_dim;
  int key_rows, value_stride; // key_dim and value_dim, padded
  int64_t key_steps, values, value_steps, bytes;
};

// Causal attention of a sequence's last positions, for the heads that share one head of the cache.
struct CachedAttention {
  KvHead head;
  const uint8_t *cache;             // this head's part of block 0
  int64_t block_bytes;              // from block to block
  const int32_t *table;             // physical block of positions 0…31, 32…63, …
  const float *queries;             // of the group's first head at position `start`; the next head is key_dim further
  float *out;                       // likewise, value_dim
  int64_t query_stride, out_stride; // from position to position
  int64_t start, group, window;     // window: positions that a query sees, itself included; 0: all
  float scale, softcap;             // softcap: c · tanh(score / c); 0: none
  const float *sinks;               // of the group's heads: a score more in the softmax's sum; or null
};

// Floats of scratch memory, aligned to 64 bytes, that attend_cached wants.
constexpr int64_t cached_scratch(const KvHead &h) {
  const int64_t tile = kv_tokens * (h.key_rows + h.value_stride);
  const int64_t row = (h.key_dim + 15) / 16 * 16 + h.value_stride + span_tokens + 16 + 3;
  return tile + rows_at_once * row;
}

} // namespace penjing
