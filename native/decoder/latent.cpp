// Latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one small latent a position for all heads.
//
// The matrices that would make a head's keys and values of it are multiplied into the queries and the result instead,
// so that attention is that of many query heads over one key head, (latent, turned part), whose values are the latent.
#include "decoder/block.h"
#include "decoder/rows.h"

namespace penjing {
namespace {

struct Floats {
  float *q_latent, *q, *latent, *turned, *keys, *queries, *mixed, *head, *values;

  Floats(Memory &memory, const LatentMixer &a, int64_t rows)
      : q_latent(memory.take(rows * a.q_rank)), q(memory.take(rows * a.heads * (a.nope_dim + a.rope_dim))),
        latent(memory.take(rows * a.kv_rank)), turned(memory.take(rows * a.rope_dim)),
        keys(memory.take(rows * (a.kv_rank + a.rope_dim))),
        queries(memory.take(rows * a.heads * (a.kv_rank + a.rope_dim))), mixed(memory.take(rows * a.heads * a.kv_rank)),
        head(memory.take(rows * a.heads * std::max(a.nope_dim, a.kv_rank))),
        values(memory.take(rows * a.heads * a.value_dim)) {}
};

void project(const LatentMixer &a, const Pass &pass, const float *x, const Floats &f) {
  const Linear &first = a.q_rank ? a.q_a : a.q;
  const Product products[] = {{first.matrix, first.bias, a.q_rank ? f.q_latent : f.q, first.matrix->rows},
                              {a.kv_a.matrix, a.kv_a.bias, f.latent, a.kv_rank},
                              {a.k_rope.matrix, a.k_rope.bias, f.turned, a.rope_dim}};
  multiply_all(Rows(x, pass.rows, pass.hidden), products, 3);
  if (!a.q_rank)
    return;
  for_rows(pass.rows, a.q_rank,
           [&](int64_t row) { a.q_latent(f.q_latent + row * a.q_rank, f.q_latent + row * a.q_rank); });
  a.q_b.matrix->multiply(Rows(f.q_latent, pass.rows, a.q_rank), a.q_b.bias, f.q, a.q_b.matrix->rows);
}

// Norm of the latent, positions, and the parts of keys and queries that need no product.
void place(const LatentMixer &a, const Pass &pass, const Floats &f, int64_t row) {
  const int64_t key = a.kv_rank + a.rope_dim, query = a.nope_dim + a.rope_dim;
  const Turns &t = pass.turns[static_cast<size_t>(a.rope)];
  const float *cosine = t.cosine + row * t.pairs, *sine = t.sine + row * t.pairs;
  float *keys = f.keys + row * key;
  a.kv_latent(f.latent + row * a.kv_rank, keys);
  std::copy_n(f.turned + row * a.rope_dim, a.rope_dim, keys + a.kv_rank);
  elements().rotate(keys + a.kv_rank, 1, key, cosine, sine, t.pairs, a.interleaved);
  for (int64_t head = 0; head < a.heads; ++head)
    std::copy_n(f.q + (row * a.heads + head) * query + a.nope_dim, a.rope_dim,
                f.queries + (row * a.heads + head) * key + a.kv_rank);
  elements().rotate(f.queries + row * a.heads * key + a.kv_rank, a.heads, key, cosine, sine, t.pairs, a.interleaved);
}

// One product a head, from columns [at, at + columns) of each `stride` floats.
void multiply_heads(const LatentMixer &a, const std::vector<Linear> &weights, int64_t rows, const float *x,
                    int64_t x_stride, int64_t columns, float *gathered, float *y, int64_t y_stride) {
  parallel_for(a.heads, [&](int64_t head) {
    float *own = gathered + head * rows * columns;
    for (int64_t row = 0; row < rows; ++row)
      std::copy_n(x + (row * a.heads + head) * x_stride, columns, own + row * columns);
    weights[static_cast<size_t>(head)].matrix->multiply(Rows(own, rows, columns), nullptr, y + head * y_stride,
                                                        a.heads * y_stride);
  });
}

} // namespace

void mix(const LatentMixer &a, Pass &pass, const float *x, float *y) {
  const int64_t before = pass.memory->used(), rows = pass.rows, key = a.kv_rank + a.rope_dim;
  const Floats f(*pass.memory, a, rows);
  project(a, pass, x, f);
  for_rows(rows, key + a.heads * a.rope_dim, [&](int64_t row) { place(a, pass, f, row); });
  multiply_heads(a, a.k_b, rows, f.q, a.nope_dim + a.rope_dim, a.nope_dim, f.head, f.queries, key);
  AttentionRule rule = a.rule;
  rule.value_stride = key;
  std::vector<Attending> attending;
  attending.reserve(pass.sequences.size());
  for (const Sequence &s : pass.sequences)
    attending.push_back({f.queries + s.row * a.heads * key, f.keys + s.row * key, f.keys + s.row * key,
                         f.mixed + s.row * a.heads * a.kv_rank, s.table, s.n, s.start});
  attend(*pass.pool, a.kv_layer, rule, attending.data(), static_cast<int>(attending.size()));
  multiply_heads(a, a.v_b, rows, f.mixed, a.kv_rank, a.kv_rank, f.head, f.values, a.value_dim);
  a.o.matrix->multiply(Rows(f.values, rows, a.heads * a.value_dim), a.o.bias, y, pass.hidden);
  pass.memory->release(before);
}

int64_t floats_of(const LatentMixer &mixer, int64_t rows) { return count_floats<Floats>(mixer, rows); }

} // namespace penjing
