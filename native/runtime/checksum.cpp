#include "runtime/checksum.h"

#include <bit>
#include <cstring>
#include <vector>

#include "runtime/pool.h"

namespace penjing {
namespace {

constexpr int streams = 8; // multiplications that do not wait for each other

// The multiplication carries a change to higher bits, the rotation brings these down again.
inline uint64_t mixed(uint64_t sum, uint64_t word) { return std::rotl((sum ^ word) * 0x9E3779B97F4A7C15, 31); }

} // namespace

uint64_t checksum(const uint8_t *bytes, int64_t size) {
  uint64_t sums[streams];
  for (int i = 0; i < streams; ++i)
    sums[i] = static_cast<uint64_t>(i);
  constexpr int64_t step = streams * 8;
  int64_t at = 0;
  for (; at + step <= size; at += step)
    for (int i = 0; i < streams; ++i) {
      uint64_t word;
      std::memcpy(&word, bytes + at + 8 * i, 8);
      sums[i] = mixed(sums[i], word);
    }
  uint64_t sum = static_cast<uint64_t>(size);
  for (uint64_t each : sums)
    sum = mixed(sum, each);
  for (; at < size; at += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, static_cast<size_t>(size - at < 8 ? size - at : 8));
    sum = mixed(sum, word);
  }
  return mixed(mixed(sum, 0), 0);
}

uint64_t checksum_of(const uint64_t *blocks, int64_t count, int64_t size) {
  uint64_t sum = static_cast<uint64_t>(size);
  for (int64_t i = 0; i < count; ++i)
    sum = mixed(sum, blocks[i]);
  return mixed(mixed(sum, 0), 0);
}

uint64_t checksum_all(const uint8_t *bytes, int64_t size) {
  std::vector<uint64_t> blocks(static_cast<size_t>((size + checksum_block - 1) / checksum_block));
  parallel_for(static_cast<int64_t>(blocks.size()), [&](int64_t i) {
    const int64_t begin = i * checksum_block;
    blocks[static_cast<size_t>(i)] =
        checksum(bytes + begin, size - begin < checksum_block ? size - begin : checksum_block);
  });
  return checksum_of(blocks.data(), static_cast<int64_t>(blocks.size()), size);
}

} // namespace penjing
