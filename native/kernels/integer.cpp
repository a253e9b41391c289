#include "kernels/integer.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/fit.h"
#include "runtime/pool.h"

namespace penjing {
namespace {

// Products of fewer multiplications than this are done before another thread would have woken.
constexpr int64_t worth_sharing = 1 << 20;

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

} // namespace

Int8Panels::Int8Panels(const int8_t *codes, int64_t rows, int64_t columns, const std::vector<int64_t> &column_of,
                       const float *scale, const int8_t *zero_point, const float *bias) {
  const int64_t padded = round_up(rows, lanes), quads = static_cast<int64_t>(column_of.size()) / 4;
  values_ = Buffer<int8_t>(padded * quads * 4);
  sum_ = Buffer<int32_t>(padded);
  scale_ = Buffer<float>(padded);
  zero_point_ = Buffer<int32_t>(zero_point ? padded : 0);
  bias_ = Buffer<float>(bias ? padded : 0);
  for (int64_t row = 0; row < padded; ++row) {
    const bool real = row < rows;
    const int zero = real && zero_point ? zero_point[row] : 0;
    int32_t sum = 0;
    for (int64_t i = 0; i < 4 * quads; ++i) {
      const bool has = real && column_of[i] >= 0;
      const int8_t code = has ? codes[row * columns + column_of[i]] : int8_t{0};
      sum += has ? code - zero : 0;
      values_[((row / lanes * quads + i / 4) * lanes + row % lanes) * 4 + i % 4] = code;
    }
    sum_[row] = sum;
    scale_[row] = real ? scale[row] : 0;
    if (zero_point)
      zero_point_[row] = zero;
    if (bias)
      bias_[row] = real ? bias[row] : 0;
  }
  const int64_t real = std::count_if(column_of.begin(), column_of.end(), [](int64_t column) { return column >= 0; });
  weight_ = {rows, quads, real, values_.data(), sum_.data(), zero_point ? zero_point_.data() : nullptr};
}

int64_t Int8Panels::bytes() const {
  return values_.bytes() + sum_.bytes() + zero_point_.bytes() + scale_.bytes() + bias_.bytes();
}

static std::vector<int64_t> columns_in_order(int64_t columns) {
  std::vector<int64_t> order(static_cast<size_t>(round_up(columns, 4)), -1);
  std::iota(order.begin(), order.begin() + columns, 0);
  return order;
}

IntegerLinear::IntegerLinear(const int8_t *codes, int64_t rows, int64_t columns, const float *scale,
                             const int8_t *zero_point, const float *bias, bool relu)
    : rows(rows), columns(columns), panels_(codes, rows, columns, columns_in_order(columns), scale, zero_point, bias),
      relu_(relu) {}

void IntegerLinear::run(const float *x, int64_t m, const Activation &activation, Result result) const {
  struct Bytes;
  struct Steps;
  struct Zeros;
  const Int8Weight &weight = panels_.weight();
  const int64_t width = 4 * weight.quads;
  auto *bytes = scratch<uint8_t, Bytes>(m * width);
  auto *steps = scratch<float, Steps>(m);
  auto *zeros = scratch<int32_t, Zeros>(m);
  const auto encode = [&](int64_t row) {
    const Step step = fit(x + row * columns, columns, activation);
    kernels().encode_bytes(x + row * columns, columns, step.inverse, step.bias, bytes + row * width);
    std::memset(bytes + row * width + columns, 0, static_cast<size_t>(width - columns));
    steps[row] = step.step;
    zeros[row] = step.zero;
  };
  const Int8Product product{&weight,         bytes,          nullptr, nullptr,  zeros,       steps, 1,
                            panels_.scale(), panels_.bias(), relu_,   result.y, result.sums, rows,  1};
  if (m * rows * columns < worth_sharing) {
    for (int64_t row = 0; row < m; ++row)
      encode(row);
    return kernels().int8_product(product, 0, panels_.panels(), 0, m);
  }
  if (m * columns < worth_sharing / 16)
    for (int64_t row = 0; row < m; ++row)
      encode(row);
  else
    parallel_for(m, encode);
  const int64_t pieces = std::min<int64_t>((panels_.panels() + 3) / 4, 4 * threads());
  const int64_t block = round_up((panels_.panels() + pieces - 1) / pieces, 4);
  const int64_t row_pieces = std::clamp<int64_t>(2 * threads() / pieces, 1, (m + 23) / 24);
  const int64_t row_block = round_up((m + row_pieces - 1) / row_pieces, 24);
  parallel_for(pieces * row_pieces, [&](int64_t i) {
    const int64_t panel = i / row_pieces * block, row = i % row_pieces * row_block;
    if (panel < panels_.panels() && row < m)
      kernels().int8_product(product, panel, std::min(panel + block, panels_.panels()), row,
                             std::min(row + row_block, m));
  });
}

} // namespace penjing
