// A matrix as bytes, from which it is made again without packing: a header, then its arrays, each padded to a cache
// line. The same for every instruction set. What is read is checked: no number in it makes a kernel leave its arrays.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/matrix.h"

namespace penjing {

constexpr int64_t stored_layout = 3; // another one whenever the bytes that any kernel reads change

class Damaged : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

constexpr int stored_arrays = 6;
enum class Stock : int64_t { floats = 1, groups = 2, screen = 3 }; // which class it is

struct StoredHeader {
  Stock stock;
  int64_t rows, columns, numbers[7], bytes[stored_arrays]; // of the arrays, without padding
};
static_assert(sizeof(StoredHeader) == 128);

struct Stored {
  StoredHeader header{};
  const void *arrays[stored_arrays] = {};

  template <class T>
  void add(int index, const Buffer<T> &array) {
    header.bytes[index] = array.bytes();
    arrays[index] = array.data();
  }
};

// The bytes of one matrix, read as what they must be. The arrays stay where they are, and keep `owner` alive.
class StoredReader {
public:
  StoredReader(uint8_t *bytes, int64_t size, std::shared_ptr<const void> owner);

  const StoredHeader &header() const { return header_; }
  // A number that must be in [low, high].
  int64_t number(int index, int64_t low, int64_t high) const;
  bool has(int index) const { return header_.bytes[index] > 0; }
  // An array that must have so many elements.
  template <class T>
  Buffer<T> array(int index, int64_t count) const {
    check(header_.bytes[index] == count * static_cast<int64_t>(sizeof(T)), "an array of another size");
    return count ? Buffer<T>(reinterpret_cast<T *>(at_[index]), count, owner_) : Buffer<T>();
  }
  // Bytes, as many as there are; never null.
  Buffer<uint8_t> bytes(int index) const { return {at_[index], header_.bytes[index], owner_}; }
  static void check(bool holds, const char *what) {
    if (!holds)
      throw Damaged(std::string("not a stored matrix: ") + what);
  }

private:
  StoredHeader header_;
  uint8_t *at_[stored_arrays] = {};
  std::shared_ptr<const void> owner_;
};

constexpr int64_t padded_to_line(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Throws Damaged.
std::unique_ptr<Matrix> restored(uint8_t *bytes, int64_t size, std::shared_ptr<const void> owner);
std::unique_ptr<Matrix> restored_floats(const StoredReader &reader);
std::unique_ptr<Matrix> restored_groups(const StoredReader &reader);
std::unique_ptr<Matrix> restored_screen(const StoredReader &reader);

} // namespace penjing
