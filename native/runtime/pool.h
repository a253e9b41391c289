// Threads that share the work of one large product.
#pragma once

#include <cstdint>
#include <functional>

namespace penjing {

// Threads in use, the calling one included. By default the processors this process may run on (affinity and
// control group), started when first needed.
int threads();

// Throws std::invalid_argument unless count is in [1, 256].
void set_threads(int count);

// Calls task(i) for i in [0, count), spread over the threads; returns when all are done. The tasks must not throw.
// Runs inline when there is one task, one thread, when called from a task, or while another thread's loop is running.
void parallel_for(int64_t count, const std::function<void(int64_t)> &task);

} // namespace penjing
