#include "decoder/sample.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"

namespace penjing::bindings {
namespace {

void construct(Sampler *self, const std::vector<int64_t> &prompt, const std::vector<int64_t> &end_tokens,
               int64_t vocabulary, double temperature, int64_t top_k, double top_p, double min_p,
               float repetition_penalty, float presence_penalty, float frequency_penalty,
               std::vector<std::pair<int64_t, float>> logit_bias, uint64_t seed, uint64_t choice, int64_t min_tokens) {
  new (self) Sampler({.temperature = temperature,
                      .top_k = top_k,
                      .top_p = top_p,
                      .min_p = min_p,
                      .repetition_penalty = repetition_penalty,
                      .presence_penalty = presence_penalty,
                      .frequency_penalty = frequency_penalty,
                      .logit_bias = std::move(logit_bias),
                      .seed = seed,
                      .choice = choice,
                      .min_tokens = min_tokens},
                     prompt, end_tokens, vocabulary);
}

nb::object plain(const Logprobs &found) { return nb::make_tuple(found.chosen, nb::cast(found.top)); }

nb::tuple next(Sampler &self, const Out &logits, std::optional<int64_t> alternatives) {
  float *values = checked<float>(logits, "logits", {self.vocabulary()});
  Logprobs found;
  const int64_t token = self.next(values, alternatives ? &found : nullptr, alternatives.value_or(0));
  return nb::make_tuple(token, alternatives ? plain(found) : nb::none());
}

// masks: (words,) for the next token, or (tokens, words) for the next ones.
void allow(Sampler &self, const In &masks) {
  const bool rows = masks.ndim() == 2;
  const uint32_t *from =
      masks.dtype() == nb::dtype<int32_t>() // as xgrammar and llguidance keep them in torch
          ? reinterpret_cast<const uint32_t *>(rows ? checked<int32_t>(masks, "masks", {any, any})
                                                    : checked<int32_t>(masks, "masks", {any}))
          : rows ? checked<uint32_t>(masks, "masks", {any, any}) : checked<uint32_t>(masks, "masks", {any});
  self.allow(from, rows ? static_cast<int64_t>(masks.shape(0)) : 1, static_cast<int64_t>(masks.shape(rows ? 1 : 0)));
}

nb::object score(const In &logits, int64_t token, int64_t alternatives) {
  const float *values = checked<float>(logits, "logits", {any});
  const auto vocabulary = static_cast<int64_t>(logits.shape(0));
  require(token >= 0 && token < vocabulary,
          "token " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(vocabulary));
  return plain(log_probabilities(values, vocabulary, token, alternatives));
}

} // namespace

void sample(nb::module_ &m) {
  nb::exception<SamplingError>(m, "SamplingError", nb::module_::import_("penjing.errors").attr("PenjingError"));
  nb::class_<Sampler>(m, "Sampler")
      .def("__init__", &construct, nb::arg("prompt"), nb::arg("end_tokens"), nb::arg("vocabulary"), nb::kw_only(),
           nb::arg("temperature") = 1.0, nb::arg("top_k") = 0, nb::arg("top_p") = 1.0, nb::arg("min_p") = 0.0,
           nb::arg("repetition_penalty") = 1.0f, nb::arg("presence_penalty") = 0.0f,
           nb::arg("frequency_penalty") = 0.0f, nb::arg("logit_bias") = nb::list(), nb::arg("seed") = 0,
           nb::arg("choice") = 0, nb::arg("min_tokens") = 0)
      .def("next", &next, nb::arg("logits"), nb::arg("alternatives").none() = nb::none())
      .def("allow", &allow, nb::arg("masks"))
      .def_prop_ro("vocabulary", &Sampler::vocabulary);
  m.def("log_probabilities", &score, nb::arg("logits"), nb::arg("token"), nb::arg("alternatives"));
}

} // namespace penjing::bindings
