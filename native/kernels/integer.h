// Layers that compute on integers: int8 weights, activations quantized to bytes on the way in, sums in int32.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/buffer.h"

namespace penjing {

// How activations get their codes.
struct Activation {
  enum Kind {
    affine, // step and zero point from the range of the row (linear) or sample (convolution), zero included
    fixed,  // step and zero as given
    codes,  // x has integers already; zero is their zero point, the step is 1
  } kind;
  float step = 1;
  int zero = 0;
};

// Where results go: sums exactly, or y.
struct Result {
  float *y = nullptr;
  int32_t *sums = nullptr;
};

// Bytes of a weight in panels, and what its sums need to become results.
class Int8Panels {
public:
  // codes (rows, columns) where quad q, byte b is column column_of(4·q + b), or nothing when that is −1.
  // scale (rows); zero_point (rows), bias (rows) or null.
  Int8Panels(const int8_t *codes, int64_t rows, int64_t columns, const std::vector<int64_t> &column_of,
             const float *scale, const int8_t *zero_point, const float *bias);

  const Int8Weight &weight() const { return weight_; }
  const float *scale() const { return scale_.data(); }
  const float *bias() const { return bias_.size() ? bias_.data() : nullptr; }
  int64_t panels() const { return (weight_.rows + lanes - 1) / lanes; }
  int64_t bytes() const;

private:
  Int8Weight weight_{};
  Buffer<int8_t> values_;
  Buffer<int32_t> sum_, zero_point_;
  Buffer<float> scale_, bias_;
};

class IntegerLinear {
public:
  IntegerLinear(const int8_t *codes, int64_t rows, int64_t columns, const float *scale, const int8_t *zero_point,
                const float *bias, bool relu);

  // x (m, columns) → (m, rows).
  void run(const float *x, int64_t m, const Activation &activation, Result result) const;

  const Int8Panels &panels() const { return panels_; }
  const int64_t rows, columns;

private:
  Int8Panels panels_;
  bool relu_;
};

using Size = std::array<int64_t, 3>; // depth, height, width; 1 where a convolution has fewer dimensions

struct ConvShape {
  int64_t outputs, inputs, groups; // channels in all
  Size kernel, stride, padding, dilation;

  // Throws std::invalid_argument when the kernel does not fit.
  Size output(const Size &input) const;
};

class IntegerConv {
public:
  // codes (outputs, inputs / groups, kernel…).
  IntegerConv(const ConvShape &shape, const int8_t *codes, const float *scale, const int8_t *zero_point,
              const float *bias, bool relu);

  // x (n, inputs, input…) → (n, outputs, output…).
  void run(const float *x, int64_t n, const Size &input, const Activation &activation, Result result) const;

  const ConvShape shape;
  int64_t bytes() const;

private:
  struct Plan;
  std::shared_ptr<const Plan> plan(const Size &input) const;
  void run_sample(const Plan &plan, const float *x, const Activation &activation, Result result) const;
  void encode(const Plan &plan, const float *x, float inverse, float zero, uint8_t *bytes, uint8_t border) const;

  std::vector<Int8Panels> parts_; // one a merged group
  int64_t merged_;                // groups that share a part, so that its panels are full
  int64_t blocks_;                // quads of channels in a part
  bool relu_;
  mutable std::mutex mutex_;
  mutable std::shared_ptr<const Plan> plan_;
};

} // namespace penjing
