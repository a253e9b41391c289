#include "kernels/decoder.h"

#include <cmath>

#include "bindings/arrays.h"

namespace penjing::bindings {
namespace {

// keys, values: (kv_heads, length, head_dim); from head to head there may be a gap, the same in both.
nb::object attend(const In &queries, const In &keys, const In &values, int64_t window) {
  const float *from = checked<float>(queries, "queries", {any, any, any});
  Attention a{};
  a.n = static_cast<int64_t>(queries.shape(0)), a.heads = static_cast<int64_t>(queries.shape(1));
  a.head_dim = static_cast<int64_t>(queries.shape(2));
  for (const In *each : {&keys, &values}) {
    require(each->dtype() == nb::dtype<float>() && each->ndim() == 3 && each->device_type() == nb::device::cpu::value &&
                each->stride(2) == 1 && (each->shape(1) == 1 || each->stride(1) == a.head_dim) &&
                static_cast<int64_t>(each->shape(2)) == a.head_dim,
            "keys, values: give float32 arrays (kv_heads, length, head_dim) whose heads are contiguous");
    require(each->shape(0) == keys.shape(0) && each->shape(1) == keys.shape(1) &&
                (each->shape(0) == 1 || each->stride(0) == keys.stride(0)),
            "keys, values: their shapes differ");
  }
  a.kv_heads = static_cast<int64_t>(keys.shape(0)), a.length = static_cast<int64_t>(keys.shape(1));
  a.head_stride = keys.stride(0);
  require(a.head_dim > 0 && a.head_dim <= max_head_dim, "queries: head_dim is 1 to " + std::to_string(max_head_dim));
  require(a.kv_heads > 0 && a.heads % a.kv_heads == 0, "queries: kv_heads does not divide the heads");
  require(a.n <= a.length, "queries: there are more of them than positions");
  require(window >= 0, "window: give a number of positions, or 0 for all");
  const size_t shape[] = {queries.shape(0), queries.shape(1), queries.shape(2)};
  nb::object result = numpy_array(shape, 3, &a.out);
  a.queries = from, a.keys = static_cast<const float *>(keys.data());
  a.values = static_cast<const float *>(values.data());
  a.window = window, a.scale = 1 / std::sqrt(static_cast<float>(a.head_dim));
  nb::gil_scoped_release release;
  attention(a);
  return result;
}

nb::object gate_up(const In &gate, const In &up) {
  const float *g = checked<float>(gate, "gate", {any, any});
  const float *u = checked<float>(up, "up", {static_cast<int64_t>(gate.shape(0)), static_cast<int64_t>(gate.shape(1))});
  const size_t shape[] = {gate.shape(0), gate.shape(1)};
  float *y;
  nb::object result = numpy_array(shape, 2, &y);
  nb::gil_scoped_release release;
  gated_product(g, u, static_cast<int64_t>(shape[0] * shape[1]), y);
  return result;
}

} // namespace

void parts(nb::module_ &m) {
  m.def("attention", &attend, nb::arg("queries"), nb::arg("keys"), nb::arg("values"), nb::arg("window") = 0);
  m.def("gated", &gate_up, nb::arg("gate"), nb::arg("up"));
}

} // namespace penjing::bindings
