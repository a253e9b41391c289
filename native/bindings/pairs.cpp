#include <algorithm>

#include "bindings/arrays.h"
#include "kernels/pairs.h"

namespace penjing::bindings {

namespace {

void gram_of(const In &x, const Out &total) {
  const uint16_t *rows = checked<uint16_t>(x, "x", {any, any});
  const auto count = static_cast<int64_t>(x.shape(0)), columns = static_cast<int64_t>(x.shape(1));
  float *sums = checked<float>(total, "total", {columns, columns});
  require(has_pairs(), "this processor has no products of pairs");
  nb::gil_scoped_release release;
  add_gram({rows, true, count, columns, columns}, sums);
}

PairRows all_rows(const float *values, int64_t rows, int64_t columns) {
  return {values, false, rows, columns, columns};
}

// Rows [low, high) become those of values, which has all rows.
void put(PairMatrix &matrix, const In &values, int64_t low, int64_t high) {
  const float *rows = checked<float>(values, "values", {matrix.rows(), matrix.columns()});
  require(0 <= low && low <= high && high <= matrix.rows(), "low, high: rows of values");
  nb::gil_scoped_release release;
  matrix.put(all_rows(rows, matrix.rows(), matrix.columns()), low, high);
}

void make(PairMatrix *self, const In &values) {
  const float *rows = checked<float>(values, "values", {any, any});
  require(has_pairs(), "this processor has no products of pairs");
  nb::gil_scoped_release release;
  new (self) PairMatrix(all_rows(rows, static_cast<int64_t>(values.shape(0)), static_cast<int64_t>(values.shape(1))));
}

// Columns [low, high) of a, transposed, times as many first rows as a has.
nb::object product(const PairMatrix &matrix, const In &a, int64_t low, int64_t high) {
  const float *left = checked<float>(a, "a", {any, any});
  const auto rows = static_cast<int64_t>(a.shape(0)), stride = static_cast<int64_t>(a.shape(1));
  require(rows <= matrix.rows(), "a: more rows than there are");
  require(0 <= low && low < high && high <= stride, "low, high: columns of a");
  const size_t shape[] = {static_cast<size_t>(high - low), static_cast<size_t>(matrix.columns())};
  float *sums;
  nb::object result = numpy_array(shape, 2, &sums);
  nb::gil_scoped_release release;
  std::fill_n(sums, (high - low) * matrix.columns(), 0.0f);
  matrix.add_product({left + low, false, rows, high - low, stride}, sums);
  return result;
}

} // namespace

void pairs(nb::module_ &m) {
  m.def("has_pairs", &has_pairs);
  m.def("add_gram", &gram_of, nb::arg("x"), nb::arg("total"));
  nb::class_<PairMatrix>(m, "PairMatrix")
      .def("__init__", &make, nb::arg("values"))
      .def("put", &put, nb::arg("values"), nb::arg("low"), nb::arg("high"))
      .def("product", &product, nb::arg("a"), nb::arg("low"), nb::arg("high"));
}

} // namespace penjing::bindings
