#include "decoder/block.h"

#include "decoder/rows.h"

namespace penjing {
namespace {

struct Floats {
  float *normed, *mixed, *fed;

  Floats(Memory &memory, const Block &block, int64_t rows, int64_t hidden)
      : normed(memory.take(rows * hidden)), mixed(memory.take(rows * hidden)),
        fed(memory.take(block.parallel ? rows * hidden : 0)) {}
};

struct PerLayer {
  float *inner, *made;

  PerLayer(Memory &memory, const Block &block, int64_t rows, int64_t hidden)
      : inner(memory.take(block.per_layer_down.matrix ? rows * block.per_layer_down.matrix->rows : 0)),
        made(memory.take(block.per_layer_down.matrix ? rows * hidden : 0)) {}
};

// x ← x + norm(up(gelu_tanh(down(x)) · embedding)).
void add_per_layer(const Block &block, Pass &pass, float *x) {
  const int64_t before = pass.memory->used(), rows = pass.rows, hidden = pass.hidden;
  const int64_t inner = block.per_layer_down.matrix->rows;
  const PerLayer f(*pass.memory, block, rows, hidden);
  block.per_layer_down.matrix->multiply(Rows(x, rows, hidden), block.per_layer_down.bias, f.inner, inner);
  for_rows(rows, inner, [&](int64_t row) {
    float *own = f.inner + row * inner;
    elements().activate(Activation::gelu_tanh, own, pass.per_layer + row * pass.per_layer_stride, inner, 0, 1, own);
  });
  block.per_layer_up.matrix->multiply(Rows(f.inner, rows, inner), block.per_layer_up.bias, f.made, hidden);
  for_rows(rows, hidden, [&](int64_t row) {
    float *made = f.made + row * hidden;
    if (block.per_layer)
      block.per_layer(made, made);
    elements().add(made, 1, hidden, x + row * hidden);
  });
  pass.memory->release(before);
}

} // namespace

void Norm::operator()(const float *x, float *y) const {
  if (kind == Kind::rms)
    elements().rms_norm(x, weight, size, eps, 1, y);
  else if (kind == Kind::layer)
    elements().layer_norm(x, weight, bias, size, eps, y);
  else if (x != y)
    std::copy_n(x, size, y);
}

void compute(const Block &block, Pass &pass, float *x) {
  const int64_t before = pass.memory->used(), rows = pass.rows, hidden = pass.hidden;
  const Floats f(*pass.memory, block, rows, hidden);
  // x ← x + residual_scale · norm(y), and what the next part reads: another norm of x, or x itself.
  const auto sum = [&](const Norm &out, float *y, const Norm *next) {
    for_rows(rows, 3 * hidden, [&](int64_t row) {
      float *stream = x + row * hidden, *made = y + row * hidden;
      if (out)
        out(made, made);
      elements().add(made, block.residual_scale, hidden, stream);
      if (next && *next)
        (*next)(stream, f.normed + row * hidden);
    });
  };
  const auto read = [&](const Norm &norm) {
    if (!norm)
      return static_cast<const float *>(x);
    for_rows(rows, hidden, [&](int64_t row) { norm(x + row * hidden, f.normed + row * hidden); });
    return static_cast<const float *>(f.normed);
  };
  const auto mix_it = [&](const auto &mixer) { mix(mixer, pass, read(block.attention_in), f.mixed); };
  std::visit(mix_it, block.mixer);
  if (block.parallel) {
    const float *from = read(block.mlp_in);
    std::visit([&](const auto &mlp) { feed(mlp, pass, from, x, f.fed); }, block.mlp);
    sum(block.attention_out, f.mixed, nullptr);
    sum(block.mlp_out, f.fed, nullptr);
  } else {
    sum(block.attention_out, f.mixed, &block.mlp_in);
    const float *from = block.mlp_in ? f.normed : x;
    std::visit([&](const auto &mlp) { feed(mlp, pass, from, x, f.mixed); }, block.mlp);
    sum(block.mlp_out, f.mixed, nullptr);
  }
  if (block.per_layer_down.matrix)
    add_per_layer(block, pass, x);
  if (block.layer_scale != 1)
    for_rows(rows, hidden, [&](int64_t row) { elements().multiply(block.layer_scale, hidden, x + row * hidden); });
  pass.memory->release(before);
}

int64_t floats_of(const Block &block, int64_t rows, int64_t hidden) {
  const int64_t mixer = std::visit([&](const auto &each) { return floats_of(each, rows); }, block.mixer);
  const int64_t mlp = std::holds_alternative<Mlp>(block.mlp) ? floats_of(std::get<Mlp>(block.mlp), rows)
                                                             : floats_of(std::get<Experts>(block.mlp), rows, hidden);
  return count_floats<Floats>(block, rows, hidden) +
         std::max({mixer, mlp, count_floats<PerLayer>(block, rows, hidden)});
}

} // namespace penjing
