// Threads that share the work of one large product.
#pragma once

#include <cstdint>

namespace penjing {

// Threads in use, the calling one included. By default the processors this process may run on (affinity and
// control group), started when first needed.
int threads();

// Throws std::invalid_argument unless count is in [1, 256].
void set_threads(int count);

// A loop's body as a function and what it works on: making one allocates nothing.
struct Task {
  void (*run)(const void *context, int64_t i);
  const void *context;
};
void run_parallel(int64_t count, Task task);

// Calls task(i) for i in [0, count), spread over the threads; returns when all are done. The tasks must not throw.
// Runs inline when there is one task, one thread, when called from a task, or while another thread's loop is running.
template <class F>
void parallel_for(int64_t count, const F &task) {
  run_parallel(count, {[](const void *context, int64_t i) { (*static_cast<const F *>(context))(i); }, &task});
}

// While one of these lives, threads that have nothing to do wait awake: for work that consists of many short loops.
class Awake {
public:
  Awake();
  ~Awake();
  Awake(const Awake &) = delete;
  Awake &operator=(const Awake &) = delete;
};

} // namespace penjing
