// Gated delta net (Yang, Kautz and Hatamizadeh, arXiv 2412.06464): a state of fixed size in place of a cache.
//
// A slot holds each value head's state (key_dim, value_dim), then the last kernel − 1 inputs of the convolution.
#include <cmath>

#include "decoder/block.h"
#include "decoder/rows.h"

namespace penjing {
namespace {

struct Floats {
  float *qkv, *convolved, *z, *a, *b, *mixed;

  Floats(Memory &memory, const DeltaMixer &d, int64_t rows)
      : qkv(memory.take(rows * d.channels())), convolved(memory.take(rows * d.channels())),
        z(memory.take(rows * d.value_heads * d.value_dim)), a(memory.take(rows * d.value_heads)),
        b(memory.take(rows * d.value_heads)), mixed(memory.take(rows * d.value_heads * d.value_dim)) {}
};

float *state_of(const DeltaMixer &d, const Pass &pass, const Sequence &s) {
  return pass.states + s.slot * pass.slot_floats + d.state_at;
}

float *past_of(const DeltaMixer &d, float *state) { return state + d.value_heads * d.key_dim * d.value_dim; }

// Row i of a sequence's inputs; those before the chunk are in the slot.
const float *input(const DeltaMixer &d, const Floats &f, const Sequence &s, const float *past, int64_t i) {
  return i >= 0 ? f.qkv + (s.row + i) * d.channels() : past + (d.kernel - 1 + i) * d.channels();
}

// The convolution, and length one for each head's query and key (query times key_dim^−½).
void convolve_row(const DeltaMixer &d, const Floats &f, const Sequence &s, const float *past, int64_t i) {
  const float *rows[most_taps];
  for (int64_t j = 0; j < d.kernel; ++j)
    rows[j] = input(d, f, s, past, i - d.kernel + 1 + j);
  float *y = f.convolved + (s.row + i) * d.channels();
  elements().convolve(rows, d.convolution, d.kernel, d.channels(), y);
  const auto size = static_cast<float>(d.key_dim);
  const float eps = 1e-6f / size, one = 1 / std::sqrt(size); // x / √(Σx² + 1e-6), by way of the mean
  for (int64_t head = 0; head < 2 * d.key_heads; ++head)
    elements().rms_norm(y + head * d.key_dim, nullptr, d.key_dim, eps, head < d.key_heads ? one / std::sqrt(size) : one,
                        y + head * d.key_dim);
}

void keep_past(const DeltaMixer &d, const Floats &f, const Sequence &s, float *past) {
  // From the oldest on: what is overwritten is not needed any more.
  for (int64_t j = 0; j < d.kernel - 1; ++j)
    std::copy_n(input(d, f, s, past, s.n - d.kernel + 1 + j), d.channels(), past + j * d.channels());
}

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

void run_head(const DeltaMixer &d, const Floats &f, const Sequence &s, float *state, int64_t head) {
  const int64_t key_head = head / (d.value_heads / d.key_heads), width = d.key_heads * d.key_dim;
  float *own = state + head * d.key_dim * d.value_dim;
  for (int64_t row = s.row; row < s.row + s.n; ++row) {
    const float *q = f.convolved + row * d.channels(), *k = q + width, *v = k + width;
    const int64_t at = row * d.value_heads + head;
    const float decay = std::exp(-std::exp(d.decay[head]) * softplus(f.a[at] + d.step[head]));
    const float beta = 1 / (1 + std::exp(-f.b[at]));
    float *y = f.mixed + at * d.value_dim;
    elements().delta(own, q + key_head * d.key_dim, k + key_head * d.key_dim, v + head * d.value_dim, decay, beta,
                     d.key_dim, d.value_dim, y);
    d.state(y, y);
    elements().activate(Activation::silu, f.z + at * d.value_dim, y, d.value_dim, 0, 1, y);
  }
}

} // namespace

void mix(const DeltaMixer &d, Pass &pass, const float *x, float *y) {
  const int64_t before = pass.memory->used(), values = d.value_heads * d.value_dim;
  const Floats f(*pass.memory, d, pass.rows);
  const Product products[] = {{d.qkv.matrix, d.qkv.bias, f.qkv, d.channels()},
                              {d.z.matrix, d.z.bias, f.z, values},
                              {d.b.matrix, d.b.bias, f.b, d.value_heads},
                              {d.a.matrix, d.a.bias, f.a, d.value_heads}};
  multiply_all(Rows(x, pass.rows, pass.hidden), products, 4);
  for (const Sequence &s : pass.sequences) {
    float *state = state_of(d, pass, s), *past = past_of(d, state);
    if (s.start == 0)
      std::fill_n(state, d.state_floats(), 0.0f);
    for_rows(s.n, d.channels() * d.kernel, [&](int64_t i) { convolve_row(d, f, s, past, i); });
    keep_past(d, f, s, past);
  }
  parallel_for(static_cast<int64_t>(pass.sequences.size()) * d.value_heads, [&](int64_t i) {
    const Sequence &s = pass.sequences[static_cast<size_t>(i / d.value_heads)];
    run_head(d, f, s, state_of(d, pass, s), i % d.value_heads);
  });
  d.o.matrix->multiply(Rows(f.mixed, pass.rows, values), d.o.bias, y, pass.hidden);
  pass.memory->release(before);
}

int64_t floats_of(const DeltaMixer &mixer, int64_t rows) { return count_floats<Floats>(mixer, rows); }

} // namespace penjing
