// Looking a whole tensor over.
#pragma once

#include <algorithm>
#include <atomic>

#include "kernels/kernels.h"
#include "runtime/pool.h"

namespace penjing {

// Whether there is a NaN or an infinity among n floats.
inline bool any_nonfinite(const void *values, Float type, int64_t n) {
  constexpr int64_t block = 1 << 18;
  std::atomic<bool> found{false};
  parallel_for((n + block - 1) / block, [&](int64_t task) {
    if (found.load(std::memory_order_relaxed))
      return;
    const auto *from = static_cast<const char *>(values) + task * block * (type == Float::f32 ? 4 : 2);
    if (kernels().has_nonfinite(from, type, std::min(block, n - task * block)))
      found.store(true, std::memory_order_relaxed);
  });
  return found;
}

} // namespace penjing
