#include "kernels/stored.h"

#include <cstring>

namespace penjing {

StoredReader::StoredReader(uint8_t *bytes, int64_t size, std::shared_ptr<const void> owner) : owner_(std::move(owner)) {
  constexpr int64_t head = sizeof(StoredHeader), most = int64_t{1} << 40;
  check(size >= head, "too short");
  std::memcpy(&header_, bytes, sizeof header_);
  check(header_.rows > 0 && header_.columns > 0 && header_.rows <= most / header_.columns, "its shape");
  int64_t at = head;
  for (int i = 0; i < stored_arrays; ++i) {
    check(header_.bytes[i] >= 0 && header_.bytes[i] <= size - at, "an array that ends after it");
    at_[i] = bytes + at;
    at += padded_to_line(header_.bytes[i]);
    check(at <= size, "an array that ends after it");
  }
  check(at == size, "bytes that belong to no array");
}

int64_t StoredReader::number(int index, int64_t low, int64_t high) const {
  const int64_t value = header_.numbers[index];
  check(value >= low && value <= high, "a number out of range");
  return value;
}

std::unique_ptr<Matrix> restored(uint8_t *bytes, int64_t size, std::shared_ptr<const void> owner) {
  const StoredReader reader(bytes, size, std::move(owner));
  switch (reader.header().stock) {
  case Stock::floats: return restored_floats(reader);
  case Stock::groups: return restored_groups(reader);
  case Stock::screen: return restored_screen(reader);
  }
  throw Damaged("not a stored matrix: of no known kind");
}

} // namespace penjing
