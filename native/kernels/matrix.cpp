#include "kernels/matrix.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "runtime/pool.h"

namespace penjing {
namespace {

// Products of fewer multiplications than this are done before another thread would have woken.
constexpr int64_t worth_sharing = 1 << 18;

} // namespace

const float *Rows::padded(int64_t group, int64_t padded) const {
  if (group == padded)
    return x_;
  for (const Padded &have : padded_)
    if (have.group == group && have.padded == padded)
      return have.values.data();
  const int64_t groups = m_ * (columns_ / group);
  padded_.push_back({group, padded, Buffer<float>(groups * padded)});
  float *out = padded_.back().values.data();
  for (int64_t i = 0; i < groups; ++i, out += padded) {
    std::copy(x_ + i * group, x_ + (i + 1) * group, out);
    std::fill(out + group, out + padded, 0.0f);
  }
  return padded_.back().values.data();
}

CodedRows Rows::codes(const Segments &segments, float span) const {
  const int64_t count = columns_ / segments.group * segments.parts, stride = count * segments.length;
  const auto view = [&](Coded &c) {
    return CodedRows{reinterpret_cast<int8_t *>(c.all.data() + 2 * m_ * count), stride,
                     reinterpret_cast<float *>(c.all.data()), c.all.data() + m_ * count, count};
  };
  for (Coded &have : coded_)
    if (have.segments == segments && have.span == span)
      return view(have);
  coded_.push_back({segments, span, Buffer<int32_t>(m_ * (2 * count + stride / 4))});
  int32_t *all = coded_.back().all.data();
  const float least = span > 127 ? -128 : -127;
  const auto encode = [&](int64_t row) {
    auto *codes = reinterpret_cast<int8_t *>(all + 2 * m_ * count);
    kernels().encode_segments(x_ + row * columns_, columns_, segments, span, least, codes + row * stride,
                              reinterpret_cast<float *>(all) + row * count, all + (m_ + row) * count);
  };
  constexpr int64_t worth_sharing = 1 << 16; // floats
  constexpr int64_t together = 8;            // rows
  if (m_ * columns_ >= worth_sharing)
    parallel_for((m_ + together - 1) / together, [&](int64_t i) {
      for (int64_t row = i * together; row < std::min(m_, (i + 1) * together); ++row)
        encode(row);
    });
  else
    for (int64_t row = 0; row < m_; ++row)
      encode(row);
  return view(coded_.back());
}

void Matrix::multiply(const Rows &x, const float *bias, float *y, int64_t y_stride) const {
  const Product product{this, bias, y, y_stride};
  multiply_all(x, &product, 1);
}

void Matrix::multiply_panels(const Rows &, const std::vector<int64_t> &, float *, int64_t) const {
  throw std::logic_error(layout() + " has no product of some panels alone");
}

void multiply_all(const Rows &x, const Product *products, int count) {
  if (x.m() == 0)
    return;
  int64_t work = 0, total = 0;
  std::vector<int64_t> end; // of each product's pieces
  for (int i = 0; i < count; ++i) {
    const Matrix &matrix = *products[i].matrix;
    matrix.prepare(x);
    end.push_back(total += matrix.pieces(x.m()));
    work += x.m() * matrix.rows * matrix.columns;
  }
  const auto task = [&](int64_t index) {
    const auto i = std::upper_bound(end.begin(), end.end(), index) - end.begin();
    products[i].matrix->piece(x, products[i], index - (i ? end[i - 1] : 0));
  };
  if (work >= worth_sharing)
    return parallel_for(total, task);
  for (int64_t index = 0; index < total; ++index)
    task(index);
}

} // namespace penjing
