// Memory for vectors: aligned to a cache line, with room to read one vector past its end.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace penjing {

template <class T>
class Buffer {
public:
  Buffer() = default;

  // Uninitialised.
  explicit Buffer(int64_t size) : size_(size) {
    constexpr size_t line = 64, huge = size_t{2} << 20;
    const size_t bytes = static_cast<size_t>(size) * sizeof(T) + 2 * line;
    const size_t alignment = bytes >= huge ? huge : line;
    data_ = static_cast<T *>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment));
    if (!data_)
      throw std::bad_alloc();
#if defined(__linux__)
    // Streams of weights: fewer misses of the address cache. From 2 MiB instead of 4 on, a model that was just packed
    // (1.1 billion int4, whose queries take 2.1 MiB a layer) wrote 1.05 times the tokens a second.
    if (alignment == huge)
      madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }

  // A part of what `owner` keeps alive; there must be room after it too.
  Buffer(T *data, int64_t size, std::shared_ptr<const void> owner)
      : data_(data), size_(size), owner_(std::move(owner)) {}

  Buffer(Buffer &&other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)),
        owner_(std::move(other.owner_)) {}
  Buffer &operator=(Buffer &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(owner_, other.owner_);
    return *this;
  }
  ~Buffer() {
    if (!owner_)
      std::free(data_);
  }

  T *data() { return data_; }
  const T *data() const { return data_; }
  T &operator[](int64_t i) { return data_[i]; }
  const T &operator[](int64_t i) const { return data_[i]; }
  T *begin() { return data_; }
  T *end() { return data_ + size_; }
  int64_t size() const { return size_; }
  int64_t bytes() const { return size_ * static_cast<int64_t>(sizeof(T)); }

private:
  T *data_ = nullptr;
  int64_t size_ = 0;
  std::shared_ptr<const void> owner_; // null: this buffer itself
};

// A buffer of the calling thread that keeps its memory between calls; Tag tells apart those alive at the same time.
template <class T, class Tag>
T *scratch(int64_t size) {
  thread_local Buffer<T> buffer;
  if (buffer.size() < size)
    buffer = Buffer<T>(size + size / 4);
  return buffer.data();
}

} // namespace penjing
