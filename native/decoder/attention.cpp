// Attention of a block: projections, norms and positions of queries and keys, the cache, the way back.
#include <cmath>

#include "decoder/block.h"
#include "decoder/rows.h"

namespace penjing {
namespace {

struct Floats {
  float *q, *k, *v, *gate, *mixed;

  Floats(Memory &memory, const AttentionMixer &a, int64_t rows)
      : q(memory.take(rows * a.heads * a.head_dim)), k(memory.take(a.writes ? rows * a.kv_heads * a.head_dim : 0)),
        v(memory.take(a.writes ? rows * a.kv_heads * a.value_dim : 0)),
        gate(memory.take(a.output_gate.matrix ? rows * a.heads * a.value_dim : 0)),
        mixed(memory.take(rows * a.heads * a.value_dim)) {}
};

void project(const AttentionMixer &a, const Rows &x, const Floats &f) {
  Product products[4];
  int count = 0;
  const auto add = [&](const Linear &linear, float *y) {
    if (linear.matrix)
      products[count++] = {linear.matrix, linear.bias, y, linear.matrix->rows};
  };
  add(a.q, f.q);
  add(a.k, f.k);
  add(a.v, f.v);
  add(a.output_gate, f.gate);
  multiply_all(x, products, count);
}

void norm_heads(const Norm &norm, int64_t heads, int64_t size, float *row) {
  if (norm)
    for (int64_t head = 0; head < heads; ++head)
      norm(row + head * size, row + head * size);
}

// Norms and positions of one row's queries, keys and values.
void place(const AttentionMixer &a, const Pass &pass, const Floats &f, int64_t row) {
  const int64_t d = a.head_dim;
  float *q = f.q + row * a.heads * d, *k = f.k + row * a.kv_heads * d, *v = f.v + row * a.kv_heads * a.value_dim;
  if (a.writes && a.values_are_keys)
    std::copy_n(k, a.kv_heads * d, v);
  norm_heads(a.query, a.norm_all ? 1 : a.heads, a.norm_all ? a.heads * d : d, q);
  if (a.writes) {
    norm_heads(a.key, a.norm_all ? 1 : a.kv_heads, a.norm_all ? a.kv_heads * d : d, k);
    norm_heads(a.value, a.kv_heads, a.value_dim, v);
  }
  if (a.rope >= 0) {
    const Turns &t = pass.turns[static_cast<size_t>(a.rope)];
    const float *cosine = t.cosine + row * t.pairs, *sine = t.sine + row * t.pairs;
    elements().rotate(q, a.heads, d, cosine, sine, t.pairs, a.interleaved);
    if (a.writes)
      elements().rotate(k, a.kv_heads, d, cosine, sine, t.pairs, a.interleaved);
  }
  if (a.growth != 0) {
    const auto windows = static_cast<float>(pass.positions[static_cast<size_t>(row)] / a.growth_every);
    elements().multiply(1 + a.growth * std::log1p(windows), a.heads * d, q);
  }
}

} // namespace

void mix(const AttentionMixer &a, Pass &pass, const float *x, float *y) {
  const int64_t before = pass.memory->used();
  const Floats f(*pass.memory, a, pass.rows);
  project(a, Rows(x, pass.rows, pass.hidden), f);
  for_rows(pass.rows, (a.heads + a.kv_heads) * a.head_dim, [&](int64_t row) { place(a, pass, f, row); });
  std::vector<Attending> attending;
  attending.reserve(pass.sequences.size());
  const int64_t queries = a.heads * a.head_dim, keys = a.kv_heads * a.head_dim, values = a.kv_heads * a.value_dim;
  const int64_t mixed = a.heads * a.value_dim;
  for (const Sequence &s : pass.sequences)
    attending.push_back({f.q + s.row * queries, a.writes ? f.k + s.row * keys : nullptr,
                         a.writes ? f.v + s.row * values : nullptr, f.mixed + s.row * mixed, s.table, s.n, s.start});
  attend(*pass.pool, a.kv_layer, a.rule, attending.data(), static_cast<int>(attending.size()));
  if (a.output_gate.matrix)
    for_rows(pass.rows, mixed,
             [&](int64_t row) { elements().gate(f.gate + row * mixed, mixed, f.mixed + row * mixed); });
  a.o.matrix->multiply(Rows(f.mixed, pass.rows, mixed), a.o.bias, y, pass.hidden);
  pass.memory->release(before);
}

int64_t floats_of(const AttentionMixer &mixer, int64_t rows) { return count_floats<Floats>(mixer, rows); }

} // namespace penjing
