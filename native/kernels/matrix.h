// A weight (out, in) in the layout of its kernel.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kernels/kernels.h"

namespace penjing {

class Matrix {
public:
  Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns) {}
  virtual ~Matrix() = default;

  // y (m, rows) = x (m, columns) · weightᵀ + bias (or null).
  virtual void multiply(const float *x, int64_t m, const float *bias, float *y) const = 0;
  // out (count, columns): the numbers in the given rows, each in [0, rows).
  virtual void decode(const int64_t *wanted, int64_t count, float *out) const = 0;
  virtual int64_t bytes() const = 0; // resident
  virtual std::string layout() const = 0;

  const int64_t rows, columns;
};

// Integers on a grid: codes (rows, columns) of 2 to 8 bits; scale and zero_point (rows, groups), the latter or null.
struct Codes {
  const int8_t *codes;
  int64_t rows, columns, groups;
  int bits;
  const float *scale;
  const int8_t *zero_point;
};

// Float activations; values of the given type, or codes of 2, 3, 4 bits packed so, of more as bytes.
std::unique_ptr<Matrix> float_matrix(const void *values, Float type, int64_t rows, int64_t columns, bool sparse);
std::unique_ptr<Matrix> coded_matrix(const Codes &codes, bool sparse);

// Each row of x quantized on the fly to int8, s = absmax / 127.5, and multiplied as integers. One group.
std::unique_ptr<Matrix> integer_matrix(const Codes &codes, bool sparse);

} // namespace penjing
