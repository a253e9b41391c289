#include "runtime/pool.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace penjing {
namespace {

// Spins before a thread goes to sleep: about 20 microseconds, the gap between two products of a decoder layer.
constexpr int spins = 1000;

std::atomic<int> awake{0}; // how many `Awake` there are

void relax() {
#if defined(__x86_64__)
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Processors that the control group's quota pays for, or a large number without one.
int quota() {
  std::ifstream file("/sys/fs/cgroup/cpu.max");
  std::string limit;
  double period = 0;
  if (file >> limit >> period && limit != "max" && period > 0)
    return std::max(1, static_cast<int>(std::ceil(std::stod(limit) / period)));
  return 1 << 16;
}

int processors() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0)
    count = CPU_COUNT(&set);
#endif
  return std::clamp(std::min(count, quota()), 1, 256);
}

class Pool {
public:
  explicit Pool(int size) : shares_(size) {
    for (int i = 1; i < size; ++i)
      workers_.emplace_back([this, i] { work(static_cast<size_t>(i)); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
      round_.fetch_add(1);
    }
    wake_.notify_all();
    for (std::thread &worker : workers_)
      worker.join();
  }

  void run(int64_t count, Task task) {
    task_ = task;
    const auto team = static_cast<int64_t>(shares_.size());
    for (int64_t i = 0; i < team; ++i) {
      shares_[i].next.store(count * i / team, std::memory_order_relaxed);
      shares_[i].end = count * (i + 1) / team;
    }
    busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    round_.fetch_add(1); // publishes the above, to spinning and to sleeping workers
    if (sleeping_.load() > 0) {
      {
        std::lock_guard lock(mutex_);
      }
      wake_.notify_all();
    }
    take(task, 0);
    for (int spin = 0; busy_.load(std::memory_order_acquire) > 0; ++spin)
      spin < spins ? relax() : std::this_thread::yield();
  }

private:
  // Every thread has a run of tasks of its own, so that it reads one stretch of memory (4 % more bytes a second than
  // in turns, with two threads), and then helps the others with theirs.
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  void take(Task task, size_t first) {
    for (size_t i = 0; i < shares_.size(); ++i) {
      Share &share = shares_[(first + i) % shares_.size()];
      for (int64_t k; (k = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;)
        task.run(task.context, k);
    }
  }

  void work(size_t index);

  uint64_t await(uint64_t seen) {
    for (int spin = 0; spin < spins; ++spin) {
      if (const uint64_t now = round_.load(); now != seen)
        return now;
      relax();
      if (spin == spins - 1 && awake.load(std::memory_order_relaxed)) {
        std::this_thread::yield(); // to whoever else needs this processor
        spin = 0;
      }
    }
    std::unique_lock lock(mutex_);
    sleeping_.fetch_add(1);
    wake_.wait(lock, [&] { return round_.load() != seen; });
    sleeping_.fetch_sub(1);
    return round_.load();
  }

  std::vector<Share> shares_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> round_{0};
  std::atomic<int> sleeping_{0}, busy_{0};
  Task task_{};
  bool stopping_ = false;
};

thread_local bool inside = false; // of a task: a loop within a loop runs inline

void Pool::work(size_t index) {
  inside = true;
  for (uint64_t seen = 0;;) {
    seen = await(seen);
    if (stopping_)
      return;
    take(task_, index);
    busy_.fetch_sub(1, std::memory_order_release);
  }
}

// One pool a process; a fork leaves the parent's threads behind, so the child forgets the pool and starts its own.
struct Shared {
  std::mutex mutex;
  Pool *pool = nullptr;
  std::atomic<int> size = processors(); // read without the lock, also from within a task
};

Shared &shared() {
  static Shared *instance = [] {
    auto *made = new Shared; // never destroyed: threads may outlive static destruction
    pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); },
                   [] {
                     shared().pool = nullptr;
                     shared().mutex.unlock();
                   });
    return made;
  }();
  return *instance;
}

} // namespace

int threads() { return shared().size; }

void set_threads(int count) {
  if (count < 1 || count > 256)
    throw std::invalid_argument("threads=" + std::to_string(count) + ": give 1 to 256");
  std::lock_guard lock(shared().mutex);
  if (count == shared().size)
    return;
  delete shared().pool;
  shared().pool = nullptr;
  shared().size = count;
}

Awake::Awake() { awake.fetch_add(1); }

Awake::~Awake() { awake.fetch_sub(1); }

void run_parallel(int64_t count, Task task) {
  std::unique_lock<std::mutex> lock;
  if (count > 1 && !inside)
    lock = std::unique_lock(shared().mutex, std::try_to_lock);
  if (!lock.owns_lock() || shared().size == 1) {
    for (int64_t i = 0; i < count; ++i)
      task.run(task.context, i);
    return;
  }
  if (!shared().pool)
    shared().pool = new Pool(shared().size);
  inside = true;
  shared().pool->run(count, task);
  inside = false;
}

} // namespace penjing
