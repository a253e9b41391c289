// A decoder's blocks as data: what penjing.models.config describes, with the weights in place of their names.
//
// Pointers to matrices and vectors are borrowed: whoever builds a decoder keeps them.
#pragma once

#include <variant>
#include <vector>

#include "decoder/elements.h"
#include "decoder/kv.h"
#include "decoder/memory.h"
#include "decoder/route.h"
#include "kernels/matrix.h"

namespace penjing {

struct Linear {
  const Matrix *matrix = nullptr;
  const float *bias = nullptr;
};

struct Norm {
  enum class Kind { none, rms, layer } kind = Kind::none;
  const float *weight = nullptr, *bias = nullptr;
  int64_t size = 0;
  float eps = 0;

  explicit operator bool() const { return kind != Kind::none; }
  void operator()(const float *x, float *y) const; // a row; y may be x; none: copies
};

// See models/config.py for what the parts compute.
struct AttentionMixer {
  Linear q, k, v, o, output_gate;
  Norm query, key, value;
  bool norm_all = false; // of all heads at once
  int64_t heads, kv_heads, head_dim, value_dim;
  bool writes = true; // keys and values of its own, to layer kv_layer of the cache
  bool values_are_keys = false;
  int kv_layer, rope = -1; // number of the rotary table, −1: none
  bool interleaved = false;
  float growth = 0; // β of query_growth
  int64_t growth_every = 1;
  AttentionRule rule;
};

struct LatentMixer {
  Linear q, q_a, q_b, kv_a, k_rope, o;
  Norm q_latent, kv_latent;
  std::vector<Linear> k_b, v_b; // of each head: (kv_rank, nope_dim), that is transposed, and (value_dim, kv_rank)
  int64_t heads, q_rank /* 0: q */, kv_rank, nope_dim, rope_dim, value_dim;
  int kv_layer, rope;
  bool interleaved;
  AttentionRule rule;
};

constexpr int64_t most_taps = 16;

struct DeltaMixer {
  Linear qkv, z, b, a, o;
  Norm state;
  const float *decay, *step;                                  // (value_heads)
  const float *convolution;                                   // (kernel, channels)
  int64_t key_heads, value_heads, key_dim, value_dim, kernel; // kernel: at most most_taps
  int64_t state_at;                                           // floats from the beginning of a slot

  int64_t channels() const { return 2 * key_heads * key_dim + value_heads * value_dim; }
  int64_t state_floats() const { return value_heads * key_dim * value_dim + (kernel - 1) * channels(); }
};

struct Mlp {
  Linear gate, up, down; // gate: null where it is not gated
  int64_t inner = 0;
  Activation activation = Activation::silu;
  float limit = 0, alpha = 1; // of Activation::clamped
};

struct Experts {
  Router router;
  Linear scores;
  std::vector<Mlp> experts;
  Mlp shared; // inner 0: none
  Linear shared_gate;
  Norm router_in, experts_in, shared_out, experts_out;
};

struct Block {
  std::variant<AttentionMixer, LatentMixer, DeltaMixer> mixer;
  std::variant<Mlp, Experts> mlp;
  Norm attention_in, attention_out, mlp_in, mlp_out;
  bool parallel = false;
  float residual_scale = 1, layer_scale = 1;
  Linear per_layer_down, per_layer_up; // Gemma 4's second embedding, or null
  Norm per_layer;
};

// A sequence's part of a step: rows [row, row + n) of it, at positions [start, start + n).
struct Sequence {
  int64_t row, n, start, slot;
  const int32_t *table;
};

struct Turns {
  const float *cosine, *sine; // (rows, pairs)
  int64_t pairs;
};

// What all parts of a step need. A part takes what it works in from `memory` and gives it back.
struct Pass {
  int64_t rows, hidden;
  std::vector<Sequence> sequences;
  std::vector<int64_t> positions; // of the rows
  std::vector<Turns> turns;       // by number of the rotary table
  KvPool *pool = nullptr;
  float *states = nullptr; // [slot][slot_floats]
  int64_t slot_floats = 0;
  const float *per_layer = nullptr; // (rows, per_layer_stride): this block's second embedding
  int64_t per_layer_stride = 0;
  Memory *memory = nullptr;
};

// x, y (rows, hidden): y = mixer(x), y = mlp(x). `stream` is what the block's norms read, where experts have their own.
void mix(const AttentionMixer &mixer, Pass &pass, const float *x, float *y);
void mix(const LatentMixer &mixer, Pass &pass, const float *x, float *y);
void mix(const DeltaMixer &mixer, Pass &pass, const float *x, float *y);
void feed(const Mlp &mlp, Pass &pass, const float *x, const float *stream, float *y);
void feed(const Experts &experts, Pass &pass, const float *x, const float *stream, float *y);

// Floats that these take for so many rows.
int64_t floats_of(const AttentionMixer &mixer, int64_t rows);
int64_t floats_of(const LatentMixer &mixer, int64_t rows);
int64_t floats_of(const DeltaMixer &mixer, int64_t rows);
int64_t floats_of(const Mlp &mlp, int64_t rows);
int64_t floats_of(const Experts &experts, int64_t rows, int64_t hidden);

// x (rows, hidden) ← what the block makes of it.
void compute(const Block &block, Pass &pass, float *x);
int64_t floats_of(const Block &block, int64_t rows, int64_t hidden);

} // namespace penjing
