// The floats that a step works in: allocated once, and counted by the same code that lays them out.
#pragma once

#include <algorithm>
#include <cstdint>

#include "runtime/buffer.h"

namespace penjing {

class Memory {
public:
  Memory() = default;                                                  // counts only: pointers are null
  explicit Memory(int64_t floats) : counts_(false), floats_(floats) {} // uninitialised

  float *take(int64_t floats) {
    float *at = counts_ ? nullptr : floats_.data() + used_;
    used_ += (floats + 15) / 16 * 16;
    most_ = std::max(most_, used_);
    return at;
  }
  int64_t used() const { return used_; }
  void release(int64_t used) { used_ = used; } // what was taken since
  int64_t most() const { return most_; }       // floats that were taken at once
  int64_t size() const { return floats_.size(); }

private:
  bool counts_ = true;
  Buffer<float> floats_;
  int64_t used_ = 0, most_ = 0;
};

// Floats that a part takes at once, by the struct that lays them out.
template <class Floats, class... Arguments>
int64_t count_floats(const Arguments &...arguments) {
  Memory counted;
  Floats(counted, arguments...);
  return counted.most();
}

} // namespace penjing
