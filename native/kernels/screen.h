// The greatest product of a float matrix with a row, found by half of its bytes.
//
// A copy in 8 bits (a step for 128 columns) gives every product to within a bound that is proven, not estimated. Only
// rows whose upper bound reaches the best lower one can be the greatest; these alone are computed in floats, by the
// same code as all of them would be. For weights w and their copy v, inputs x and what was multiplied for them z:
//
//   |w · x − v · z|  ≤  |w − v| |x| + |v| |x − z|     (Cauchy and Schwarz), and what floats round on the way.
//
// x is taken as the sum of two rows of bytes, the second one for what the first leaves, so that the first term is all.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/matrix.h"
#include "runtime/buffer.h"

namespace penjing {

constexpr int64_t screen_rows = 8; // of x, at most: two rows of bytes each still share one pass over the weights

// As a matrix it is the copy: columns are padded with zeros to a multiple of 128.
class Screen final : public Matrix {
public:
  explicit Screen(const Matrix &floats);
  explicit Screen(const StoredReader &in);

  static bool can_be_of(const Matrix &matrix) { return matrix.layout().find("float") != std::string::npos; }
  // Can it be the screen of that one, by its kind and shape?
  bool fits(const Matrix &floats) const;

  // Of each row of x (at most screen_rows) the row of `floats`, the matrix that this was made of, for which
  // scale · product is the greatest: the first of equals, to the bit as floats.multiply computes them. scale: from
  // 2^-20 to 2^20. work: 3 · m · rows floats. Returns how many panels were computed in floats; 0, and nothing found,
  // where a product might not be finite.
  int64_t greatest(const Matrix &floats, const Rows &x, float scale, float *work, int64_t *found) const;

  void decode(const int64_t *wanted, int64_t count, float *out) const override { codes_->decode(wanted, count, out); }
  int64_t bytes() const override { return codes_->bytes() + error_.bytes() + length_.bytes(); }
  std::string layout() const override { return "screen"; }
  Stored stored() const override;

protected:
  void prepare(const Rows &x) const override { codes_->prepare(x); }
  int64_t pieces(int64_t m) const override { return codes_->pieces(m); }
  void piece(const Rows &x, const Product &product, int64_t index) const override { codes_->piece(x, product, index); }

private:
  // How far a product can be from the one in bytes: error · of_error + length · of_length + least.
  struct Bound {
    float of_error, of_length, least;
  };
  bool bound(const float *x, const CodedRows &coded, int64_t m, int64_t true_columns, Bound *bounds) const;
  std::vector<int64_t> reaching(const float *products, const Bound *bounds, int64_t m) const;
  void find_longest();

  std::unique_ptr<Matrix> codes_;
  Buffer<float> error_, length_; // of each row: |w − v| and |v|
  float longest_ = 0;            // the greatest of their sums
};

} // namespace penjing
