// What works on each token alone: an MLP, or a mixture of them.
#include <cmath>
#include <numeric>

#include "decoder/block.h"
#include "decoder/rows.h"

namespace penjing {
namespace {

struct Floats {
  float *gate, *up;

  Floats(Memory &memory, const Mlp &mlp, int64_t rows)
      : gate(memory.take(mlp.gate.matrix ? rows * mlp.inner : 0)), up(memory.take(rows * mlp.inner)) {}
  Floats(const Floats &all, int64_t from) : gate(all.gate + from), up(all.up + from) {} // a part of its rows
};

// y (rows, out) = down(activation(gate(x)) · up(x)).
void run(const Mlp &mlp, int64_t rows, const float *x, int64_t columns, const Floats &f, float *y) {
  const Product products[] = {{mlp.up.matrix, mlp.up.bias, f.up, mlp.inner},
                              {mlp.gate.matrix, mlp.gate.bias, f.gate, mlp.inner}};
  const bool gated = mlp.gate.matrix;
  multiply_all(Rows(x, rows, columns), products, gated ? 2 : 1);
  for_rows(rows, mlp.inner, [&](int64_t row) {
    float *up = f.up + row * mlp.inner;
    elements().activate(mlp.activation, gated ? f.gate + row * mlp.inner : up, gated ? up : nullptr, mlp.inner,
                        mlp.limit, mlp.alpha, up);
  });
  mlp.down.matrix->multiply(Rows(f.up, rows, mlp.inner), mlp.down.bias, y, mlp.down.matrix->rows);
}

struct Routed {
  float *shared, *read, *scores, *weights, *gathered, *made;
  Floats inner, shared_inner;
  int32_t *chosen, *place; // of each (token, choice): the expert, and its row among the gathered ones

  Routed(Memory &memory, const Experts &e, int64_t rows, int64_t hidden)
      : shared(memory.take(e.shared.inner ? rows * hidden : 0)),
        read(memory.take(e.router_in || e.experts_in ? rows * hidden : 0)), scores(memory.take(rows * e.router.count)),
        weights(memory.take(rows * e.router.top_k)), gathered(memory.take(rows * e.router.top_k * hidden)),
        made(memory.take(rows * e.router.top_k * hidden)), inner(memory, e.experts.front(), rows * e.router.top_k),
        shared_inner(memory, e.shared, rows), chosen(reinterpret_cast<int32_t *>(memory.take(rows * e.router.top_k))),
        place(reinterpret_cast<int32_t *>(memory.take(rows * e.router.top_k))) {}
};

// `read` ← the norm of the stream where there is one; what is to be read.
const float *normed(const Norm &norm, int64_t rows, int64_t hidden, const float *x, const float *stream, float *read) {
  if (!norm)
    return x;
  for_rows(rows, hidden, [&](int64_t row) { norm(stream + row * hidden, read + row * hidden); });
  return read;
}

// Each expert's tokens, one after another: where each expert's begin (count + 1).
std::vector<int64_t> gather(const Experts &e, int64_t rows, int64_t hidden, const float *x, const Routed &r) {
  const int64_t top = e.router.top_k;
  std::vector<int64_t> begin(static_cast<size_t>(e.router.count) + 1);
  for (int64_t i = 0; i < rows * top; ++i)
    ++begin[static_cast<size_t>(r.chosen[i]) + 1];
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<int64_t> next(begin.begin(), begin.end() - 1);
  for (int64_t i = 0; i < rows * top; ++i)
    r.place[i] = static_cast<int32_t>(next[static_cast<size_t>(r.chosen[i])]++);
  for_rows(rows, top * hidden, [&](int64_t row) {
    for (int64_t k = 0; k < top; ++k)
      std::copy_n(x + row * hidden, hidden, r.gathered + r.place[row * top + k] * hidden);
  });
  return begin;
}

void run_experts(const Experts &e, int64_t hidden, const std::vector<int64_t> &begin, const Routed &r) {
  std::vector<int64_t> busy;
  for (size_t i = 0; i < e.experts.size(); ++i)
    if (begin[i + 1] > begin[i])
      busy.push_back(static_cast<int64_t>(i));
  const auto tokens = [&](int64_t i) { return begin[static_cast<size_t>(i) + 1] - begin[static_cast<size_t>(i)]; };
  const auto one = [&](int64_t i) {
    const Mlp &mlp = e.experts[static_cast<size_t>(i)];
    const int64_t first = begin[static_cast<size_t>(i)];
    const Floats own{r.inner, first * mlp.inner};
    run(mlp, tokens(i), r.gathered + first * hidden, hidden, own, r.made + first * hidden);
  };
  // With experts for all threads each does some of them, the busiest first; else all threads share each.
  if (static_cast<int64_t>(busy.size()) >= 2 * threads()) {
    std::stable_sort(busy.begin(), busy.end(), [&](int64_t a, int64_t b) { return tokens(a) > tokens(b); });
    parallel_for(static_cast<int64_t>(busy.size()), [&](int64_t i) { one(busy[static_cast<size_t>(i)]); });
  } else {
    for (const int64_t i : busy)
      one(i);
  }
}

} // namespace

void feed(const Mlp &mlp, Pass &pass, const float *x, const float *, float *y) {
  const int64_t before = pass.memory->used();
  run(mlp, pass.rows, x, pass.hidden, Floats(*pass.memory, mlp, pass.rows), y);
  pass.memory->release(before);
}

void feed(const Experts &e, Pass &pass, const float *x, const float *stream, float *y) {
  const int64_t before = pass.memory->used(), rows = pass.rows, hidden = pass.hidden, top = e.router.top_k;
  const Routed r(*pass.memory, e, rows, hidden);
  const float *read = normed(e.router_in, rows, hidden, x, stream, r.read);
  e.scores.matrix->multiply(Rows(read, rows, hidden), e.scores.bias, r.scores, e.router.count);
  for_rows(rows, e.router.count * top, [&](int64_t row) {
    route(e.router, r.scores + row * e.router.count, r.chosen + row * top, r.weights + row * top);
  });
  const std::vector<int64_t> begin = gather(e, rows, hidden, normed(e.experts_in, rows, hidden, x, stream, r.read), r);
  run_experts(e, hidden, begin, r);
  if (e.shared.inner) {
    run(e.shared, rows, x, hidden, r.shared_inner, r.shared);
    if (e.shared_gate.matrix)
      e.shared_gate.matrix->multiply(Rows(x, rows, hidden), e.shared_gate.bias, r.scores, 1);
  }
  for_rows(rows, (top + 2) * hidden, [&](int64_t row) {
    float *sum = y + row * hidden, *shared = r.shared + row * hidden;
    std::fill_n(sum, hidden, 0.0f);
    for (int64_t k = 0; k < top; ++k)
      elements().add(r.made + r.place[row * top + k] * hidden, r.weights[row * top + k], hidden, sum);
    if (e.experts_out)
      e.experts_out(sum, sum);
    if (!e.shared.inner)
      return;
    if (e.shared_out)
      e.shared_out(shared, shared);
    const float weight = e.shared_gate.matrix ? 1 / (1 + std::exp(-r.scores[row])) : 1;
    elements().add(shared, weight, hidden, sum);
  });
  pass.memory->release(before);
}

int64_t floats_of(const Mlp &mlp, int64_t rows) { return count_floats<Floats>(mlp, rows); }

int64_t floats_of(const Experts &experts, int64_t rows, int64_t hidden) {
  return count_floats<Routed>(experts, rows, hidden);
}

} // namespace penjing
