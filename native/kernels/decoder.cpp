#include "kernels/decoder.h"

#include <algorithm>

#include "runtime/pool.h"

namespace penjing {

void attention(const Attention &a) {
  const int64_t rows = a.n * (a.heads / a.kv_heads);
  const int64_t blocks = (rows + attention_rows - 1) / attention_rows;
  const auto task = [&](int64_t i) {
    // The last blocks see the most keys: they go first, so that the threads end together.
    const int64_t begin = (blocks - 1 - i / a.kv_heads) * attention_rows;
    kernels().attend(a, i % a.kv_heads, begin, std::min(begin + attention_rows, rows));
  };
  constexpr int64_t worth_sharing = 1 << 15; // products; less is done before another thread wakes up
  if (rows * a.kv_heads * a.length * a.head_dim < worth_sharing)
    for (int64_t i = 0; i < blocks * a.kv_heads; ++i)
      task(i);
  else
    parallel_for(blocks * a.kv_heads, task);
}

void gated_product(const float *gate, const float *up, int64_t n, float *out) {
  constexpr int64_t part = 1 << 14;
  parallel_for((n + part - 1) / part, [&](int64_t i) {
    const int64_t begin = i * part;
    kernels().gated(gate + begin, up + begin, std::min(part, n - begin), out + begin);
  });
}

} // namespace penjing
