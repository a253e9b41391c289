// Tells damaged bytes from whole ones. Not a defence against somebody who chooses the bytes.
#pragma once

#include <cstdint>

namespace penjing {

constexpr int64_t checksum_block = 1 << 20;

// Of one block. Every step is a bijection of the sum, so a change of a single word always shows.
uint64_t checksum(const uint8_t *bytes, int64_t size);

// Of bytes of any length, from the sums of their blocks of checksum_block bytes (the last may be shorter).
uint64_t checksum_of(const uint64_t *blocks, int64_t count, int64_t size);

// The same from the bytes, blocks shared by the threads.
uint64_t checksum_all(const uint8_t *bytes, int64_t size);

} // namespace penjing
