// A whole decoder: tokens in, the next tokens out, one call a step.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "decoder/block.h"
#include "decoder/sample.h"
#include "kernels/screen.h"

namespace penjing {

// What is around the blocks. embedding and head may be null in a decoder that only `run`s blocks.
struct Frame {
  int64_t hidden = 0, vocabulary = 0, positions = 0; // positions: of the longest sequence
  const Matrix *embedding = nullptr, *head = nullptr;
  const float *head_bias = nullptr;
  const Screen *screen = nullptr; // of the head, or null
  Norm final_norm;
  float embedding_scale = 1, logit_scale = 1, logit_softcap = 0 /* 0: none */;
};

// Gemma 4's second embedding; see PerLayerEmbedding in models/config.py.
struct PerLayerTable {
  int64_t inner = 0; // 0: none
  const Matrix *table = nullptr;
  Linear projection;
  Norm norm;
  float scale = 1;
};

struct Rotary {
  std::vector<float> frequencies; // radians a position of each pair
  float scale;                    // on cosine and sine
};

// A sequence's next tokens, and what was found for it; see penjing.models.step.
struct Chunk {
  const int32_t *tokens;
  int64_t n, start;
  const int32_t *table;
  int64_t blocks; // in the table
  int64_t slot = 0;
  Sampler *sampler = nullptr;
  int64_t guesses = 0;
  int64_t alternatives = -1;                       // beside each drawn token; −1: no log-probabilities
  int64_t scored_alternatives = -1, follower = -1; // −1: none

  std::vector<int64_t> drawn = {};
  std::vector<Logprobs> logprobs = {}, scores = {};
  std::string error = {};
};

class Decoder {
public:
  explicit Decoder(const Frame &frame) : frame_(frame) {}

  // Numbers of what was added: rotary tables for blocks, cache layers (−1: none) of blocks.
  int add_rotary(Rotary rotary);
  int add_cache(const KvLayer &layer);
  void add_block(Block block);
  void set_per_layer(const PerLayerTable &table) { per_layer_ = table; }

  int64_t block_bytes(KvType type) const { return KvPool::block_bytes(layers_, type); }
  int64_t state_bytes() const { return slot_floats_ * static_cast<int64_t>(sizeof(float)); }
  // Of a step of so many rows.
  int64_t activation_bytes(int64_t rows) const;

  // The memory of all caches and states, in place of what was there; taken when it is first written.
  void reserve(int64_t blocks, KvType type, int64_t slots);
  // Where a block reads the cache of one in another decoder: that decoder's memory.
  void borrow(const Decoder &other);

  // Throws std::invalid_argument for what cannot be computed, before anything is.
  void step(std::vector<Chunk> &chunks);
  // Logits of every row, (rows, vocabulary).
  void logits(const std::vector<Chunk> &chunks, float *out);
  // The stream x (rows, hidden) of the chunks' tokens through the one block, in place. Tokens are not looked at.
  // extra: that block's part of the second embedding (rows, inner), or null.
  void run(const std::vector<Chunk> &chunks, float *x, const float *extra);

private:
  void check(const std::vector<Chunk> &chunks, bool tokens) const;
  void check(const Chunk &chunk, bool tokens) const;
  Pass begin(const std::vector<Chunk> &chunks);
  void turn(Pass &pass);
  void embed(const std::vector<Chunk> &chunks, const Pass &pass, float *x);
  void embed_per_layer(Pass &pass, const int64_t *tokens, const float *x);
  float *compute_all(const std::vector<Chunk> &chunks, Pass &pass);
  void head(const float *x, const int64_t *rows, int64_t count, float *normed, float *logits);
  bool likeliest(const float *x, const int64_t *rows, int64_t count, float *normed, float *work, int64_t *found);
  void finish(Chunk &chunk, int64_t first, int64_t last, float *logits);
  void use(std::shared_ptr<KvPool> pool);
  int64_t floats_of_step(int64_t rows) const;

  Frame frame_;
  PerLayerTable per_layer_;
  std::vector<Rotary> rotaries_;
  std::vector<KvLayer> layers_;
  std::vector<Block> blocks_;
  int64_t slot_floats_ = 0, slots_ = 0;
  std::shared_ptr<KvPool> pool_;
  Buffer<float> states_;
  Memory memory_{0};
  int64_t rows_ = 0;    // that memory_ is enough for
  int64_t unaided_ = 0; // draws that are made without the screen, since it left too many rows
};

} // namespace penjing
