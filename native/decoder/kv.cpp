#include "decoder/kv.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int64_t line = 64;
constexpr int64_t worth_sharing = 1 << 15; // products; less is done before another thread wakes up

int64_t padded(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

KvHead head_of(const KvLayer &layer, KvType type) {
  KvHead h{};
  h.type = type, h.key_dim = layer.key_dim, h.value_dim = layer.value_dim;
  const bool nibbles = type == KvType::int4, coded = nibbles || type == KvType::int8;
  h.key_rows = static_cast<int>(padded(h.key_dim, nibbles ? 2 : 1));
  h.value_stride = static_cast<int>(padded(h.value_dim, nibbles ? kv_group : lanes));
  const int bits = nibbles ? 4 : coded ? 8 : type == KvType::f32 ? 32 : 16;
  const auto take = [&](int64_t bytes) { return std::exchange(h.bytes, padded(h.bytes + bytes, line)); };
  const auto steps = [&](int64_t d) { return coded ? kv_tokens * 2 * (padded(d, kv_group) / kv_group) : 0; };
  take(int64_t{kv_tokens} * h.key_rows * bits / 8);
  h.key_steps = take(steps(h.key_dim));
  h.values = take(int64_t{kv_tokens} * h.value_stride * bits / 8);
  h.value_steps = take(steps(h.value_dim));
  return h;
}

void check(const std::vector<KvLayer> &layers) {
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto &[heads, key_dim, value_dim] = layers[i];
    const auto fits = [](int d) { return d >= 1 && d <= max_kv_dim; };
    if (heads < 0 || (heads && !(fits(key_dim) && fits(value_dim))))
      throw std::invalid_argument("layer " + std::to_string(i) + ": key_dim and value_dim are 1 to " +
                                  std::to_string(max_kv_dim));
  }
}

// Parts of the work, in tasks that threads take; inline where waking them would cost more.
template <class Task>
void share(int64_t work, int64_t tasks, const Task &task) {
  if (work >= worth_sharing)
    return parallel_for(tasks, task);
  for (int64_t i = 0; i < tasks; ++i)
    task(i);
}

// What the chunks of one layer have in common.
struct Layer {
  KvPool &pool;
  int index;
  KvLayer shape;
  AttentionRule rule;

  int64_t group() const { return rule.heads / shape.kv_heads; }
};

struct Part { // of a sequence's chunk: positions to write, or rows to compute
  const Attending *sequence;
  int kv_head;
  int64_t begin, end, cost;
};

void write(const Layer &l, const Part &part) {
  const Attending &s = *part.sequence;
  const KvHead &h = l.pool.head(l.index);
  for (int kv_head = 0; kv_head < l.shape.kv_heads; ++kv_head)
    for (int64_t i = part.begin; i < part.end; ++i) {
      const int64_t at = s.start + i, block = s.table[at / kv_tokens] * l.pool.block_bytes();
      kernels().write_cached(h, l.pool.part(l.index, kv_head) + block, static_cast<int>(at % kv_tokens),
                             s.keys + i * l.rule.key_stride + kv_head * h.key_dim,
                             s.values + i * l.rule.value_stride + kv_head * h.value_dim);
    }
}

void compute(const Layer &l, const Part &part) {
  const Attending &s = *part.sequence;
  const AttentionRule &rule = l.rule;
  const KvHead &h = l.pool.head(l.index);
  const int64_t head = part.kv_head * l.group();
  const CachedAttention a{h,
                          l.pool.part(l.index, part.kv_head),
                          l.pool.block_bytes(),
                          s.table,
                          s.queries + head * h.key_dim,
                          s.out + head * h.value_dim,
                          rule.query_stride,
                          rule.out_stride,
                          s.start,
                          l.group(),
                          rule.window,
                          rule.scale,
                          rule.softcap,
                          rule.sinks ? rule.sinks + head : nullptr};
  struct Tag;
  kernels().attend_cached(a, part.begin, part.end, scratch<float, Tag>(cached_scratch(h)));
}

void write_all(const Layer &l, const Attending *sequences, int count) {
  static thread_local std::vector<Part> parts;
  parts.clear();
  int64_t written = 0;
  for (const Attending *s = sequences; s != sequences + count; ++s)
    for (int64_t begin = 0; s->keys && begin < s->n; begin += kv_tokens) {
      const int64_t end = std::min(begin + kv_tokens, s->n);
      parts.push_back({s, 0, begin, end, 0});
      written += end - begin;
    }
  const std::vector<Part> &all = parts; // the caller's, in every thread
  share(written * l.shape.kv_heads * (l.shape.key_dim + l.shape.value_dim), static_cast<int64_t>(all.size()),
        [&](int64_t i) { write(l, all[static_cast<size_t>(i)]); });
}

// Blocks of rows are as large as threads allow: the rows of one share the conversion of keys and values.
int64_t rows_of_a_task(const Layer &l, const Attending *sequences, int count) {
  int64_t rows = rows_at_once;
  for (; rows > 1; rows /= 2) {
    int64_t tasks = 0;
    for (int i = 0; i < count; ++i)
      tasks += (sequences[i].n * l.group() + rows - 1) / rows * l.shape.kv_heads;
    if (tasks >= threads())
      break;
  }
  return rows;
}

void attend_all(const Layer &l, const Attending *sequences, int count) {
  static thread_local std::vector<Part> parts;
  parts.clear();
  const int64_t most = rows_of_a_task(l, sequences, count), group = l.group();
  int64_t work = 0;
  for (const Attending *s = sequences; s != sequences + count; ++s)
    for (int64_t begin = 0; begin < s->n * group; begin += most) {
      const int64_t end = std::min(begin + most, s->n * group), length = s->start + (end - 1) / group + 1;
      const int64_t cost = (end - begin) * (l.rule.window ? std::min(length, l.rule.window) : length);
      for (int kv_head = 0; kv_head < l.shape.kv_heads; ++kv_head)
        parts.push_back({s, kv_head, begin, end, cost});
      work += cost * l.shape.kv_heads * (l.shape.key_dim + l.shape.value_dim);
    }
  // The longest go first, so that the threads end together.
  std::stable_sort(parts.begin(), parts.end(), [](const Part &a, const Part &b) { return a.cost > b.cost; });
  const std::vector<Part> &all = parts;
  share(work, static_cast<int64_t>(all.size()), [&](int64_t i) { compute(l, all[static_cast<size_t>(i)]); });
}

} // namespace

KvPool::KvPool(const std::vector<KvLayer> &layers, KvType type, int64_t blocks)
    : layers_(layers), blocks_(blocks), block_bytes_(block_bytes(layers, type)) {
  if (blocks < 0 || blocks > std::numeric_limits<int32_t>::max())
    throw std::invalid_argument("blocks: give 0 to 2^31 − 1");
  int64_t offset = 0;
  for (const KvLayer &layer : layers) {
    heads_.push_back(head_of(layer, type));
    offsets_.push_back(std::exchange(offset, offset + layer.kv_heads * heads_.back().bytes));
  }
  memory_ = Buffer<uint8_t>(blocks * block_bytes_);
}

// An odd number of cache lines, so that the same place of consecutive blocks falls on different sets of the cache.
int64_t KvPool::block_bytes(const std::vector<KvLayer> &layers, KvType type) {
  check(layers);
  int64_t lines = 0;
  for (const KvLayer &layer : layers)
    lines += layer.kv_heads * head_of(layer, type).bytes / line;
  return (lines | 1) * line;
}

void attend(KvPool &pool, int layer, const AttentionRule &rule, const Attending *sequences, int count) {
  Layer l{pool, layer, pool.layers()[static_cast<size_t>(layer)], rule};
  const auto unless_given = [](int64_t &stride, int64_t otherwise) { stride = stride ? stride : otherwise; };
  unless_given(l.rule.query_stride, int64_t{rule.heads} * l.shape.key_dim);
  unless_given(l.rule.key_stride, int64_t{l.shape.kv_heads} * l.shape.key_dim);
  unless_given(l.rule.value_stride, int64_t{l.shape.kv_heads} * l.shape.value_dim);
  unless_given(l.rule.out_stride, int64_t{rule.heads} * l.shape.value_dim);
  write_all(l, sequences, count);
  attend_all(l, sequences, count);
}

} // namespace penjing
