// Attention over a paged cache: online softmax (Milakov and Gimelshein, arXiv 1805.02867), block by block of keys, for
// some rows (query, head of the group) at a time.
//
// What a row's result is made of, and in which order, depends on its position alone: blocks and spans of them lie at
// multiples of their size, and every sum goes over elements or positions in ascending order. So the rows that happen
// to be computed beside it change no bit.
#include "kernels/cache.h"
#include "kernels/exponential.h"

namespace penjing::PENJING_ISA {
namespace {

constexpr int panels = kv_tokens / lanes;
constexpr float infinite = __builtin_inff();
#if defined(__AVX512VNNI__)
constexpr int most_rows = 8, accumulators = 16, abreast = 2; // abreast: panels of keys that are scored together
#else
constexpr int most_rows = 6, accumulators = 6, abreast = 1;
#endif

PENJING_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
PENJING_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }
PENJING_INLINE int within(int64_t x, int least, int most) { return static_cast<int>(lesser(greater(x, least), most)); }

struct Range {
  int from, to;
  bool empty() const { return from >= to; }
  bool operator==(const Range &) const = default;
};

// The rows [begin, begin + count) of a call, and what is known of them so far.
struct Rows {
  const CachedAttention &a;
  int64_t begin;
  int count;
  float *queries;          // scaled; rows that are computed together as [element][row]
  float *mixed;            // [row][value_stride]
  float *weights;          // [row][span]: scores, then what each position weighs
  float *total;            // [row][16]
  float *greatest;         // score
  float *highest, *factor; // of a span; what earlier sums shrink by
  float *tile;

  int64_t position(int row) const { return a.start + (begin + row) / a.group; }
  // Positions that a row sees, less `first`, of those in [first, first + size).
  Range seen(int row, int64_t first, int size) const {
    const int64_t at = position(row) - first;
    return {a.window ? within(at - a.window + 1, 0, size) : 0, within(at + 1, 0, size)};
  }
  // Rows that see any position of a block.
  Range seeing(int64_t block) const {
    const int64_t first = (block - a.start) * a.group - begin;
    const int64_t end = a.window ? (block + kv_tokens - 1 + a.window - a.start) * a.group - begin : count;
    return {within(first, 0, count), within(end, 0, count)};
  }
  const uint8_t *part(int64_t block) const { return a.cache + a.table[block / kv_tokens] * a.block_bytes; }
};

// Calls use(row, Count<rows>) for each group of rows that are computed together, and has a row in `some`.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <class Use>
PENJING_INLINE void each_group(int count, Range some, Use use) {
  for (int row = 0; row < count && row < some.to;) {
    const int left = count - row, size = left >= most_rows ? most_rows : left >= 4 ? 4 : left >= 2 ? 2 : 1;
    if (row + size > some.from)
      switch (size) {
      case most_rows: use(row, Count<most_rows>()); break;
      case 4: use(row, Count<4>()); break;
      case 2: use(row, Count<2>()); break;
      default: use(row, Count<1>());
      }
    row += size;
  }
}

void prepare(const Rows &s) {
  const CachedAttention &a = s.a;
  const int d = a.head.key_dim;
  const float scale = a.softcap ? a.scale / a.softcap : a.scale;
  each_group(s.count, {0, s.count}, [&](int row, auto size) {
    for (int r = 0; r < size.value; ++r) {
      const int64_t at = s.begin + row + r;
      const float *query = a.queries + at / a.group * a.query_stride + at % a.group * d;
      for (int c = 0; c < d; ++c)
        s.queries[row * d + c * size.value + r] = query[c] * scale;
    }
  });
  for (int i = 0; i < s.count * a.head.value_stride; i += lanes)
    store(s.mixed + i, zero());
  for (int row = 0; row < s.count; ++row) { // a sink is a position already seen, whose value is zero
    s.greatest[row] = a.sinks ? a.sinks[(s.begin + row) % a.group] : -infinite;
    store(s.total + row * lanes, zero());
    s.total[row * lanes] = a.sinks ? 1 : 0;
  }
}

// The sums of `score` and `mix` stay in registers only if every loop over them is unrolled; else GCC stores them all.
#define EACH(i, count) _Pragma("GCC unroll 8") for (int i = 0; i < count; ++i)

// weights[row][position] = query · key, for `abreast` panels.
template <int rows>
void score(const float *queries, const float *keys, int d, int key_rows, float *weights) {
  F16 s[rows][abreast];
  EACH(r, rows) EACH(i, abreast) s[r][i] = zero();
  for (int c = 0; c < d; ++c, queries += rows, keys += lanes) {
    F16 key[abreast];
    EACH(i, abreast) key[i] = load(keys + i * key_rows * lanes);
    EACH(r, rows) {
      const F16 query = splat(queries[r]);
      EACH(i, abreast) s[r][i] = fma(key[i], query, s[r][i]);
    }
  }
  EACH(r, rows) EACH(i, abreast) store(weights + r * span_tokens + i * lanes, s[r][i]);
}

// Lanes of a panel that a row sees.
PENJING_INLINE uint32_t lanes_of(Range seen, int panel) {
  if (seen.from <= panel * lanes && (panel + 1) * lanes <= seen.to)
    return 0xffff;
  const int low = within(seen.from - panel * lanes, 0, lanes), high = within(seen.to - panel * lanes, 0, lanes);
  return low < high ? (0xffffu >> (lanes - high)) & ~((1u << low) - 1) : 0;
}

// The highest score that a row sees in a span; caps them first. A NaN is never the highest.
float summit(float *scores, Range seen, float softcap) {
  F16 high = splat(-infinite);
  for (int i = seen.from / lanes; i * lanes < seen.to; ++i) {
    F16 s = load(scores + i * lanes);
    if (softcap) {
      s = mul(tanh(s), splat(softcap));
      store(scores + i * lanes, s);
    }
    const uint32_t mask = lanes_of(seen, i);
    if (mask != 0xffff)
      s = add(s, keep(~mask & 0xffff, splat(-infinite)));
    high = max(s, high);
  }
  return greatest(high);
}

// Scores of one row → what each position weighs, 0 for those not seen, for the positions of a span in `all`.
void weigh(float *weights, Range all, Range seen, float greatest, float *total) {
  F16 sums = load(total);
  for (int i = all.from / lanes; i * lanes < all.to; ++i) {
    const uint32_t mask = lanes_of(seen, i);
    F16 e = zero();
    if (mask) {
      e = exponential(sub(load(weights + i * lanes), splat(greatest)));
      if (mask != 0xffff) // a score that is not seen may be anything
        e = keep(mask, e);
      sums = add(sums, e);
    }
    store(weights + i * lanes, e);
  }
  store(total, sums);
}

// All rows, for the positions of the span in `all`.
void soften(const Rows &s, int64_t span, Range all) {
  for (int row = 0; row < s.count; ++row) {
    const Range seen = s.seen(row, span, span_tokens);
    s.highest[row] = seen.empty() ? -infinite : summit(s.weights + row * span_tokens, seen, s.a.softcap);
  }
  for (int row = 0; row < s.count; row += lanes) {
    const F16 before = load(s.greatest + row), now = max(load(s.highest + row), before);
    store(s.factor + row, exponential(sub(before, now)));
    store(s.greatest + row, now);
  }
  const int stride = s.a.head.value_stride;
  for (int row = 0; row < s.count; ++row) {
    const Range seen = s.seen(row, span, span_tokens);
    float *total = s.total + row * lanes, *mixed = s.mixed + row * stride;
    if (!seen.empty() && s.factor[row] != 1) {
      const F16 factor = splat(s.factor[row]);
      store(total, mul(load(total), factor));
      for (int c = 0; c < stride; c += lanes)
        store(mixed + c, mul(load(mixed + c), factor));
    }
    weigh(s.weights + row * span_tokens, all, seen, s.greatest[row], total);
  }
}

// mixed[row] += Σ weights[row][position] · values[position], for `count` vectors of elements.
template <int rows, int count>
PENJING_INLINE void mix(const float *weights, const float *values, Range some, int stride, float *mixed) {
  F16 s[rows][count];
  EACH(r, rows) EACH(i, count) s[r][i] = load(mixed + r * stride + i * lanes);
  for (int position = some.from; position < some.to; ++position) {
    F16 v[count];
    EACH(i, count) v[i] = load(values + position * stride + i * lanes);
    EACH(r, rows) {
      const F16 weight = splat(weights[r * span_tokens + position]);
      EACH(i, count) s[r][i] = fma(v[i], weight, s[r][i]);
    }
  }
  EACH(r, rows) EACH(i, count) store(mixed + r * stride + i * lanes, s[r][i]);
}

template <int rows, int count = accumulators / rows>
void mix_all(const float *weights, const float *values, Range some, int stride, float *mixed, int begin = 0) {
  for (; begin + count * lanes <= stride; begin += count * lanes)
    mix<rows, count>(weights, values + begin, some, stride, mixed + begin);
  if constexpr (count > 1)
    mix_all<rows, count / 2>(weights, values, some, stride, mixed, begin);
}

bool finite(const float *values, int64_t n) {
  F16 none = zero();
  for (int64_t i = 0; i < n; i += lanes)
    none = add(none, sub(load(values + i), load(values + i)));
  float each[lanes], sum = 0;
  store(each, none);
  for (float x : each)
    sum += x;
  return sum == 0;
}

// A weight of 0 does not hide a value that is infinite or a NaN: where rows see different positions, and there is such
// a value, each row goes alone.
void mix_block(const Rows &s, int64_t block, int offset) {
  const int stride = s.a.head.value_stride;
  const Range some = s.seeing(block);
  const Range all = {s.seen(some.from, block, kv_tokens).from, s.seen(some.to - 1, block, kv_tokens).to};
  const float *values = float_values(s.a.head, s.part(block), all.to, s.tile);
  int known = -1; // are all values finite?
  each_group(s.count, some, [&](int row, auto size) {
    const float *weights = s.weights + row * span_tokens + offset;
    float *mixed = s.mixed + row * stride;
    const Range first = s.seen(row, block, kv_tokens), last = s.seen(row + size.value - 1, block, kv_tokens);
    const Range both = {first.from, last.to};
    if (!(first == last) && known < 0)
      known = finite(values + all.from * stride, (all.to - all.from) * stride);
    if (first == last || known)
      return mix_all<size.value>(weights, values, both, stride, mixed);
    for (int r = 0; r < size.value; ++r)
      mix_all<1>(weights + r * span_tokens, values, s.seen(row + r, block, kv_tokens), stride, mixed + r * stride);
  });
}

// Memory is slower than a block takes when it has few rows, and blocks are too short for the processor to foresee
// them: values are asked for while their keys are scored, keys while the span before is mixed.
PENJING_INLINE void prefetch(const uint8_t *from, int64_t bytes) {
  constexpr int64_t line = 64;
  for (int64_t i = 0; i < bytes; i += line)
    __builtin_prefetch(from + i);
}

void score_block(const Rows &s, int64_t block, int offset) {
  const KvHead &h = s.a.head;
  const Range some = s.seeing(block);
  const int wanted = (s.seen(some.to - 1, block, kv_tokens).to + lanes - 1) / lanes;
  const float *keys = float_keys(h, s.part(block), wanted, s.tile);
  each_group(s.count, some, [&](int row, auto size) {
    for (int panel = 0; panel < wanted; panel += abreast)
      score<size.value>(s.queries + row * h.key_dim, keys + panel * h.key_rows * lanes, h.key_dim, h.key_rows,
                        s.weights + row * span_tokens + offset + panel * lanes);
  });
}

void finish(const Rows &s) {
  const CachedAttention &a = s.a;
  for (int row = 0; row < s.count; ++row) {
    const int64_t at = s.begin + row;
    float *out = a.out + at / a.group * a.out_stride + at % a.group * a.head.value_dim;
    float *each = s.total + row * lanes;
    for (int half = lanes / 2; half; half /= 2)
      for (int i = 0; i < half; ++i)
        each[i] += each[i + half];
    for (int c = 0; c < a.head.value_dim; ++c)
      out[c] = s.mixed[row * a.head.value_stride + c] / each[0];
  }
}

} // namespace

void attend_cached(const CachedAttention &a, int64_t row_begin, int64_t row_end, float *memory) {
  const auto take = [&](int64_t floats) {
    float *taken = memory;
    memory += (floats + lanes - 1) / lanes * lanes;
    return taken;
  };
  const int count = static_cast<int>(row_end - row_begin), stride = a.head.value_stride;
  float *queries = take(count * a.head.key_dim), *mixed = take(count * stride);
  float *weights = take(count * span_tokens), *total = take(count * lanes);
  float *greatest = take(count), *highest = take(count), *factor = take(count);
  const Rows s{a, row_begin, count, queries, mixed, weights, total, greatest, highest, factor, memory};
  prepare(s);
  const int64_t end = s.position(count - 1) + 1;
  const int64_t begin = a.window ? greater(0, s.position(0) - a.window + 1) / kv_tokens * kv_tokens : 0;
  for (int64_t span = begin / span_tokens * span_tokens; span < end; span += span_tokens) {
    const Range all = {within(begin - span, 0, span_tokens), within(end - span, 0, span_tokens)};
    for (int at = all.from; at < all.to; at += kv_tokens) {
      prefetch(s.part(span + at) + a.head.values, a.head.bytes - a.head.values);
      score_block(s, span + at, at);
    }
    soften(s, span, all);
    for (int at = all.from; at < all.to; at += kv_tokens) {
      if (const int64_t next = span + at + span_tokens; next < end)
        prefetch(s.part(next), a.head.values);
      mix_block(s, span + at, at);
    }
  }
  finish(s);
}

} // namespace penjing::PENJING_ISA
