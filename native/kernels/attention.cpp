// Attention and the gate of the MLP: what of a decoder is not a product with a weight.
#include "kernels/exponential.h"
#include "kernels/kernels.h"
#include "kernels/simd.h"

namespace penjing::PENJING_ISA {
namespace {

constexpr int tile = 64;             // keys looked at together
constexpr int panels = tile / lanes; // of sixteen keys: [element][16]
constexpr int vectors = max_head_dim / lanes;
constexpr float infinite = __builtin_inff();

struct Scratch {
  float keys[panels * max_head_dim * lanes];
  float queries[attention_rows * max_head_dim];
  float mixed[attention_rows * max_head_dim];
  float weights[attention_rows * tile];
  float greatest[attention_rows], total[attention_rows];
};

Scratch &scratch() {
  alignas(64) static thread_local Scratch memory;
  return memory;
}

PENJING_INLINE int lesser(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }
PENJING_INLINE int greater(int64_t a, int64_t b) { return static_cast<int>(a > b ? a : b); }

PENJING_INLINE float sum(const F16 &v) {
  float each[lanes];
  store(each, v);
  for (int half = lanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i)
      each[i] += each[i + half];
  return each[0];
}

// Keys as panels, so that one vector holds an element of sixteen keys; keys beyond `count` are zeros.
void transpose(const float *keys, int count, int d, float *panel) {
  for (int first = 0; first < tile; first += lanes, panel += d * lanes)
    for (int i = 0; i < lanes; ++i)
      for (int c = 0; c < d; ++c)
        panel[c * lanes + i] = first + i < count ? keys[(first + i) * d + c] : 0;
}

// weights[row][key] = query · key.
template <int rows>
void score(const float *queries, const float *panel, int d, float *weights) {
  F16 s[rows][panels];
  for (auto &row : s)
    for (F16 &v : row)
      v = zero();
  for (int c = 0; c < d; ++c) {
    F16 key[panels];
    for (int i = 0; i < panels; ++i)
      key[i] = load(panel + (i * d + c) * lanes);
    for (int r = 0; r < rows; ++r) {
      const F16 query = splat(queries[r * d + c]);
      for (int i = 0; i < panels; ++i)
        s[r][i] = fma(key[i], query, s[r][i]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < panels; ++i)
      store(weights + r * tile + i * lanes, s[r][i]);
}

// Scores of one row → what each key weighs, for the keys [from, to) of the tile, and 0 for the others; returns what
// earlier sums shrink by. A NaN is never the highest, and spoils the sums.
float soften(float *weights, int from, int to, float *greatest_yet, float *total) {
  float highest = -infinite;
  for (int key = from; key < to; ++key)
    highest = weights[key] > highest ? weights[key] : highest;
  const float now = *greatest_yet > highest ? *greatest_yet : highest;
  float shrink[lanes];
  store(shrink, exponential(splat(*greatest_yet - now)));
  const float factor = *greatest_yet == -infinite ? 0 : shrink[0];
  F16 sums = zero();
  for (int i = 0; i < panels; ++i) {
    const int low = greater(0, from - i * lanes), high = greater(0, lesser(lanes, to - i * lanes));
    const uint32_t mask = low < high ? (0xffffu >> (lanes - high)) & ~((1u << low) - 1) : 0;
    const F16 e = keep(mask, exponential(sub(load(weights + i * lanes), splat(now))));
    store(weights + i * lanes, e);
    sums = add(sums, e);
  }
  *greatest_yet = now;
  *total = *total * factor + sum(sums);
  return factor;
}

// mixed[row] += Σ weights[row][key] · values[key], for `count` vectors of elements from `begin` on.
template <int rows, int count>
void mix(const float *weights, const float *values, int keys, int d, int begin, float *mixed) {
  const int last = lesser(lanes, d - begin - (count - 1) * lanes);
  F16 s[rows][count];
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < count; ++i)
      s[r][i] = load(mixed + r * max_head_dim + begin + i * lanes);
  for (int key = 0; key < keys; ++key) {
    const float *value = values + key * d + begin;
    F16 v[count];
    for (int i = 0; i < count; ++i)
      v[i] = i + 1 < count || last == lanes ? load(value + i * lanes) : load(value + i * lanes, last);
    for (int r = 0; r < rows; ++r) {
      const F16 weight = splat(weights[r * tile + key]);
      for (int i = 0; i < count; ++i)
        s[r][i] = fma(v[i], weight, s[r][i]);
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < count; ++i)
      store(mixed + r * max_head_dim + begin + i * lanes, s[r][i]);
}

template <int rows>
void mix_all(const float *weights, const float *values, int keys, int d, float *mixed) {
  int begin = 0;
  for (; begin + 4 * lanes <= d; begin += 4 * lanes)
    mix<rows, 4>(weights, values, keys, d, begin, mixed);
  for (; begin < d; begin += lanes)
    mix<rows, 1>(weights, values, keys, d, begin, mixed);
}

} // namespace

// Online softmax (Milakov and Gimelshein, arXiv 1805.02867), tile by tile of keys, for rows (query, head of the group).
void attend(const Attention &a, int64_t kv_head, int64_t row_begin, int64_t row_end) {
  Scratch &s = scratch();
  const int d = static_cast<int>(a.head_dim), rows = static_cast<int>(row_end - row_begin);
  const int64_t group = a.heads / a.kv_heads, past = a.length - a.n;
  const auto offset = [&](int r) { // of a row's query and result
    const int64_t row = row_begin + r;
    return (row / group * a.heads + kv_head * group + row % group) * a.head_dim;
  };
  const auto position = [&](int r) { return past + (row_begin + r) / group; };
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < d; ++c)
      s.queries[r * d + c] = a.queries[offset(r) + c] * a.scale;
    for (int c = 0; c < vectors * lanes; ++c)
      s.mixed[r * max_head_dim + c] = 0;
    s.greatest[r] = -infinite;
    s.total[r] = 0;
  }
  const float *keys = a.keys + kv_head * a.head_stride, *values = a.values + kv_head * a.head_stride;
  const int64_t first = a.window && position(0) >= a.window ? position(0) - a.window + 1 : 0;
  for (int64_t begin = first; begin <= position(rows - 1); begin += tile) {
    const int count = lesser(tile, position(rows - 1) + 1 - begin);
    transpose(keys + begin * d, count, d, s.keys);
    int r = 0;
    for (; r + 4 <= rows; r += 4)
      score<4>(s.queries + r * d, s.keys, d, s.weights + r * tile);
    for (; r < rows; ++r)
      score<1>(s.queries + r * d, s.keys, d, s.weights + r * tile);
    for (r = 0; r < rows; ++r) {
      const int64_t at = position(r);
      const int from = a.window ? greater(0, at - a.window + 1 - begin) : 0, to = lesser(count, at + 1 - begin);
      if (from >= to) {
        for (int key = 0; key < tile; ++key)
          s.weights[r * tile + key] = 0;
        continue;
      }
      const F16 factor = splat(soften(s.weights + r * tile, from, to, s.greatest + r, s.total + r));
      for (int c = 0; c < d; c += lanes)
        store(s.mixed + r * max_head_dim + c, mul(load(s.mixed + r * max_head_dim + c), factor));
    }
    for (r = 0; r + 4 <= rows; r += 4)
      mix_all<4>(s.weights + r * tile, values + begin * d, count, d, s.mixed + r * max_head_dim);
    for (; r < rows; ++r)
      mix_all<1>(s.weights + r * tile, values + begin * d, count, d, s.mixed + r * max_head_dim);
  }
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < d; ++c)
      a.out[offset(r) + c] = s.mixed[r * max_head_dim + c] / s.total[r];
}

// out = gate · sigmoid(gate) · up.
void gated(const float *gate, const float *up, int64_t n, float *out) {
  for (int64_t i = 0; i < n; i += lanes) {
    const int left = lesser(lanes, n - i);
    const F16 g = left == lanes ? load(gate + i) : load(gate + i, left);
    const F16 u = left == lanes ? load(up + i) : load(up + i, left);
    const F16 e = exponential(min(splat(87), sub(zero(), g)));
    const F16 y = mul(div(g, add(e, splat(1))), u);
    left == lanes ? store(out + i, y) : store(out + i, y, left);
  }
}

} // namespace penjing::PENJING_ISA
