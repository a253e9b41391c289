#include "formats/bitmask.h"

#include <algorithm>
#include <cstring>

#include "kernels/kernels.h"
#include "runtime/buffer.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int64_t some_values = 1 << 16; // a task's worth

template <class Row>
void each_row(int64_t rows, int64_t columns, Row &&row) {
  const int64_t block = std::max<int64_t>(1, some_values / std::max<int64_t>(columns, 1));
  parallel_for((rows + block - 1) / block, [&](int64_t task) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); ++r)
      row(r);
  });
}

} // namespace

void bitmask_encode(const void *matrix, int64_t rows, int64_t columns, Elements elements, uint8_t *bitmask,
                    int64_t *offsets, const std::function<void *(int64_t)> &allocate) {
  struct Kept;
  const auto *from = static_cast<const char *>(matrix);
  const int64_t row_bytes = columns * elements.width, mask_bytes = (columns + 7) / 8;
  const auto compress = [&](int64_t row) { // the kernel writes whole vectors: into scratch, not beyond our memory
    auto *kept = scratch<char, Kept>(row_bytes + 64);
    const int64_t count = kernels().compress(from + row * row_bytes, columns, elements.width, elements.significant,
                                             bitmask + row * mask_bytes, kept);
    return std::pair(kept, count);
  };
  each_row(rows, columns, [&](int64_t row) { offsets[row] = compress(row).second; });
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row)
    total += std::exchange(offsets[row], total);
  auto *values = static_cast<char *>(allocate(total));
  each_row(rows, columns, [&](int64_t row) {
    const auto [kept, count] = compress(row);
    std::memcpy(values + offsets[row] * elements.width, kept, static_cast<size_t>(count * elements.width));
  });
}

void bitmask_counts(const uint8_t *bitmask, int64_t rows, int64_t columns, int64_t *counts) {
  const int64_t mask_bytes = (columns + 7) / 8;
  each_row(rows, columns, [&](int64_t row) {
    const uint8_t *bits = bitmask + row * mask_bytes;
    counts[row] = 0;
    for (int64_t i = 0; i < columns / 8; ++i)
      counts[row] += __builtin_popcount(bits[i]);
    if (columns % 8)
      counts[row] += __builtin_popcount(bits[mask_bytes - 1] & ((1u << columns % 8) - 1));
  });
}

void bitmask_decode(const void *values, const uint8_t *bitmask, const int64_t *offsets, int64_t rows, int64_t columns,
                    int width, void *matrix) {
  const auto *from = static_cast<const char *>(values);
  auto *to = static_cast<char *>(matrix);
  each_row(rows, columns, [&](int64_t row) {
    kernels().expand(from + offsets[row] * width, bitmask + row * ((columns + 7) / 8), columns, width,
                     to + row * columns * width);
  });
}

} // namespace penjing
