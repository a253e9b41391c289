// From a description of a block (penjing.models.config) and its weights to what the decoder computes. Every shape is
// checked here, so that the decoder need not.
#include "bindings/decoder.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

namespace penjing::bindings {
namespace {

template <class T>
T field(nb::handle description, const char *name) {
  return nb::cast<T>(description.attr(name));
}

std::string type_of(nb::handle description) { return nb::cast<std::string>(description.type().attr("__name__")); }

bool is_none(nb::handle description, const char *name) { return description.attr(name).is_none(); }

// The weights of one block by role and place; each that is asked for must be there and have the shape.
class Parts {
public:
  Parts(nb::handle block, const nb::dict &linears, const nb::dict &norms, const nb::dict &vectors)
      : norms_described_(block.attr("norms")), linears_(linears), norms_(norms), vectors_(vectors) {}

  bool has(const std::string &role) const { return linears_.contains(role.c_str()); }

  Linear linear(const std::string &role, int64_t rows, int64_t columns) const {
    require(has(role), role + ": the weight is missing");
    return linear_from(linears_[role.c_str()], role, rows, columns);
  }

  Norm norm(const char *place, int64_t size) const {
    if (!nb::cast<bool>(norms_described_.attr("__contains__")(place)))
      return {};
    require(norms_.contains(place), std::string(place) + ": the norm's weight is missing");
    return norm_from(norms_described_[place], norms_[place], place, size);
  }

  bool has_vector(const char *name) const { return vectors_.contains(name); }

  const float *vector(const char *name, std::initializer_list<int64_t> shape) const {
    require(vectors_.contains(name), std::string(name) + ": the vector is missing");
    return checked<float>(nb::cast<In>(vectors_[name]), name, shape);
  }

private:
  nb::object norms_described_;
  nb::dict linears_, norms_, vectors_;
};

int rotary_of(nb::handle mixer, Decoder &decoder, int64_t size) {
  const nb::object rope = mixer.attr("rope");
  if (rope.is_none())
    return -1;
  Rotary rotary{field<std::vector<float>>(rope, "frequencies"), field<float>(rope, "scale")};
  require(!rotary.frequencies.empty() && 2 * static_cast<int64_t>(rotary.frequencies.size()) <= size,
          "rope: more pairs than a head has, or none");
  return decoder.add_rotary(std::move(rotary));
}

AttentionMixer attention(nb::handle m, const Parts &parts, Decoder &decoder, int64_t hidden, int shared) {
  AttentionMixer a{};
  a.heads = field<int64_t>(m, "heads"), a.kv_heads = field<int64_t>(m, "kv_heads");
  a.head_dim = field<int64_t>(m, "head_dim"), a.value_dim = field<int64_t>(m, "value_dim");
  require(a.kv_heads > 0 && a.heads > 0 && a.heads % a.kv_heads == 0, "heads: kv_heads does not divide them");
  a.writes = is_none(m, "shares_kv_of");
  require(a.writes || shared >= 0, "shares_kv_of: which cache is it?");
  a.values_are_keys = field<bool>(m, "values_are_keys");
  require(!a.values_are_keys || a.head_dim == a.value_dim, "values_are_keys: values are as long as keys");
  const int64_t queries = a.heads * a.head_dim, mixed = a.heads * a.value_dim;
  a.q = parts.linear("q", queries, hidden), a.o = parts.linear("o", hidden, mixed);
  if (a.writes)
    a.k = parts.linear("k", a.kv_heads * a.head_dim, hidden);
  if (a.writes && !a.values_are_keys)
    a.v = parts.linear("v", a.kv_heads * a.value_dim, hidden);
  if (field<bool>(m, "output_gate"))
    a.output_gate = parts.linear("output_gate", mixed, hidden);
  a.norm_all = !is_none(m, "query_key_norm") && field<std::string>(m, "query_key_norm") == "all";
  a.query = parts.norm("query", a.norm_all ? queries : a.head_dim);
  if (a.writes) {
    a.key = parts.norm("key", a.norm_all ? a.kv_heads * a.head_dim : a.head_dim);
    a.value = parts.norm("value", a.value_dim);
  }
  a.rope = rotary_of(m, decoder, a.head_dim), a.interleaved = field<bool>(m, "rope_interleaved");
  if (!is_none(m, "query_growth")) {
    const nb::object growth = m.attr("query_growth");
    a.growth = nb::cast<float>(growth[0]), a.growth_every = nb::cast<int64_t>(growth[1]);
    require(a.growth_every > 0, "query_growth: a positive number of positions");
  }
  a.rule.heads = static_cast<int>(a.heads);
  a.rule.window = is_none(m, "window") ? 0 : field<int64_t>(m, "window");
  a.rule.scale = field<float>(m, "scale"), a.rule.softcap = field<float>(m, "softcap");
  if (field<bool>(m, "sinks"))
    a.rule.sinks = parts.vector("sinks", {a.heads});
  const KvLayer layer{static_cast<int>(a.kv_heads), static_cast<int>(a.head_dim), static_cast<int>(a.value_dim)};
  a.kv_layer = a.writes ? decoder.add_cache(layer) : shared;
  return a;
}

LatentMixer latent(nb::handle m, const Parts &parts, Decoder &decoder, int64_t hidden) {
  LatentMixer a{};
  a.heads = field<int64_t>(m, "heads"), a.kv_rank = field<int64_t>(m, "kv_rank");
  a.q_rank = is_none(m, "q_rank") ? 0 : field<int64_t>(m, "q_rank");
  a.nope_dim = field<int64_t>(m, "nope_dim"), a.rope_dim = field<int64_t>(m, "rope_dim");
  a.value_dim = field<int64_t>(m, "value_dim");
  const int64_t queries = a.heads * (a.nope_dim + a.rope_dim);
  if (a.q_rank) {
    a.q_a = parts.linear("q_a", a.q_rank, hidden), a.q_b = parts.linear("q_b", queries, a.q_rank);
    a.q_latent = parts.norm("q_latent", a.q_rank);
  } else {
    a.q = parts.linear("q", queries, hidden);
  }
  a.kv_a = parts.linear("kv_a", a.kv_rank, hidden), a.k_rope = parts.linear("k_rope", a.rope_dim, hidden);
  a.kv_latent = parts.norm("kv_latent", a.kv_rank);
  for (int64_t head = 0; head < a.heads; ++head) {
    a.k_b.push_back(parts.linear("k_b." + std::to_string(head), a.kv_rank, a.nope_dim));
    a.v_b.push_back(parts.linear("v_b." + std::to_string(head), a.value_dim, a.kv_rank));
  }
  a.o = parts.linear("o", hidden, a.heads * a.value_dim);
  a.rope = rotary_of(m, decoder, a.rope_dim), a.interleaved = field<bool>(m, "rope_interleaved");
  require(a.rope >= 0, "rope: latent attention has positions");
  a.rule.heads = static_cast<int>(a.heads), a.rule.scale = field<float>(m, "scale");
  a.kv_layer = decoder.add_cache({1, static_cast<int>(a.kv_rank + a.rope_dim), static_cast<int>(a.kv_rank)});
  return a;
}

DeltaMixer delta(nb::handle m, const Parts &parts, int64_t hidden) {
  DeltaMixer d{};
  d.key_heads = field<int64_t>(m, "key_heads"), d.value_heads = field<int64_t>(m, "value_heads");
  d.key_dim = field<int64_t>(m, "key_dim"), d.value_dim = field<int64_t>(m, "value_dim");
  d.kernel = field<int64_t>(m, "kernel");
  require(d.key_heads > 0 && d.value_heads > 0 && d.value_heads % d.key_heads == 0,
          "value_heads: key_heads does not divide them");
  require(d.kernel > 0 && d.kernel <= most_taps, "kernel: give 1 to " + std::to_string(most_taps));
  const int64_t values = d.value_heads * d.value_dim;
  d.qkv = parts.linear("qkv", d.channels(), hidden), d.z = parts.linear("z", values, hidden);
  d.b = parts.linear("b", d.value_heads, hidden), d.a = parts.linear("a", d.value_heads, hidden);
  d.o = parts.linear("o", hidden, values);
  d.state = parts.norm("state", d.value_dim);
  d.decay = parts.vector("decay", {d.value_heads}), d.step = parts.vector("step", {d.value_heads});
  d.convolution = parts.vector("convolution", {d.kernel, d.channels()});
  return d;
}

Mlp mlp(const Parts &parts, const std::string &role, int64_t inner, Activation kind, int64_t hidden) {
  Mlp made{};
  made.inner = inner, made.activation = kind;
  if (parts.has(role + "gate"))
    made.gate = parts.linear(role + "gate", inner, hidden);
  require(made.gate.matrix || kind != Activation::clamped, role + "gate: \"clamped\" needs it");
  made.up = parts.linear(role + "up", inner, hidden), made.down = parts.linear(role + "down", hidden, inner);
  return made;
}

Experts experts(nb::handle m, const Parts &parts, int64_t hidden) {
  Experts e{};
  e.router = router(m);
  const int64_t inner = field<int64_t>(m, "inner");
  const Activation kind = activation(field<std::string>(m, "activation"));
  e.scores = parts.linear("router", e.router.count, hidden);
  if (field<bool>(m, "correction_bias"))
    e.router.correction = parts.vector("correction", {e.router.count});
  if (parts.has_vector("expert_scale"))
    e.router.expert_scale = parts.vector("expert_scale", {e.router.count});
  for (int64_t i = 0; i < e.router.count; ++i) {
    Mlp one = mlp(parts, "experts." + std::to_string(i) + ".", inner, kind, hidden);
    require(one.gate.matrix, "experts: each is gated");
    one.limit = field<float>(m, "limit"), one.alpha = field<float>(m, "alpha");
    e.experts.push_back(one);
  }
  if (const int64_t shared = field<int64_t>(m, "shared_inner")) {
    e.shared = mlp(parts, "shared.", shared, kind, hidden);
    if (field<bool>(m, "shared_gate"))
      e.shared_gate = parts.linear("shared_gate", 1, hidden);
  }
  e.router_in = parts.norm("router", hidden), e.experts_in = parts.norm("experts_in", hidden);
  e.shared_out = parts.norm("shared_out", hidden), e.experts_out = parts.norm("experts_out", hidden);
  return e;
}

} // namespace

Activation activation(const std::string &name) {
  constexpr const char *names[] = {"silu", "gelu", "gelu_tanh", "clamped"};
  for (int i = 0; i < 4; ++i)
    if (name == names[i])
      return static_cast<Activation>(i);
  throw nb::value_error(("activation: " + name + " is none; known: silu, gelu, gelu_tanh, clamped").c_str());
}

Router router(nb::handle m) {
  Router r{};
  const auto scoring = field<std::string>(m, "scoring");
  using Scoring = Router::Scoring;
  require(scoring == "softmax" || scoring == "sigmoid" || scoring == "chosen", "scoring: softmax, sigmoid or chosen");
  r.scoring = scoring == "softmax" ? Scoring::softmax : scoring == "sigmoid" ? Scoring::sigmoid : Scoring::chosen;
  r.count = field<int64_t>(m, "count"), r.top_k = field<int64_t>(m, "top_k");
  r.groups = field<int64_t>(m, "groups"), r.top_groups = field<int64_t>(m, "top_groups");
  r.normalized = field<bool>(m, "normalized"), r.scale = field<float>(m, "scale");
  r.pair = field<std::string>(m, "group_score") == "pair";
  require(r.count > 0 && r.count <= max_experts, "count: give 1 to " + std::to_string(max_experts) + " experts");
  require(r.groups > 0 && r.count % r.groups == 0 && r.top_groups > 0 && r.top_groups <= r.groups,
          "groups: they are equal, and top_groups are some of them");
  require(r.top_k > 0 && r.top_k <= r.count / r.groups * r.top_groups, "top_k: more than there are to choose from");
  return r;
}

Linear linear_from(nb::handle given, const std::string &what, int64_t rows, int64_t columns) {
  const auto pair = nb::cast<nb::tuple>(given);
  const Matrix &matrix = nb::cast<const Matrix &>(pair[0]);
  require(matrix.rows == rows && matrix.columns == columns,
          what + ": a weight (" + std::to_string(matrix.rows) + ", " + std::to_string(matrix.columns) +
              ") in place of (" + std::to_string(rows) + ", " + std::to_string(columns) + ")");
  return {&matrix, checked<float>(nb::cast<MaybeIn>(pair[1]), (what + " bias").c_str(), {rows})};
}

Norm norm_from(nb::handle description, nb::handle given, const char *place, int64_t size) {
  const auto pair = nb::cast<nb::tuple>(given);
  Norm norm;
  norm.kind = field<std::string>(description, "kind") == "layer" ? Norm::Kind::layer : Norm::Kind::rms;
  norm.size = size, norm.eps = field<float>(description, "eps");
  norm.weight = checked<float>(nb::cast<MaybeIn>(pair[0]), place, {size});
  norm.bias = checked<float>(nb::cast<MaybeIn>(pair[1]), place, {size});
  require(!norm.bias || norm.kind == Norm::Kind::layer, std::string(place) + ": a norm of squares has no bias");
  return norm;
}

void add_block(Decoder &decoder, int64_t hidden, int64_t per_layer_inner, nb::handle block, const nb::dict &linears,
               const nb::dict &norms, const nb::dict &vectors, int shared) {
  const Parts parts(block, linears, norms, vectors);
  Block made{};
  const nb::object m = block.attr("mixer"), f = block.attr("mlp");
  if (const std::string kind = type_of(m); kind == "Attention")
    made.mixer = attention(m, parts, decoder, hidden, shared);
  else if (kind == "LatentAttention")
    made.mixer = latent(m, parts, decoder, hidden);
  else if (kind == "DeltaNet")
    made.mixer = delta(m, parts, hidden);
  else
    throw nb::value_error(("mixer: no computation for " + kind).c_str());
  if (type_of(f) == "Experts")
    made.mlp = experts(f, parts, hidden);
  else
    made.mlp = mlp(parts, "", field<int64_t>(f, "inner"), activation(field<std::string>(f, "activation")), hidden);
  made.attention_in = parts.norm("attention_in", hidden), made.attention_out = parts.norm("attention_out", hidden);
  made.mlp_in = parts.norm("mlp_in", hidden), made.mlp_out = parts.norm("mlp_out", hidden);
  made.parallel = field<bool>(block, "parallel"), made.residual_scale = field<float>(block, "residual_scale");
  if (parts.has_vector("layer_scale"))
    made.layer_scale = *parts.vector("layer_scale", {1});
  if (const int64_t inner = field<int64_t>(block, "per_layer_inner")) {
    require(inner == per_layer_inner, "per_layer_inner: the decoder has no such embedding");
    made.per_layer_down = parts.linear("per_layer.down", inner, hidden);
    made.per_layer_up = parts.linear("per_layer.up", hidden, inner);
    made.per_layer = parts.norm("per_layer", hidden);
  }
  decoder.add_block(std::move(made));
}

} // namespace penjing::bindings
