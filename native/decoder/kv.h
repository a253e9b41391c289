// The paged cache of keys and values, and attention over it (Kwon et al., arXiv 2309.06180).
//
// A physical block holds 32 positions of every layer; a sequence's table names its blocks in order. Sequences may
// share blocks that none of them writes any more. A query's result is the same bits whether it is computed alone, in
// a chunk or beside other sequences, and for any number of threads.
#pragma once

#include <vector>

#include "kernels/cached.h"
#include "runtime/buffer.h"

namespace penjing {

// May differ from layer to layer; key_dim and value_dim 1 to max_kv_dim. kv_heads 0: the layer keeps nothing.
struct KvLayer {
  int kv_heads, key_dim, value_dim;
};

// float16 is clamped to ±65504; int8 and int4 have a step for 32 elements. All but float32 keep a NaN for what is
// infinite, and steps that are NaNs, so that it spoils what sees it.
class KvPool {
public:
  // Memory is taken when it is first written. Throws std::invalid_argument for shapes as above, std::bad_alloc.
  KvPool(const std::vector<KvLayer> &layers, KvType type, int64_t blocks);

  static int64_t block_bytes(const std::vector<KvLayer> &layers, KvType type);

  int64_t blocks() const { return blocks_; }
  int64_t block_bytes() const { return block_bytes_; }
  const std::vector<KvLayer> &layers() const { return layers_; }
  const KvHead &head(int layer) const { return heads_[static_cast<size_t>(layer)]; }
  // One head's part of block 0; that of block b is b · block_bytes() further.
  uint8_t *part(int layer, int kv_head) {
    return memory_.data() + offsets_[static_cast<size_t>(layer)] + kv_head * head(layer).bytes;
  }

private:
  std::vector<KvLayer> layers_;
  std::vector<KvHead> heads_;
  std::vector<int64_t> offsets_; // of each layer within a block
  int64_t blocks_, block_bytes_;
  Buffer<uint8_t> memory_;
};

// A sequence's chunk in one layer: positions [start, start + n). Rows may be parts of wider ones: see the strides.
struct Attending {
  const float *queries;       // (n, heads, key_dim)
  const float *keys, *values; // (n, kv_heads, key_dim or value_dim): written first; null: they are in the cache already
  float *out;                 // (n, heads, value_dim)
  const int32_t *table;       // physical blocks, covering start + n positions
  int64_t n, start;
};

struct AttentionRule {
  int heads;          // of the queries, a multiple of the layer's kv_heads; each of these serves heads / kv_heads
  int64_t window = 0; // positions that a query sees, itself included; 0: all
  float scale = 1;    // of the scores
  float softcap = 0;  // c: scores become c · tanh(score / c); 0: none
  const float *sinks = nullptr; // (heads): a score more in the softmax's sum, which has no value (gpt-oss)
  // Floats from one position to the next; 0: positions follow each other.
  int64_t query_stride = 0, key_stride = 0, value_stride = 0, out_stride = 0;
};

// Writes the chunks' keys and values, all of them first, then attends: queries see positions up to their own. Layers
// that read another layer's cache (Gemma 3n) pass that layer and no keys.
void attend(KvPool &pool, int layer, const AttentionRule &rule, const Attending *sequences, int count);

} // namespace penjing
