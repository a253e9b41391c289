#include "kernels/screen.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>

#include "bindings/arrays.h"

namespace penjing::bindings {
namespace {

// values: the bits of the floats, uint32 or uint16, (rows, columns).
std::unique_ptr<Matrix> from_floats(const In &values, bool bfloat16, bool sparse) {
  const bool wide = values.dtype() == nb::dtype<uint32_t>();
  const void *bits = wide ? static_cast<const void *>(checked<uint32_t>(values, "weight", {any, any}))
                          : checked<uint16_t>(values, "weight", {any, any});
  const Float type = wide ? Float::f32 : bfloat16 ? Float::bf16 : Float::f16;
  const auto rows = static_cast<int64_t>(values.shape(0)), columns = static_cast<int64_t>(values.shape(1));
  require(rows > 0 && columns > 0, "weight: an empty matrix");
  nb::gil_scoped_release release;
  return float_matrix(bits, type, rows, columns, sparse);
}

// codes (rows, columns); scale and zero_point (rows, groups).
std::unique_ptr<Matrix> from_codes(const In &codes, int bits, const In &scale, const MaybeIn &zero_point,
                                   const std::string &activations, bool sparse) {
  const int8_t *values = checked<int8_t>(codes, "codes", {any, any});
  const auto rows = static_cast<int64_t>(codes.shape(0)), columns = static_cast<int64_t>(codes.shape(1));
  require(rows > 0 && columns > 0, "codes: an empty matrix");
  require(bits >= 2 && bits <= 8, "bits: give 2 to 8");
  const float *steps = checked<float>(scale, "scale", {rows, any});
  const auto groups = static_cast<int64_t>(scale.shape(1));
  require(groups > 0 && columns % groups == 0, "scale: its groups do not divide the columns");
  const bool per_row = activations == "int8";
  require(!per_row || groups == 1, "scale: activations with one step a row need one group a row");
  const Codes c{values, rows, columns, groups, bits, steps, checked<int8_t>(zero_point, "zero_point", {rows, groups})};
  nb::gil_scoped_release release;
  return activations == "float" ? coded_matrix(c, sparse) : group_matrix(c, per_row, sparse);
}

std::unique_ptr<Matrix> from_mxfp4(const In &blocks, const In &scale) {
  const auto *codes = checked<uint8_t>(blocks, "blocks", {any, any});
  const auto rows = static_cast<int64_t>(blocks.shape(0)), columns = 2 * static_cast<int64_t>(blocks.shape(1));
  require(rows > 0 && columns > 0, "blocks: an empty matrix");
  require(columns % 32 == 0, "blocks: give a multiple of 16 bytes a row");
  const auto *exponents = checked<uint8_t>(scale, "scale", {rows, columns / 32});
  nb::gil_scoped_release release;
  return mxfp4_matrix(codes, exponents, rows, columns);
}

nb::object multiply(const Matrix &matrix, const In &x, const MaybeIn &bias, nb::handle out) {
  const float *from = checked<float>(x, "x", {any, matrix.columns});
  const float *added = checked<float>(bias, "bias", {matrix.rows});
  const size_t shape[] = {x.shape(0), static_cast<size_t>(matrix.rows)};
  float *y;
  nb::object result = output(out, shape, 2, &y);
  {
    nb::gil_scoped_release release;
    matrix.multiply(Rows(from, static_cast<int64_t>(x.shape(0)), matrix.columns), added, y, matrix.rows);
  }
  return result;
}

nb::object decode(const Matrix &matrix, const In &rows) {
  const int64_t *wanted = checked<int64_t>(rows, "rows", {any});
  const size_t shape[] = {rows.shape(0), static_cast<size_t>(matrix.columns)};
  for (size_t i = 0; i < shape[0]; ++i)
    require(wanted[i] >= 0 && wanted[i] < matrix.rows,
            "rows: " + std::to_string(wanted[i]) + " is not in [0, " + std::to_string(matrix.rows) + ")");
  float *values;
  nb::object result = numpy_array(shape, 2, &values);
  nb::gil_scoped_release release;
  matrix.decode(wanted, static_cast<int64_t>(shape[0]), values);
  return result;
}

std::unique_ptr<Screen> screen_of(const Matrix &floats) {
  require(Screen::can_be_of(floats), "matrix: only floats are screened");
  nb::gil_scoped_release release;
  return std::make_unique<Screen>(floats);
}

// Of each row of x the greatest product of `floats`, int64 (rows,), and how many panels were computed; None where one
// may not be finite.
nb::object greatest(const Screen &screen, const Matrix &floats, const In &x, float scale) {
  require(screen.fits(floats), "matrix: the screen is another's");
  const float *from = checked<float>(x, "x", {any, floats.columns});
  const size_t shape[] = {x.shape(0)};
  const auto m = static_cast<int64_t>(shape[0]);
  require(m > 0 && m <= screen_rows, "x: give 1 to " + std::to_string(screen_rows) + " rows");
  int64_t *found, panels;
  nb::object result = numpy_array(shape, 1, &found);
  {
    nb::gil_scoped_release release;
    Buffer<float> work(3 * m * floats.rows);
    panels = screen.greatest(floats, Rows(from, m, floats.columns), scale, work.data(), found);
  }
  return panels ? nb::object(nb::make_tuple(result, panels)) : nb::none();
}

} // namespace

void matrix(nb::module_ &m) {
  nb::class_<Matrix>(m, "Matrix")
      .def_ro("rows", &Matrix::rows)
      .def_ro("columns", &Matrix::columns)
      .def_prop_ro("nbytes", &Matrix::bytes)
      .def_prop_ro("layout", &Matrix::layout)
      .def("multiply", &multiply, nb::arg("x"), nb::arg("bias").none() = nb::none(), nb::arg("out") = nb::none())
      .def("decode", &decode, nb::arg("rows"));
  nb::class_<Screen, Matrix>(m, "Screen")
      .def("greatest", &greatest, nb::arg("matrix"), nb::arg("x"), nb::arg("scale") = 1.0f);
  m.def("screen_of", &screen_of, nb::arg("matrix"));
  m.def("matrix_from_floats", &from_floats, nb::arg("values"), nb::arg("bfloat16"), nb::arg("sparse"));
  m.def("matrix_from_codes", &from_codes, nb::arg("codes"), nb::arg("bits"), nb::arg("scale"),
        nb::arg("zero_point").none(), nb::arg("activations"), nb::arg("sparse"));
  m.def("matrix_from_mxfp4", &from_mxfp4, nb::arg("blocks"), nb::arg("scale"));
}

} // namespace penjing::bindings
