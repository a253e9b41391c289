// The decoder's functions of rows, one at a time, for whoever wants only these (and for their tests).
#include "decoder/elements.h"

#include <nanobind/stl/string.h>

#include <cmath>

#include "bindings/arrays.h"
#include "bindings/decoder.h"
#include "decoder/route.h"

namespace penjing::bindings {
namespace {

// x (n, size) → the same; kind "rms" or "layer".
nb::object norm_rows(const In &x, const MaybeIn &weight, const MaybeIn &bias, float eps, const std::string &kind) {
  const float *from = checked<float>(x, "x", {any, any});
  const auto n = static_cast<int64_t>(x.shape(0)), size = static_cast<int64_t>(x.shape(1));
  const float *w = checked<float>(weight, "weight", {size}), *b = checked<float>(bias, "bias", {size});
  require(kind == "layer" || (kind == "rms" && !b), "kind: \"rms\" (without bias) or \"layer\"");
  const size_t shape[] = {x.shape(0), x.shape(1)};
  float *y;
  nb::object result = numpy_array(shape, 2, &y);
  for (int64_t i = 0; i < n; ++i)
    if (kind == "rms")
      penjing::elements().rms_norm(from + i * size, w, size, eps, 1, y + i * size);
    else
      penjing::elements().layer_norm(from + i * size, w, b, size, eps, y + i * size);
  return result;
}

// x (n, heads, head_dim); cosine, sine (n, pairs).
nb::object rotate_heads(const In &x, const In &cosine, const In &sine, bool interleaved) {
  const float *from = checked<float>(x, "x", {any, any, any});
  const auto n = static_cast<int64_t>(x.shape(0)), heads = static_cast<int64_t>(x.shape(1));
  const auto size = static_cast<int64_t>(x.shape(2));
  const float *c = checked<float>(cosine, "cosine", {n, any});
  const auto pairs = static_cast<int64_t>(cosine.shape(1));
  const float *s = checked<float>(sine, "sine", {n, pairs});
  require(2 * pairs <= size, "cosine: more pairs than a head has");
  const size_t shape[] = {x.shape(0), x.shape(1), x.shape(2)};
  float *y;
  nb::object result = numpy_array(shape, 3, &y);
  std::copy(from, from + n * heads * size, y);
  for (int64_t i = 0; i < n; ++i)
    penjing::elements().rotate(y + i * heads * size, heads, size, c + i * pairs, s + i * pairs, pairs, interleaved);
  return result;
}

nb::object activate_rows(const std::string &kind, const In &gate, const MaybeIn &up, float limit, float alpha) {
  const float *g = checked<float>(gate, "gate", {any, any});
  const auto n = static_cast<int64_t>(gate.shape(0)), size = static_cast<int64_t>(gate.shape(1));
  const float *u = checked<float>(up, "up", {n, size});
  const Activation known = activation(kind);
  require(u || known != Activation::clamped, "up: \"clamped\" needs it");
  const size_t shape[] = {gate.shape(0), gate.shape(1)};
  float *y;
  nb::object result = numpy_array(shape, 2, &y);
  penjing::elements().activate(known, g, u, n * size, limit, alpha, y);
  return result;
}

// logits (n, count) → int32 chosen (n, top_k), float32 weights (n, top_k); ``experts`` as models.config.Experts.
nb::tuple choose(const In &logits, nb::handle experts, const MaybeIn &correction, const MaybeIn &expert_scale) {
  Router r = router(experts);
  const float *from = checked<float>(logits, "logits", {any, r.count});
  r.correction = checked<float>(correction, "correction", {r.count});
  r.expert_scale = checked<float>(expert_scale, "expert_scale", {r.count});
  const size_t shape[] = {logits.shape(0), static_cast<size_t>(r.top_k)};
  int32_t *chosen;
  float *weights;
  nb::object first = numpy_array(shape, 2, &chosen), second = numpy_array(shape, 2, &weights);
  for (size_t i = 0; i < logits.shape(0); ++i)
    route(r, from + static_cast<int64_t>(i) * r.count, chosen + i * shape[1], weights + i * shape[1]);
  return nb::make_tuple(first, second);
}

// state (keys, values), in place; query, key (keys,), value (values,) → (values,).
nb::object delta_step(const Out &state, const In &query, const In &key, const In &value, float decay, float beta) {
  float *own = checked<float>(state, "state", {any, any});
  const auto keys = static_cast<int64_t>(state.shape(0)), values = static_cast<int64_t>(state.shape(1));
  const float *q = checked<float>(query, "query", {keys}), *k = checked<float>(key, "key", {keys});
  const float *v = checked<float>(value, "value", {values});
  const size_t shape[] = {state.shape(1)};
  float *y;
  nb::object result = numpy_array(shape, 1, &y);
  penjing::elements().delta(own, q, k, v, decay, beta, keys, values, y);
  return result;
}

} // namespace

void elements(nb::module_ &m) {
  m.def("norm", &norm_rows, nb::arg("x"), nb::arg("weight").none(), nb::arg("bias").none(), nb::arg("eps"),
        nb::arg("kind"));
  m.def("rotate", &rotate_heads, nb::arg("x"), nb::arg("cosine"), nb::arg("sine"), nb::arg("interleaved"));
  m.def("activate", &activate_rows, nb::arg("kind"), nb::arg("gate"), nb::arg("up").none(), nb::arg("limit"),
        nb::arg("alpha"));
  m.def("route", &choose, nb::arg("logits"), nb::arg("experts"), nb::arg("correction").none() = nb::none(),
        nb::arg("expert_scale").none() = nb::none());
  m.def("delta", &delta_step, nb::arg("state"), nb::arg("query"), nb::arg("key"), nb::arg("value"), nb::arg("decay"),
        nb::arg("beta"));
}

} // namespace penjing::bindings
