#include "kernels/integer.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <variant>

#include "bindings/arrays.h"

namespace penjing::bindings {
namespace {

using PerDimension = std::variant<int64_t, std::vector<int64_t>>;

// scale (rows) or (1): one for each row.
std::vector<float> each_row(const In &scale, int64_t rows) {
  const float *values = checked<float>(scale, "scale", {scale.ndim() && scale.shape(0) == 1 ? 1 : rows});
  if (scale.shape(0) == 1)
    return std::vector<float>(static_cast<size_t>(rows), values[0]);
  return std::vector<float>(values, values + rows);
}

Activation activation(std::optional<float> step, int zero) {
  if (!step)
    return {Activation::affine};
  require(*step > 0, "step: give a positive number, or None for a dynamic range");
  require(zero >= -128 && zero <= 127, "zero: give −128 to 127");
  return {Activation::fixed, *step, zero};
}

// A convolution of one to three dimensions as one of three.
Size spatial(const PerDimension &given, size_t dims, int64_t filler, int64_t least, const char *what) {
  Size size{filler, filler, filler};
  const auto *list = std::get_if<std::vector<int64_t>>(&given);
  require(!list || list->size() == dims, std::string(what) + ": give one number, or one a dimension");
  for (size_t i = 0; i < dims; ++i) {
    size[3 - dims + i] = list ? (*list)[i] : std::get<int64_t>(given);
    require(size[3 - dims + i] >= least, std::string(what) + ": give at least " + std::to_string(least));
  }
  return size;
}

void make_linear(IntegerLinear *self, const In &codes, const In &scale, const MaybeIn &zero_point, const MaybeIn &bias,
                 bool relu) {
  const int8_t *values = checked<int8_t>(codes, "codes", {any, any});
  const auto rows = static_cast<int64_t>(codes.shape(0)), columns = static_cast<int64_t>(codes.shape(1));
  require(rows > 0 && columns > 0, "codes: an empty matrix");
  new (self)
      IntegerLinear(values, rows, columns, each_row(scale, rows).data(),
                    checked<int8_t>(zero_point, "zero_point", {rows}), checked<float>(bias, "bias", {rows}), relu);
}

nb::object call_linear(const IntegerLinear &layer, const In &x, std::optional<float> step, int zero, nb::handle out) {
  const float *from = checked<float>(x, "x", {any, layer.columns});
  const size_t shape[] = {x.shape(0), static_cast<size_t>(layer.rows)};
  const auto m = static_cast<int64_t>(shape[0]);
  const Activation how = activation(step, zero);
  float *y;
  nb::object result = output(out, shape, 2, &y);
  nb::gil_scoped_release release;
  layer.run(from, m, how, {y, nullptr});
  return result;
}

std::vector<float> as_floats(const int8_t *codes, int64_t size) { return {codes, codes + size}; }

nb::object linear_sums(const IntegerLinear &layer, const In &codes, int zero) {
  const int8_t *from = checked<int8_t>(codes, "x_codes", {any, layer.columns});
  const size_t shape[] = {codes.shape(0), static_cast<size_t>(layer.rows)};
  require(zero >= -128 && zero <= 127, "zero: give −128 to 127");
  int32_t *sums;
  nb::object result = numpy_array(shape, 2, &sums);
  nb::gil_scoped_release release;
  const auto m = static_cast<int64_t>(shape[0]);
  layer.run(as_floats(from, m * layer.columns).data(), m, {Activation::codes, 1, zero}, {nullptr, sums});
  return result;
}

// The bound class: the layer, and how many dimensions Python sees.
struct Conv {
  size_t dims;
  IntegerConv layer;
};

void make_conv(Conv *self, const In &codes, const In &scale, const MaybeIn &zero_point, const MaybeIn &bias,
               const PerDimension &stride, const PerDimension &padding, const PerDimension &dilation, int64_t groups,
               bool relu) {
  require(codes.ndim() >= 3 && codes.ndim() <= 5, "codes: give (out, in / groups, *kernel), one to three dimensions");
  const size_t dims = codes.ndim() - 2;
  const int64_t anything[] = {any, any, any, any, any};
  const int8_t *values = checked<int8_t>(codes, "codes", anything, dims + 2);
  require(codes.size() > 0, "codes: an empty kernel");
  const auto outputs = static_cast<int64_t>(codes.shape(0));
  require(groups > 0 && outputs % groups == 0, "groups: does not divide the output channels");
  Size kernel{1, 1, 1};
  for (size_t i = 0; i < dims; ++i)
    kernel[3 - dims + i] = static_cast<int64_t>(codes.shape(2 + i));
  const ConvShape shape{outputs,
                        static_cast<int64_t>(codes.shape(1)) * groups,
                        groups,
                        kernel,
                        spatial(stride, dims, 1, 1, "stride"),
                        spatial(padding, dims, 0, 0, "padding"),
                        spatial(dilation, dims, 1, 1, "dilation")};
  new (self) Conv{dims,
                  {shape, values, each_row(scale, outputs).data(), checked<int8_t>(zero_point, "zero_point", {outputs}),
                   checked<float>(bias, "bias", {outputs}), relu}};
}

struct Sizes {
  Size input;
  size_t output[5]; // n, channels, spatial
};

template <class T>
const T *conv_input(const Conv &conv, const In &x, Sizes &sizes) {
  const int64_t shape[] = {any, conv.layer.shape.inputs, any, any, any};
  const T *from = checked<T>(x, "x", shape, conv.dims + 2);
  sizes.input = {1, 1, 1};
  for (size_t i = 0; i < conv.dims; ++i)
    sizes.input[3 - conv.dims + i] = static_cast<int64_t>(x.shape(2 + i));
  const Size output = conv.layer.shape.output(sizes.input);
  sizes.output[0] = x.shape(0);
  sizes.output[1] = static_cast<size_t>(conv.layer.shape.outputs);
  for (size_t i = 0; i < conv.dims; ++i)
    sizes.output[2 + i] = static_cast<size_t>(output[3 - conv.dims + i]);
  return from;
}

nb::object call_conv(const Conv &conv, const In &x, std::optional<float> step, int zero, nb::handle out) {
  Sizes sizes;
  const float *from = conv_input<float>(conv, x, sizes);
  const Activation how = activation(step, zero);
  float *y;
  nb::object result = output(out, sizes.output, conv.dims + 2, &y);
  nb::gil_scoped_release release;
  conv.layer.run(from, static_cast<int64_t>(x.shape(0)), sizes.input, how, {y, nullptr});
  return result;
}

nb::object conv_sums(const Conv &conv, const In &codes, int zero) {
  Sizes sizes;
  const int8_t *from = conv_input<int8_t>(conv, codes, sizes);
  require(zero >= -128 && zero <= 127, "zero: give −128 to 127");
  int32_t *sums;
  nb::object result = numpy_array(sizes.output, conv.dims + 2, &sums);
  nb::gil_scoped_release release;
  conv.layer.run(as_floats(from, static_cast<int64_t>(codes.size())).data(), static_cast<int64_t>(codes.shape(0)),
                 sizes.input, {Activation::codes, 1, zero}, {nullptr, sums});
  return result;
}

} // namespace

void integer(nb::module_ &m) {
  nb::class_<IntegerLinear>(m, "IntegerLinear")
      .def("__init__", &make_linear, nb::arg("codes"), nb::arg("scale"), nb::arg("zero_point").none() = nb::none(),
           nb::arg("bias").none() = nb::none(), nb::arg("relu") = false)
      .def("__call__", &call_linear, nb::arg("x"), nb::arg("step").none() = nb::none(), nb::arg("zero") = 0,
           nb::arg("out") = nb::none())
      .def("accumulate", &linear_sums, nb::arg("x_codes"), nb::arg("zero") = 0)
      .def_prop_ro("nbytes", [](const IntegerLinear &layer) { return layer.panels().bytes(); });
  nb::class_<Conv>(m, "IntegerConv")
      .def("__init__", &make_conv, nb::arg("codes"), nb::arg("scale"), nb::arg("zero_point").none() = nb::none(),
           nb::arg("bias").none() = nb::none(), nb::arg("stride") = 1, nb::arg("padding") = 0, nb::arg("dilation") = 1,
           nb::arg("groups") = 1, nb::arg("relu") = false)
      .def("__call__", &call_conv, nb::arg("x"), nb::arg("step").none() = nb::none(), nb::arg("zero") = 0,
           nb::arg("out") = nb::none())
      .def("accumulate", &conv_sums, nb::arg("x_codes"), nb::arg("zero") = 0)
      .def_prop_ro("nbytes", [](const Conv &conv) { return conv.layer.bytes(); });
}

} // namespace penjing::bindings
