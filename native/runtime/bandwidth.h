// How fast this machine's memory is read.
#pragma once

#include <cstdint>

namespace penjing {

// Bytes a second that all threads together read of so much memory, one after the other: the best of some rounds. The
// memory should be many times the caches'.
double read_bandwidth(int64_t bytes, int rounds);

} // namespace penjing
