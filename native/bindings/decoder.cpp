// penjing._native.Decoder: descriptions and chunks from Python, one call a step.
#include "bindings/decoder.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/kv.h"

namespace penjing::bindings {
namespace {

template <class T>
T field(nb::handle object, const char *name) {
  return nb::cast<T>(object.attr(name));
}

nb::handle matrix_of(nb::handle pair) { return nb::cast<nb::tuple>(pair)[0]; }

// A decoder, and the Python objects whose memory it borrows.
class Held {
public:
  // config: a ModelConfig.  embedding: a matrix, or None where only blocks are run.  head: (matrix, bias or None).
  // final_norm: (weight, bias or None).  screen: of the head, or None.
  Held(nb::handle config, nb::handle embedding, nb::handle head, nb::handle final_norm, nb::handle screen)
      : frame_(frame(config, embedding, head, final_norm, screen)), decoder_(frame_) {
    if (const nb::object second = config.attr("per_layer"); !second.is_none())
      per_layer_inner_ = field<int64_t>(second, "inner");
    keep(nb::make_tuple(embedding, head, final_norm, screen));
  }

  // per_layer: a PerLayerEmbedding of `layers` blocks.  projection: (matrix, bias).  norm: (weight, bias).
  void set_per_layer(nb::handle per_layer, int64_t layers, nb::handle table, nb::handle projection, nb::handle norm) {
    PerLayerTable t;
    t.inner = field<int64_t>(per_layer, "inner"), t.scale = field<float>(per_layer, "scale");
    t.table = &nb::cast<const Matrix &>(table);
    require(t.inner > 0 && t.inner == per_layer_inner_ && t.table->columns == layers * t.inner &&
                t.table->rows >= frame_.vocabulary,
            "per_layer: the table is not (vocabulary, layers · inner)");
    t.projection = linear_from(projection, "per_layer", layers * t.inner, frame_.hidden);
    t.norm = norm_from(per_layer.attr("norm"), norm, "per_layer", t.inner);
    decoder_.set_per_layer(t);
    has_per_layer_ = true;
    keep(nb::make_tuple(table, projection, norm));
  }

  // Blocks that have a part of the second embedding come after it, except where they are only run.
  void add(nb::handle block, const nb::dict &linears, const nb::dict &norms, const nb::dict &vectors, int shared) {
    require(!per_layer_inner_ || !frame_.embedding || has_per_layer_, "per_layer: set it before the blocks");
    add_block(decoder_, frame_.hidden, per_layer_inner_, block, linears, norms, vectors, shared);
    keep(nb::make_tuple(linears, norms, vectors));
  }

  Decoder &operator*() { return decoder_; }
  const Frame &frame() const { return frame_; }
  int64_t per_layer_inner() const { return per_layer_inner_; }

private:
  static Frame frame(nb::handle config, nb::handle embedding, nb::handle head, nb::handle final_norm,
                     nb::handle screen) {
    Frame f;
    f.hidden = field<int64_t>(config, "hidden"), f.vocabulary = field<int64_t>(config, "vocab_size");
    f.positions = field<int64_t>(config, "max_position");
    require(f.hidden > 0 && f.vocabulary > 0 && f.positions > 0, "config: sizes are positive");
    if (embedding.is_none())
      return f;
    f.embedding = &nb::cast<const Matrix &>(embedding);
    require(f.embedding->rows == f.vocabulary && f.embedding->columns == f.hidden,
            "embedding: it is not (vocabulary, hidden)");
    const Linear out = linear_from(head, "head", f.vocabulary, f.hidden);
    f.head = out.matrix, f.head_bias = out.bias;
    f.final_norm = norm_from(config.attr("final_norm"), final_norm, "final_norm", f.hidden);
    f.embedding_scale = field<float>(config, "embedding_scale"), f.logit_scale = field<float>(config, "logit_scale");
    f.logit_softcap = field<float>(config, "logit_softcap");
    if (!screen.is_none()) {
      f.screen = &nb::cast<const Screen &>(screen);
      require(f.screen->fits(*f.head), "screen: it is not one of this head");
      require(!f.head_bias && f.logit_softcap == 0 && f.logit_scale >= 0x1p-20f && f.logit_scale <= 0x1p20f,
              "screen: logits are products times a scale");
    }
    return f;
  }

  void keep(nb::object object) { kept_.push_back(std::move(object)); }

  Frame frame_;
  Decoder decoder_;
  int64_t per_layer_inner_ = 0;
  bool has_per_layer_ = false;
  std::vector<nb::object> kept_;
};

// penjing.models.step.Chunk.
Chunk chunk_of(nb::handle given) {
  const In tokens = field<In>(given, "tokens"), table = field<In>(given, "table");
  Chunk chunk{};
  chunk.tokens = checked<int32_t>(tokens, "tokens", {any}), chunk.n = static_cast<int64_t>(tokens.shape(0));
  chunk.table = checked<int32_t>(table, "table", {any}), chunk.blocks = static_cast<int64_t>(table.shape(0));
  chunk.start = field<int64_t>(given, "start"), chunk.slot = field<int64_t>(given, "slot");
  if (const nb::object sampler = given.attr("sampler"); !sampler.is_none())
    chunk.sampler = nb::cast<Sampler *>(sampler);
  chunk.guesses = field<int64_t>(given, "guesses");
  if (const nb::object wanted = given.attr("logprobs"); !wanted.is_none())
    chunk.alternatives = nb::cast<int64_t>(wanted);
  if (const nb::object score = given.attr("score"); !score.is_none()) {
    chunk.scored_alternatives = nb::cast<int64_t>(score[0]);
    chunk.follower = nb::cast<int64_t>(score[1]);
  }
  return chunk;
}

std::vector<Chunk> chunks_of(const nb::sequence &given) {
  std::vector<Chunk> chunks;
  for (nb::handle each : given)
    chunks.push_back(chunk_of(each));
  return chunks;
}

nb::list logprobs_of(const std::vector<Logprobs> &all) {
  nb::list list;
  for (const Logprobs &each : all) {
    nb::list top;
    for (const auto &[token, value] : each.top)
      top.append(nb::make_tuple(token, value));
    list.append(nb::make_tuple(each.chosen, top));
  }
  return list;
}

// Of each chunk: tokens, logprobs and scores as (chosen, [(token, value), …]), error or None.
nb::list step(Held &held, const nb::sequence &given) {
  std::vector<Chunk> chunks = chunks_of(given);
  {
    nb::gil_scoped_release release;
    (*held).step(chunks);
  }
  nb::list results;
  for (const Chunk &c : chunks) {
    nb::list tokens;
    for (const int64_t token : c.drawn)
      tokens.append(token);
    nb::object error = c.error.empty() ? nb::none() : nb::object(nb::str(c.error.c_str()));
    results.append(nb::make_tuple(tokens, logprobs_of(c.logprobs), logprobs_of(c.scores), error));
  }
  return results;
}

nb::object logits(Held &held, const nb::sequence &given) {
  const std::vector<Chunk> chunks = chunks_of(given);
  size_t rows = 0;
  for (const Chunk &c : chunks)
    rows += static_cast<size_t>(c.n);
  const size_t shape[] = {rows, static_cast<size_t>(held.frame().vocabulary)};
  float *out;
  nb::object result = numpy_array(shape, 2, &out);
  nb::gil_scoped_release release;
  (*held).logits(chunks, out);
  return result;
}

// x (rows, hidden), in place; the chunks' tokens only say how many rows each has.
void run(Held &held, const nb::sequence &given, const Out &x, const MaybeIn &extra) {
  const std::vector<Chunk> chunks = chunks_of(given);
  int64_t rows = 0;
  for (const Chunk &c : chunks)
    rows += c.n;
  float *stream = checked<float>(x, "x", {rows, held.frame().hidden});
  require(!extra || held.per_layer_inner(), "extra: the model has no second embedding");
  const float *second = checked<float>(extra, "extra", {rows, held.per_layer_inner()});
  nb::gil_scoped_release release;
  (*held).run(chunks, stream, second);
}

} // namespace

void decoder(nb::module_ &m) {
  nb::class_<Held>(m, "Decoder")
      .def(nb::init<nb::handle, nb::handle, nb::handle, nb::handle, nb::handle>(), nb::arg("config"),
           nb::arg("embedding").none() = nb::none(), nb::arg("head").none() = nb::none(),
           nb::arg("final_norm").none() = nb::none(), nb::arg("screen").none() = nb::none())
      .def("set_per_layer", &Held::set_per_layer, nb::arg("per_layer"), nb::arg("layers"), nb::arg("table"),
           nb::arg("projection"), nb::arg("norm"))
      .def("add_block", &Held::add, nb::arg("block"), nb::arg("linears"), nb::arg("norms"), nb::arg("vectors"),
           nb::arg("shared") = -1)
      .def(
          "block_bytes", [](Held &held, const std::string &type) { return (*held).block_bytes(kv_type(type)); },
          nb::arg("kv_type"))
      .def_prop_ro("state_bytes", [](Held &held) { return (*held).state_bytes(); })
      .def(
          "activation_bytes", [](Held &held, int64_t rows) { return (*held).activation_bytes(rows); }, nb::arg("rows"))
      .def(
          "reserve",
          [](Held &held, int64_t blocks, const std::string &type, int64_t slots) {
            (*held).reserve(blocks, kv_type(type), slots);
          },
          nb::arg("blocks"), nb::arg("kv_type"), nb::arg("slots") = 0)
      .def(
          "borrow", [](Held &held, Held &other) { (*held).borrow(*other); }, nb::arg("other"))
      .def("step", &step, nb::arg("chunks"))
      .def("logits", &logits, nb::arg("chunks"))
      .def("run", &run, nb::arg("chunks"), nb::arg("x"), nb::arg("extra").none() = nb::none());
}

} // namespace penjing::bindings
