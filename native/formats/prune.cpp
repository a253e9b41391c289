#include "formats/prune.h"

#include <algorithm>
#include <vector>

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

// Zeros where the magnitude is less than the threshold, and in the first `equal` places where it is just that.
template <class T>
void zero_below(T *values, int64_t n, uint32_t threshold, int64_t equal) {
  const auto limit = static_cast<T>(threshold);
  constexpr T mask = static_cast<T>(~T{0}) >> 1;
  int64_t i = 0;
  for (; i < n && equal > 0; ++i) {
    const T m = values[i] & mask;
    equal -= m == limit;
    values[i] = m <= limit ? T{0} : values[i];
  }
  for (; i < n; ++i)
    values[i] = (values[i] & mask) < limit ? T{0} : values[i];
}

// A row: its threshold is found eight bits at a time, the highest first.
template <class T>
void prune_row(T *values, int64_t n, int64_t count) {
  uint32_t found = 0, known = 0; // bits of the threshold, and which of them are known
  for (int shift = 8 * static_cast<int>(sizeof(T)) - 8; shift >= 0; shift -= 8) {
    int64_t counts[256] = {};
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t m = magnitude(values[i]);
      counts[m >> shift & 255] += (m & known) == found;
    }
    uint32_t digit = 0;
    for (; counts[digit] < count; ++digit)
      count -= counts[digit];
    found |= digit << shift;
    known |= 255u << shift;
  }
  zero_below(values, n, found, count);
}

// A small pattern such as 2 of 4: those that fewer than `count` others come before.
template <class T, int n>
void prune_pattern(T *values, int64_t count) {
  uint32_t m[n];
  for (int i = 0; i < n; ++i)
    m[i] = magnitude(values[i]);
  for (int i = 0; i < n; ++i) {
    int before = 0;
    for (int j = 0; j < n; ++j)
      before += j < i ? m[j] <= m[i] : m[j] < m[i];
    values[i] = before < count ? T{0} : values[i];
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
    const int64_t begin = task * block;
    zero_below(values + begin, std::min(n - begin, block), threshold, equal - at[task]);
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
      n == 4   ? prune_pattern<T, 4>(values + part * n, count)
      : n == 8 ? prune_pattern<T, 8>(values + part * n, count)
               : prune_row(values + part * n, n, count);
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
