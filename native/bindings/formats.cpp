#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cmath>

#include "bindings/arrays.h"
#include "formats/affine.h"
#include "formats/bitmask.h"
#include "formats/floats.h"
#include "formats/packed.h"
#include "formats/prune.h"
#include "formats/scan.h"
#include "formats/settle.h"

namespace penjing::bindings {
namespace {

// Floats come as their bits: uint32 is float32; uint16 is bfloat16 or float16.
Float float_type(const In &bits, bool bfloat16) {
  return bits.dtype() == nb::dtype<uint32_t>() ? Float::f32 : bfloat16 ? Float::bf16 : Float::f16;
}

template <class Array>
auto float_bits(const Array &bits, std::initializer_list<int64_t> shape) {
  if (bits.dtype() == nb::dtype<uint32_t>())
    return static_cast<decltype(bits.data())>(checked<uint32_t>(bits, "weight", shape));
  return static_cast<decltype(bits.data())>(checked<uint16_t>(bits, "weight", shape));
}

Float scale_type(const std::string &name) {
  require(name == "float32" || name == "bfloat16" || name == "float16", "scale_dtype: " + name + " is not known");
  return name == "float32" ? Float::f32 : name == "bfloat16" ? Float::bf16 : Float::f16;
}

using Encodings = std::tuple<nb::object, nb::object, nb::object>;

// group: columns that share a step, or 0 for one step in all.
Encodings quantize_weight(const In &weight, bool bfloat16, int bits, int64_t group, bool symmetric,
                          const std::string &scale_dtype, const MaybeIn &mask, bool packed) {
  const void *values = float_bits(weight, {any, any});
  const auto rows = static_cast<int64_t>(weight.shape(0)), columns = static_cast<int64_t>(weight.shape(1));
  require(rows > 0 && columns > 0, "weight: an empty matrix");
  require(bits >= 2 && bits <= 8, "bits: give 2 to 8");
  require(group == 0 || (group > 0 && columns % group == 0), "group_size: does not divide the columns");
  const WeightView view{values, float_type(weight, bfloat16), rows, columns,
                        checked<uint8_t>(mask, "mask", {rows, columns})};
  const size_t code_shape[] = {weight.shape(0),
                               packed ? static_cast<size_t>(packed_words(columns, bits)) : weight.shape(1)};
  const size_t steps[] = {group ? weight.shape(0) : 1, group ? static_cast<size_t>(columns / group) : 1};
  Encoded out{};
  nb::object zero_point = nb::none();
  nb::object codes = packed ? numpy_array(code_shape, 2, &out.packed) : numpy_array(code_shape, 2, &out.codes);
  nb::object scale = numpy_array(steps, 2, &out.scale);
  if (!symmetric)
    zero_point = numpy_array(steps, 2, &out.zero_point);
  const Grid grid{bits, group, symmetric, scale_type(scale_dtype)};
  {
    nb::gil_scoped_release release;
    quantize(view, grid, out);
  }
  return {codes, scale, zero_point};
}

nb::object pack_codes(const In &codes, int bits) {
  const int8_t *from = checked<int8_t>(codes, "codes", {any, any});
  require(bits >= 2 && bits <= 8, "bits: give 2 to 8");
  const auto rows = static_cast<int64_t>(codes.shape(0)), columns = static_cast<int64_t>(codes.shape(1));
  const size_t shape[] = {codes.shape(0), static_cast<size_t>(packed_words(columns, bits))};
  int32_t *words;
  nb::object result = numpy_array(shape, 2, &words);
  nb::gil_scoped_release release;
  pack(from, rows, columns, bits, words);
  return result;
}

nb::object unpack_codes(const In &packed, int bits, int64_t columns) {
  require(bits >= 2 && bits <= 8, "bits: give 2 to 8");
  require(columns >= 0, "columns: give 0 or more");
  const int32_t *from = checked<int32_t>(packed, "packed", {any, packed_words(columns, bits)});
  const size_t shape[] = {packed.shape(0), static_cast<size_t>(columns)};
  int8_t *codes;
  nb::object result = numpy_array(shape, 2, &codes);
  nb::gil_scoped_release release;
  unpack(from, static_cast<int64_t>(shape[0]), columns, bits, codes);
  return result;
}

void prune_parts(const Out &weight, bool bfloat16, int64_t parts, int64_t count) {
  void *values = float_bits(weight, {any, any});
  const auto size = static_cast<int64_t>(weight.size());
  require(parts > 0 && size % parts == 0, "parts: does not divide the weights");
  require(count >= 0 && count <= size / parts, "count: more than there are");
  nb::gil_scoped_release release;
  prune(values, float_type(In(weight), bfloat16), parts, size / parts, count);
}

float threshold(const In &weight, bool bfloat16, int64_t count) {
  const void *values = float_bits(weight, {any, any});
  require(count >= 1 && count <= static_cast<int64_t>(weight.size()), "count: give 1 to the number of weights");
  const Float type = float_type(weight, bfloat16);
  nb::gil_scoped_release release;
  const uint32_t bits = magnitude_at(values, type, static_cast<int64_t>(weight.size()), count);
  return type == Float::f32    ? std::bit_cast<float>(bits)
         : type == Float::bf16 ? from_bf16(static_cast<uint16_t>(bits))
                               : from_f16(static_cast<uint16_t>(bits));
}

bool nonfinite(const In &values, bool bfloat16) {
  const void *bits = float_bits(values, {any});
  nb::gil_scoped_release release;
  return any_nonfinite(bits, float_type(values, bfloat16), static_cast<int64_t>(values.size()));
}

const void *elements(const In &array, const char *what, std::initializer_list<int64_t> shape, int *width) {
  *width = array.dtype().bits / 8;
  return *width == 1   ? static_cast<const void *>(checked<uint8_t>(array, what, shape))
         : *width == 2 ? static_cast<const void *>(checked<uint16_t>(array, what, shape))
                       : checked<uint32_t>(array, what, shape);
}

nb::object of_width(int width, const size_t *shape, size_t dims, void **data) {
  const auto make = [&](auto *typed) {
    nb::object array = numpy_array(shape, dims, &typed);
    *data = typed;
    return array;
  };
  return width == 1   ? make(static_cast<uint8_t *>(nullptr))
         : width == 2 ? make(static_cast<uint16_t *>(nullptr))
                      : make(static_cast<uint32_t *>(nullptr));
}

// matrix: elements as unsigned integers of their width; the sign bit of floats does not count.
Encodings encode_bitmask(const In &matrix, bool floats) {
  int width;
  const void *from = elements(matrix, "matrix", {any, any}, &width);
  const auto rows = static_cast<int64_t>(matrix.shape(0)), columns = static_cast<int64_t>(matrix.shape(1));
  const size_t mask_shape[] = {matrix.shape(0), (matrix.shape(1) + 7) / 8}, offset_shape[] = {matrix.shape(0)};
  uint8_t *bitmask;
  int64_t *offsets;
  nb::object mask_array = numpy_array(mask_shape, 2, &bitmask), offset_array = numpy_array(offset_shape, 1, &offsets);
  nb::object values;
  const uint32_t all = width == 4 ? ~0u : (1u << 8 * width) - 1;
  const Elements kind{width, floats ? all >> 1 : all};
  nb::gil_scoped_release release;
  bitmask_encode(from, rows, columns, kind, bitmask, offsets, [&](int64_t kept) {
    nb::gil_scoped_acquire acquire;
    const size_t shape[] = {static_cast<size_t>(kept)};
    void *data;
    values = of_width(width, shape, 1, &data);
    return data;
  });
  nb::gil_scoped_acquire acquire;
  return {values, mask_array, offset_array};
}

// scale, inverse, low, high: (groups, out); group: of each column; all None: nothing is rounded.
std::tuple<nb::object, nb::object> settle_columns(const In &base, const In &coupling, const In &reference,
                                                  const MaybeIn &kept, const MaybeIn &scale, const MaybeIn &inverse,
                                                  const MaybeIn &low, const MaybeIn &high, const MaybeIn &group) {
  const float *from = checked<float>(base, "base", {any, any});
  const auto n = static_cast<int64_t>(base.shape(0)), out = static_cast<int64_t>(base.shape(1));
  Columns columns{from,
                  checked<float>(reference, "reference", {n, out}),
                  checked<float>(coupling, "coupling", {n, n}),
                  checked<uint8_t>(kept, "kept", {n, out}),
                  nullptr,
                  n,
                  out,
                  nullptr,
                  nullptr};
  require(!scale || (inverse && low && high && group), "scale: give inverse, low, high and group with it");
  const int64_t groups = scale ? static_cast<int64_t>(scale->shape(0)) : 0;
  const Steps steps{checked<float>(scale, "scale", {groups, out}), checked<float>(inverse, "inverse", {groups, out}),
                    checked<float>(low, "low", {groups, out}), checked<float>(high, "high", {groups, out}),
                    checked<int32_t>(group, "group", {n})};
  for (int64_t i = 0; steps.group && i < n; ++i)
    require(steps.group[i] >= 0 && steps.group[i] < groups, "group: a column's group has no steps");
  const size_t shape[] = {base.shape(0), base.shape(1)};
  nb::object errors = numpy_array(shape, 2, &columns.error), rounded = nb::none();
  if (scale) {
    columns.steps = &steps;
    rounded = numpy_array(shape, 2, &columns.codes);
  }
  {
    nb::gil_scoped_release release;
    settle(columns);
  }
  return {rounded, errors};
}

// values: (n, out); importance: (n, out) or (n, 1) → scale, zero point: (out,).
std::tuple<nb::object, nb::object> search(const In &values, const In &importance, float least_code, float greatest_code,
                                          bool symmetric, const std::string &scale_dtype, const In &shares,
                                          const In &near) {
  const float *from = checked<float>(values, "values", {any, any});
  const auto n = static_cast<int64_t>(values.shape(0)), out = static_cast<int64_t>(values.shape(1));
  const bool each = importance.ndim() == 2 && static_cast<int64_t>(importance.shape(1)) == out;
  require(least_code < greatest_code, "codes: give the least and the greatest");
  StepSearch search{from,
                    checked<float>(importance, "importance", {n, each ? out : 1}),
                    each,
                    n,
                    out,
                    least_code,
                    greatest_code,
                    symmetric,
                    scale_type(scale_dtype),
                    checked<float>(shares, "shares", {any}),
                    static_cast<int64_t>(shares.shape(0)),
                    checked<float>(near, "near", {any}),
                    static_cast<int64_t>(near.shape(0)),
                    nullptr,
                    nullptr};
  const size_t shape[] = {values.shape(1)};
  nb::object scale = numpy_array(shape, 1, &search.scale), zero = numpy_array(shape, 1, &search.zero);
  {
    nb::gil_scoped_release release;
    search_steps(search);
  }
  return {scale, zero};
}

nb::object decode_bitmask(const In &values, const In &bitmask, int64_t columns) {
  int width;
  const void *from = elements(values, "values", {any}, &width);
  require(columns >= 0, "columns: give 0 or more");
  const uint8_t *bits = checked<uint8_t>(bitmask, "bitmask", {any, (columns + 7) / 8});
  const auto rows = static_cast<int64_t>(bitmask.shape(0));
  const size_t shape[] = {bitmask.shape(0), static_cast<size_t>(columns)};
  void *matrix;
  nb::object result = of_width(width, shape, 2, &matrix);
  Buffer<int64_t> offsets(rows);
  bitmask_counts(bits, rows, columns, offsets.data());
  int64_t total = 0;
  for (int64_t row = 0; row < rows; ++row)
    total += std::exchange(offsets[row], total);
  require(total == static_cast<int64_t>(values.shape(0)), "values: the bitmask has " + std::to_string(total) +
                                                              " bits, and there are " +
                                                              std::to_string(values.shape(0)) + " values");
  nb::gil_scoped_release release;
  bitmask_decode(from, bits, offsets.data(), rows, columns, width, matrix);
  return result;
}

} // namespace

void formats(nb::module_ &m) {
  m.def("quantize", &quantize_weight, nb::arg("weight"), nb::arg("bfloat16"), nb::arg("bits"), nb::arg("group"),
        nb::arg("symmetric"), nb::arg("scale_dtype"), nb::arg("mask").none(), nb::arg("packed"));
  m.def("pack", &pack_codes, nb::arg("codes"), nb::arg("bits"));
  m.def("unpack", &unpack_codes, nb::arg("packed"), nb::arg("bits"), nb::arg("columns"));
  m.def("prune", &prune_parts, nb::arg("weight"), nb::arg("bfloat16"), nb::arg("parts"), nb::arg("count"));
  m.def("prune_threshold", &threshold, nb::arg("weight"), nb::arg("bfloat16"), nb::arg("count"));
  m.def("has_nonfinite", &nonfinite, nb::arg("values"), nb::arg("bfloat16"));
  m.def("settle", &settle_columns, nb::arg("base"), nb::arg("coupling"), nb::arg("reference"), nb::arg("kept").none(),
        nb::arg("scale").none(), nb::arg("inverse").none(), nb::arg("low").none(), nb::arg("high").none(),
        nb::arg("group").none());
  m.def("search_steps", &search, nb::arg("values"), nb::arg("importance"), nb::arg("least_code"),
        nb::arg("greatest_code"), nb::arg("symmetric"), nb::arg("scale_dtype"), nb::arg("shares"), nb::arg("near"));
  m.def("bitmask_encode", &encode_bitmask, nb::arg("matrix"), nb::arg("floats"));
  m.def("bitmask_decode", &decode_bitmask, nb::arg("values"), nb::arg("bitmask"), nb::arg("columns"));
}

} // namespace penjing::bindings
