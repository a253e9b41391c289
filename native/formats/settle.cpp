#include "formats/settle.h"

#include <algorithm>

#include "kernels/kernels.h"
#include "runtime/pool.h"

namespace penjing {

void settle(const Columns &columns) {
  parallel_for((columns.out + settle_width - 1) / settle_width, [&](int64_t task) {
    const int64_t first = task * settle_width;
    kernels().settle_outputs(columns, first, std::min(settle_width, columns.out - first));
  });
}

void search_steps(const StepSearch &search) {
  parallel_for((search.out + lanes - 1) / lanes, [&](int64_t task) {
    const int64_t first = task * lanes;
    kernels().search_outputs(search, first, static_cast<int>(std::min<int64_t>(lanes, search.out - first)));
  });
}

} // namespace penjing
