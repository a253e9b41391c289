#include "formats/prune.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/buffer.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int64_t block = 1 << 18; // values a task counts
constexpr int buckets = 1 << 16;

uint32_t magnitude(uint16_t bits) { return bits & 0x7fffu; }
uint32_t magnitude(uint32_t bits) { return bits & 0x7fffffffu; }

// The bucket in which the count-th smallest key lies; count becomes its rank within the bucket.
template <class T, class Key>
uint32_t bucket_of(const T *values, int64_t n, int64_t &count, Key &&key) {
  const int64_t tasks = std::min<int64_t>((n + block - 1) / block, threads());
  const int64_t each = (n + tasks - 1) / tasks;
  std::vector<int64_t> counts(static_cast<size_t>(tasks * buckets));
  parallel_for(tasks, [&](int64_t task) {
    int64_t *mine = counts.data() + task * buckets;
    for (int64_t i = task * each; i < std::min(n, (task + 1) * each); ++i)
      if (const int64_t bucket = key(magnitude(values[i])); bucket >= 0)
        ++mine[bucket];
  });
  for (uint32_t bucket = 0;; ++bucket) {
    int64_t here = 0;
    for (int64_t task = 0; task < tasks; ++task)
      here += counts[task * buckets + bucket];
    if (count <= here)
      return bucket;
    count -= here;
  }
}

// The count-th smallest magnitude, and its rank among those equal to it.
uint32_t select(const uint16_t *values, int64_t n, int64_t &count) {
  return bucket_of(values, n, count, [](uint32_t m) { return static_cast<int64_t>(m); });
}

uint32_t select(const uint32_t *values, int64_t n, int64_t &count) {
  const uint32_t high = bucket_of(values, n, count, [](uint32_t m) { return static_cast<int64_t>(m >> 15); });
  const uint32_t low = bucket_of(
      values, n, count, [&](uint32_t m) { return m >> 15 == high ? static_cast<int64_t>(m & 0x7fff) : int64_t{-1}; });
  return high << 15 | low;
}

// A short run: a partial sort of magnitude and place.
template <class T>
void prune_run(T *values, int64_t n, int64_t count) {
  struct Order;
  auto *keys = scratch<uint64_t, Order>(n);
  for (int64_t i = 0; i < n; ++i)
    keys[i] = uint64_t{magnitude(values[i])} << 32 | static_cast<uint64_t>(i);
  if (count < n)
    std::nth_element(keys, keys + count, keys + n);
  for (int64_t i = 0; i < count; ++i)
    values[keys[i] & 0xffffffffu] = 0;
}

// A small pattern such as 2 of 4: the smallest, `count` times.
template <class T>
void prune_few(T *values, int64_t n, int64_t count) {
  bool gone[16] = {};
  for (; count > 0; --count) {
    int64_t least = -1;
    for (int64_t i = 0; i < n; ++i)
      if (!gone[i] && (least < 0 || magnitude(values[i]) < magnitude(values[least])))
        least = i;
    gone[least] = true;
    values[least] = 0;
  }
}

template <class T>
void prune_whole(T *values, int64_t n, int64_t count) {
  int64_t equal = count; // how many of those at the threshold go
  const uint32_t threshold = select(values, n, equal);
  const int64_t tasks = (n + block - 1) / block;
  std::vector<int64_t> at(static_cast<size_t>(tasks + 1));
  parallel_for(tasks, [&](int64_t task) {
    for (int64_t i = task * block; i < std::min(n, (task + 1) * block); ++i)
      at[task + 1] += magnitude(values[i]) == threshold;
  });
  for (int64_t task = 0; task < tasks; ++task)
    at[task + 1] += at[task];
  parallel_for(tasks, [&](int64_t task) {
    int64_t left = equal - at[task];
    for (int64_t i = task * block; i < std::min(n, (task + 1) * block); ++i) {
      const uint32_t m = magnitude(values[i]);
      if (m < threshold || (m == threshold && left-- > 0))
        values[i] = 0;
    }
  });
}

template <class T>
void prune_typed(T *values, int64_t parts, int64_t n, int64_t count) {
  if (count == 0 || n == 0)
    return;
  if (parts == 1)
    return prune_whole(values, n, count);
  const int64_t each = std::max<int64_t>(1, block / n);
  parallel_for((parts + each - 1) / each, [&](int64_t task) {
    for (int64_t part = task * each; part < std::min(parts, (task + 1) * each); ++part)
      n <= 16 ? prune_few(values + part * n, n, count) : prune_run(values + part * n, n, count);
  });
}

} // namespace

uint32_t magnitude_at(const void *values, Float type, int64_t n, int64_t count) {
  return type == Float::f32 ? select(static_cast<const uint32_t *>(values), n, count)
                            : select(static_cast<const uint16_t *>(values), n, count);
}

void prune(void *values, Float type, int64_t parts, int64_t n, int64_t count) {
  type == Float::f32 ? prune_typed(static_cast<uint32_t *>(values), parts, n, count)
                     : prune_typed(static_cast<uint16_t *>(values), parts, n, count);
}

} // namespace penjing
