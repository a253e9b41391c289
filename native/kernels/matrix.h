// A weight (out, in) in the layout of its kernel.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/buffer.h"

namespace penjing {

// Activations (m, columns) that several products share: what one of them has to compute from these, the next one finds.
// The floats must stay where they are; one thread at a time.
class Rows {
public:
  Rows(const float *x, int64_t m, int64_t columns) : x_(x), m_(m), columns_(columns) {}
  Rows(const Rows &) = delete;

  const float *x() const { return x_; }
  int64_t m() const { return m_; }
  int64_t columns() const { return columns_; }

  // Each group of columns with zeros after it, up to `padded` columns; x itself where nothing is added.
  const float *padded(int64_t group, int64_t padded) const;

  // As signed bytes, a step = absmax / span for each segment.
  CodedRows codes(const Segments &segments, float span) const;

private:
  const float *x_;
  int64_t m_, columns_;
  struct Padded {
    int64_t group, padded;
    Buffer<float> values;
  };
  struct Coded {
    Segments segments;
    float span;
    Buffer<int32_t> all; // steps, sums, codes: one allocation, which costs as much as coding a row
  };
  mutable std::list<Padded> padded_;
  mutable std::list<Coded> coded_;
};

struct Stored;
class StoredReader;

// One product among several of the same activations: y (m, matrix rows), its rows y_stride floats apart.
class Matrix;
struct Product {
  const Matrix *matrix;
  const float *bias; // or null
  float *y;
  int64_t y_stride;
};

class Matrix {
public:
  Matrix(int64_t rows, int64_t columns) : rows(rows), columns(columns) {}
  virtual ~Matrix() = default;

  // y (m, rows) = x (m, columns) · weightᵀ + bias (or null), rows of y y_stride floats apart.
  void multiply(const Rows &x, const float *bias, float *y, int64_t y_stride) const;
  // Of some panels of sixteen rows alone, each to the bit what multiply makes of it; only floats have this.
  virtual void multiply_panels(const Rows &x, const std::vector<int64_t> &panels, float *y, int64_t y_stride) const;
  // out (count, columns): the numbers in the given rows, each in [0, rows).
  virtual void decode(const int64_t *wanted, int64_t count, float *out) const = 0;
  virtual int64_t bytes() const = 0; // resident
  virtual std::string layout() const = 0;
  virtual Stored stored() const = 0; // see stored.h

  const int64_t rows, columns;

protected:
  friend void multiply_all(const Rows &x, const Product *products, int count);
  friend class Screen;

  // A product in pieces that threads may do in any order, each once. `prepare` comes first, in the calling thread.
  virtual void prepare(const Rows &x) const = 0;
  virtual int64_t pieces(int64_t m) const = 0;
  virtual void piece(const Rows &x, const Product &product, int64_t index) const = 0;
};

// All products of the same activations (q, k and v, or gate and up), shared by the threads as if they were one.
void multiply_all(const Rows &x, const Product *products, int count);

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

// Activations quantized on the fly to signed bytes, and multiplied as integers (see group.h): a step for up to 128
// columns of a row, absmax / 127; or, per row, one for all, absmax / 127.5, which needs one group of the weight.
std::unique_ptr<Matrix> group_matrix(const Codes &codes, bool per_row, bool sparse);

// MXFP4 (OCP Microscaling Formats 1.0): blocks (rows, columns / 2), two E2M1 codes a byte, the low one first; scale
// (rows, columns / 32), of 32 columns 2^(scale − 127).
std::unique_ptr<Matrix> mxfp4_matrix(const uint8_t *blocks, const uint8_t *scale, int64_t rows, int64_t columns);

} // namespace penjing
