// Loops over the rows of a step, shared by the threads where that is worth it.
#pragma once

#include <algorithm>

#include "runtime/pool.h"

namespace penjing {

// f(row) for each of the rows, of about `width` floats' work.
template <class F>
void for_rows(int64_t rows, int64_t width, const F &f) {
  constexpr int64_t worth_sharing = 1 << 14; // floats; less is done before another thread would have begun
  const int64_t block = std::max<int64_t>(1, worth_sharing / std::max<int64_t>(width, 1));
  if (rows <= block) {
    for (int64_t row = 0; row < rows; ++row)
      f(row);
    return;
  }
  parallel_for((rows + block - 1) / block, [&](int64_t i) {
    for (int64_t row = i * block; row < std::min(rows, (i + 1) * block); ++row)
      f(row);
  });
}

} // namespace penjing
