#include "bindings/kv.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "bindings/arrays.h"

namespace penjing::bindings {
namespace {

// queries, keys, values, table, start: see Attending.
using Chunk = std::tuple<In, MaybeIn, MaybeIn, In, int64_t>;

std::vector<KvLayer> layers_of(const std::vector<std::tuple<int, int, int>> &shapes) {
  std::vector<KvLayer> layers;
  for (const auto &[heads, key_dim, value_dim] : shapes)
    layers.push_back({heads, key_dim, value_dim});
  return layers;
}

// Rows (n, heads, dim) that may be parts of wider ones, as far apart in every chunk.
const float *rows(const In &array, const char *what, int64_t n, int64_t heads, int64_t dim, int64_t &stride) {
  const bool fits = array.dtype() == nb::dtype<float>() && array.ndim() == 3 &&
                    array.device_type() == nb::device::cpu::value && (n == any || int64_t(array.shape(0)) == n) &&
                    (heads == any || int64_t(array.shape(1)) == heads) && int64_t(array.shape(2)) == dim &&
                    array.stride(2) == 1 && (array.shape(1) == 1 || array.stride(1) == dim);
  const int64_t shape[] = {n, heads, dim};
  require(fits, std::string(what) + ": give a float32 array " + shape_text(shape, 3) +
                    " on the CPU, each position contiguous");
  if (array.shape(0) > 1) {
    require(stride == 0 || stride == array.stride(0), std::string(what) + ": rows lie further apart in some chunks");
    stride = array.stride(0);
  }
  return static_cast<const float *>(array.data());
}

Attending attending(const KvPool &pool, const KvLayer &shape, const Chunk &chunk, AttentionRule &rule) {
  const auto &[queries, keys, values, table, start] = chunk;
  require(queries.ndim() == 3 && queries.shape(1) > 0 && queries.shape(1) % static_cast<size_t>(shape.kv_heads) == 0,
          "queries: give (n, heads, key_dim), heads a multiple of the layer's kv_heads");
  const auto n = static_cast<int64_t>(queries.shape(0));
  const int64_t heads = rule.heads ? rule.heads : any;
  Attending a{};
  a.n = n, a.start = start;
  a.queries = rows(queries, "queries", n, heads, shape.key_dim, rule.query_stride);
  rule.heads = static_cast<int>(queries.shape(1));
  require(keys.has_value() == values.has_value(), "keys, values: give both, or neither");
  if (keys) {
    a.keys = rows(*keys, "keys", n, shape.kv_heads, shape.key_dim, rule.key_stride);
    a.values = rows(*values, "values", n, shape.kv_heads, shape.value_dim, rule.value_stride);
  }
  a.table = checked<int32_t>(table, "table", {any});
  require(start >= 0 && start + n <= static_cast<int64_t>(table.shape(0)) * kv_tokens,
          "table: has too few blocks for positions up to " + std::to_string(start + n));
  for (size_t i = 0; i < table.shape(0); ++i)
    require(a.table[i] >= 0 && a.table[i] < pool.blocks(), "table: the pool has no such block");
  return a;
}

std::vector<nb::object> attend_chunks(KvPool &pool, int layer, const std::vector<Chunk> &chunks, int64_t window,
                                      std::optional<float> scale, float softcap, const MaybeIn &sinks) {
  require(layer >= 0 && layer < static_cast<int>(pool.layers().size()), "layer: the pool has no such layer");
  const KvLayer shape = pool.layers()[static_cast<size_t>(layer)];
  require(shape.kv_heads > 0, "layer: it keeps no keys");
  require(window >= 0, "window: give a number of positions, or 0 for all");
  require(softcap >= 0, "softcap: give a positive number, or 0 for none");
  AttentionRule rule{};
  rule.window = window, rule.softcap = softcap;
  rule.scale = scale.value_or(1 / std::sqrt(static_cast<float>(shape.key_dim)));
  std::vector<Attending> all;
  std::vector<nb::object> results;
  for (const Chunk &chunk : chunks) {
    all.push_back(attending(pool, shape, chunk, rule));
    const size_t size[] = {static_cast<size_t>(all.back().n), static_cast<size_t>(rule.heads),
                           static_cast<size_t>(shape.value_dim)};
    results.push_back(numpy_array(size, 3, &all.back().out));
  }
  rule.sinks = checked<float>(sinks, "sinks", {rule.heads});
  nb::gil_scoped_release release;
  attend(pool, layer, rule, all.data(), static_cast<int>(all.size()));
  return results;
}

} // namespace

KvType kv_type(const std::string &name) {
  constexpr const char *names[] = {"float32", "float16", "bfloat16", "int8", "int4"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i])
      return static_cast<KvType>(i);
  throw nb::value_error(("kv_type: " + name + " is not known; give float32, float16, bfloat16, int8 or int4").c_str());
}

void kv(nb::module_ &m) {
  nb::class_<KvPool>(m, "KvPool")
      .def(
          "__init__",
          [](KvPool *self, const std::vector<std::tuple<int, int, int>> &layers, const std::string &type,
             int64_t blocks) { new (self) KvPool(layers_of(layers), kv_type(type), blocks); },
          nb::arg("layers"), nb::arg("kv_type"), nb::arg("blocks"))
      .def_prop_ro("blocks", &KvPool::blocks)
      .def_static(
          "block_bytes",
          [](const std::vector<std::tuple<int, int, int>> &layers, const std::string &type) {
            return KvPool::block_bytes(layers_of(layers), kv_type(type));
          },
          nb::arg("layers"), nb::arg("kv_type"))
      .def("attend", &attend_chunks, nb::arg("layer"), nb::arg("chunks"), nb::arg("window") = 0,
           nb::arg("scale").none() = nb::none(), nb::arg("softcap") = 0.0f, nb::arg("sinks").none() = nb::none());
}

} // namespace penjing::bindings
