#include "decoder/decoder.h"

#include <cmath>
#include <stdexcept>

#include "decoder/rows.h"

namespace penjing {
namespace {

constexpr int64_t head_rows = 64; // whose logits are in memory at once
static_assert(head_rows >= 3 * screen_rows);

// Where a screen leaves more than this share of the head it costs more than it saves, and the next draws do without.
constexpr int64_t worth_screening = 4;
constexpr int64_t draws_without = 32;

// A row whose logits are wanted, and by whom.
struct Wanted {
  int64_t row; // of the step
  size_t chunk;
  int64_t token; // of the chunk
};

std::vector<Wanted> wanted_rows(const std::vector<Chunk> &chunks) {
  std::vector<Wanted> wanted;
  int64_t row = 0;
  for (size_t i = 0; i < chunks.size(); row += chunks[i++].n) {
    const Chunk &c = chunks[i];
    const bool scored = c.scored_alternatives >= 0;
    const int64_t first = scored ? 0 : c.sampler ? c.n - 1 - c.guesses : c.n;
    const int64_t last = c.sampler || c.follower >= 0 ? c.n : c.n - 1;
    for (int64_t token = first; token < last; ++token)
      wanted.push_back({row + token, i, token});
  }
  return wanted;
}

// Is all that is asked of a chunk's logits which one is the greatest?
bool likeliest_alone(const Chunk &c) {
  return c.sampler && c.sampler->greedy() && c.alternatives < 0 && c.scored_alternatives < 0;
}

// A guess is looked at only if all before it were what was drawn.
bool due(const Chunk &c, int64_t token) {
  const int64_t drawn = static_cast<int64_t>(c.drawn.size()), from = c.n - 1 - c.guesses;
  return c.sampler && token == from + drawn && (!drawn || c.drawn.back() == c.tokens[token]);
}

void refuse(const std::string &why) { throw std::invalid_argument(why); }

std::string text(int64_t number) { return std::to_string(number); }

} // namespace

int Decoder::add_rotary(Rotary rotary) {
  for (size_t i = 0; i < rotaries_.size(); ++i)
    if (rotaries_[i].frequencies == rotary.frequencies && rotaries_[i].scale == rotary.scale)
      return static_cast<int>(i);
  rotaries_.push_back(std::move(rotary));
  return static_cast<int>(rotaries_.size()) - 1;
}

int Decoder::add_cache(const KvLayer &layer) {
  layers_.push_back(layer);
  return static_cast<int>(layers_.size()) - 1;
}

void Decoder::add_block(Block block) {
  if (auto *delta = std::get_if<DeltaMixer>(&block.mixer)) {
    delta->state_at = slot_floats_;
    slot_floats_ += (delta->state_floats() + 15) / 16 * 16;
  }
  blocks_.push_back(std::move(block));
  rows_ = 0;
}

void Decoder::reserve(int64_t blocks, KvType type, int64_t slots) {
  if (blocks < 1 || slots < 0 || (slot_floats_ && !slots))
    refuse("reserve: give at least one block, and one slot for models with a state");
  use(std::make_shared<KvPool>(layers_, type, blocks));
  states_ = Buffer<float>(slots * slot_floats_);
  slots_ = slots;
}

void Decoder::borrow(const Decoder &other) {
  if (!other.pool_)
    refuse("borrow: the other decoder has no cache yet");
  use(other.pool_);
}

void Decoder::use(std::shared_ptr<KvPool> pool) {
  for (const Block &block : blocks_) {
    const auto *a = std::get_if<AttentionMixer>(&block.mixer);
    if (!a)
      continue;
    const auto at = static_cast<size_t>(a->kv_layer);
    if (at >= pool->layers().size() || pool->layers()[at].kv_heads != a->kv_heads ||
        pool->layers()[at].key_dim != a->head_dim || pool->layers()[at].value_dim != a->value_dim)
      refuse("the cache that a block shares has another shape than its queries");
  }
  pool_ = std::move(pool);
}

// The stream, rotary tables, token numbers, what the head works in, and the largest block.
int64_t Decoder::floats_of_step(int64_t rows) const {
  Memory counted;
  for (const Rotary &rotary : rotaries_)
    counted.take(2 * rows * static_cast<int64_t>(rotary.frequencies.size()));
  counted.take(2 * rows); // int64
  counted.take(rows * frame_.hidden);
  const int64_t shared = counted.used();
  if (frame_.head) {
    counted.take(head_rows * frame_.hidden);
    counted.take(head_rows * frame_.vocabulary);
    counted.release(shared);
  }
  if (per_layer_.inner)
    counted.take(2 * rows * per_layer_.table->columns);
  int64_t largest = 0;
  for (const Block &block : blocks_)
    largest = std::max(largest, floats_of(block, rows, frame_.hidden));
  counted.take(largest);
  return counted.most();
}

int64_t Decoder::activation_bytes(int64_t rows) const {
  return floats_of_step(rows) * static_cast<int64_t>(sizeof(float));
}

void Decoder::check(const std::vector<Chunk> &chunks, bool tokens) const {
  if (chunks.empty())
    refuse("nothing to compute: give at least one chunk");
  if (!pool_)
    refuse("there is no cache yet: reserve it first");
  if (tokens && !frame_.embedding)
    refuse("the decoder has no embedding; it only runs blocks");
  if (tokens &&
      per_layer_.inner * static_cast<int64_t>(blocks_.size()) != (per_layer_.inner ? per_layer_.table->columns : 0))
    refuse("the second embedding is that of another number of blocks");
  std::vector<bool> taken(static_cast<size_t>(slots_));
  for (const Chunk &chunk : chunks) {
    check(chunk, tokens);
    if (!slot_floats_)
      continue;
    if (chunk.slot < 0 || chunk.slot >= slots_ || taken[static_cast<size_t>(chunk.slot)])
      refuse("slot " + text(chunk.slot) + " is not one of the " + text(slots_) + " slots, or given twice in a step");
    taken[static_cast<size_t>(chunk.slot)] = true;
  }
}

void Decoder::check(const Chunk &c, bool tokens) const {
  if (c.n < 1)
    refuse("a chunk has no tokens; one or more are needed");
  if (c.start < 0 || c.n > frame_.positions - c.start)
    refuse(text(c.n) + " tokens from position " + text(c.start) + ": the model has positions for " +
           text(frame_.positions));
  const int64_t needed = (c.start + c.n + kv_tokens - 1) / kv_tokens;
  if (c.blocks < needed)
    refuse(text(c.n) + " tokens from position " + text(c.start) + " need " + text(needed) +
           " cache blocks; the table has " + text(c.blocks));
  for (int64_t i = 0; i < needed; ++i)
    if (c.table[i] < 0 || c.table[i] >= pool_->blocks())
      refuse("cache block " + text(c.table[i]) + " is not one of the " + text(pool_->blocks()) + " blocks");
  if (!tokens)
    return;
  for (int64_t i = 0; i < c.n; ++i)
    if (c.tokens[i] < 0 || c.tokens[i] >= frame_.vocabulary)
      refuse("token " + text(c.tokens[i]) + " is outside the vocabulary of " + text(frame_.vocabulary));
  if (c.follower < -1 || c.follower >= frame_.vocabulary)
    refuse("token " + text(c.follower) + " is outside the vocabulary of " + text(frame_.vocabulary));
  if (c.sampler && c.sampler->vocabulary() != frame_.vocabulary)
    refuse("the sampler is for a vocabulary of " + text(c.sampler->vocabulary()) + " tokens; the model has " +
           text(frame_.vocabulary));
  if (c.guesses < 0 || c.guesses >= c.n || (c.guesses && (!c.sampler || slot_floats_)))
    refuse(text(c.guesses) + " guesses among " + text(c.n) +
           " tokens: at least one token is none, a sampler draws, and a model with a state takes no guesses");
}

Pass Decoder::begin(const std::vector<Chunk> &chunks) {
  Pass pass{};
  pass.hidden = frame_.hidden;
  for (const Chunk &c : chunks) {
    pass.sequences.push_back({pass.rows, c.n, c.start, c.slot, c.table});
    for (int64_t i = 0; i < c.n; ++i)
      pass.positions.push_back(c.start + i);
    pass.rows += c.n;
  }
  if (pass.rows > rows_) {
    memory_ = Memory(0); // before the new one is there
    memory_ = Memory(floats_of_step(pass.rows));
    rows_ = pass.rows;
  }
  memory_.release(0);
  pass.memory = &memory_;
  pass.pool = pool_.get();
  pass.states = states_.data();
  pass.slot_floats = slot_floats_;
  turn(pass);
  return pass;
}

// Cosine and sine of every row's angles, in float32 as transformers computes them.
void Decoder::turn(Pass &pass) {
  for (const Rotary &rotary : rotaries_) {
    const auto pairs = static_cast<int64_t>(rotary.frequencies.size());
    float *cosine = memory_.take(pass.rows * pairs), *sine = memory_.take(pass.rows * pairs);
    for_rows(pass.rows, 64 * pairs, [&](int64_t row) {
      const auto position = static_cast<float>(pass.positions[static_cast<size_t>(row)]);
      for (int64_t i = 0; i < pairs; ++i) {
        const float angle = position * rotary.frequencies[static_cast<size_t>(i)];
        cosine[row * pairs + i] = std::cos(angle) * rotary.scale;
        sine[row * pairs + i] = std::sin(angle) * rotary.scale;
      }
    });
    pass.turns.push_back({cosine, sine, pairs});
  }
}

float *Decoder::compute_all(const std::vector<Chunk> &chunks, Pass &pass) {
  auto *tokens = reinterpret_cast<int64_t *>(memory_.take(2 * pass.rows));
  float *x = memory_.take(pass.rows * frame_.hidden);
  int64_t *next = tokens;
  for (const Chunk &c : chunks)
    next = std::copy_n(c.tokens, c.n, next);
  frame_.embedding->decode(tokens, pass.rows, x);
  if (frame_.embedding_scale != 1)
    for_rows(pass.rows, frame_.hidden,
             [&](int64_t row) { elements().multiply(frame_.embedding_scale, frame_.hidden, x + row * frame_.hidden); });
  const int64_t before = memory_.used();
  if (per_layer_.inner)
    embed_per_layer(pass, tokens, x);
  for (const Block &block : blocks_) {
    compute(block, pass, x);
    pass.per_layer += per_layer_.inner;
  }
  memory_.release(before);
  return x;
}

// (rows, layers · inner): (norm(projection(x) / √hidden) + scale · table[token]) / √2.
void Decoder::embed_per_layer(Pass &pass, const int64_t *tokens, const float *x) {
  const PerLayerTable &t = per_layer_;
  const int64_t width = t.table->columns, inner = t.inner;
  float *rows = memory_.take(pass.rows * width), *projected = memory_.take(pass.rows * width);
  t.table->decode(tokens, pass.rows, rows);
  t.projection.matrix->multiply(Rows(x, pass.rows, frame_.hidden), t.projection.bias, projected, width);
  const float shrink = 1 / std::sqrt(static_cast<float>(frame_.hidden)), half = std::sqrt(0.5f);
  for_rows(pass.rows, 4 * width, [&](int64_t row) {
    float *own = rows + row * width, *made = projected + row * width;
    elements().multiply(shrink, width, made);
    for (int64_t layer = 0; layer < width / inner; ++layer)
      t.norm(made + layer * inner, made + layer * inner);
    elements().multiply(t.scale, width, own);
    elements().add(made, 1, width, own);
    elements().multiply(half, width, own);
  });
  pass.per_layer = rows;
  pass.per_layer_stride = width;
}

// logits (count, vocabulary) of rows of the last block's output.
void Decoder::head(const float *x, const int64_t *rows, int64_t count, float *normed, float *logits) {
  const int64_t hidden = frame_.hidden, vocabulary = frame_.vocabulary;
  for_rows(count, hidden, [&](int64_t i) { frame_.final_norm(x + rows[i] * hidden, normed + i * hidden); });
  frame_.head->multiply(Rows(normed, count, hidden), frame_.head_bias, logits, vocabulary);
  if (frame_.logit_scale == 1 && frame_.logit_softcap == 0)
    return;
  for_rows(count, 4 * vocabulary, [&](int64_t i) {
    float *row = logits + i * vocabulary;
    if (frame_.logit_scale != 1)
      elements().multiply(frame_.logit_scale, vocabulary, row);
    if (frame_.logit_softcap != 0)
      elements().softcap(frame_.logit_softcap, vocabulary, row);
  });
}

// The likeliest token of each row, by the screen; false where that cannot say it, or is not worth its time.
bool Decoder::likeliest(const float *x, const int64_t *rows, int64_t count, float *normed, float *work,
                        int64_t *found) {
  if (unaided_ > 0) {
    --unaided_;
    return false;
  }
  const int64_t hidden = frame_.hidden, panels = (frame_.vocabulary + lanes - 1) / lanes;
  for (int64_t i = 0; i < count; ++i)
    frame_.final_norm(x + rows[i] * hidden, normed + i * hidden);
  const int64_t left =
      frame_.screen->greatest(*frame_.head, Rows(normed, count, hidden), frame_.logit_scale, work, found);
  if (left == 0 || left > panels / worth_screening)
    unaided_ = draws_without;
  return left > 0;
}

// Scores and draws by the logits of a chunk's tokens [first, last).
void Decoder::finish(Chunk &c, int64_t first, int64_t last, float *logits) {
  for (int64_t token = first; token < last && c.error.empty(); ++token, logits += frame_.vocabulary) {
    if (!elements().finite(logits, frame_.vocabulary)) {
      c.error = "the model's logits are not finite; its weights are damaged or out of range";
      return;
    }
    const int64_t follower = token + 1 < c.n ? c.tokens[token + 1] : c.follower;
    if (c.scored_alternatives >= 0 && follower >= 0)
      c.scores.push_back(log_probabilities(logits, frame_.vocabulary, follower, c.scored_alternatives));
    if (!due(c, token))
      continue;
    try {
      Logprobs found;
      c.drawn.push_back(
          c.sampler->next(logits, c.alternatives >= 0 ? &found : nullptr, std::max<int64_t>(c.alternatives, 0)));
      if (c.alternatives >= 0)
        c.logprobs.push_back(std::move(found));
    } catch (const std::exception &error) {
      c.error = error.what();
    }
  }
}

void Decoder::step(std::vector<Chunk> &chunks) {
  check(chunks, true);
  const Awake awake;
  Pass pass = begin(chunks);
  const float *x = compute_all(chunks, pass);
  const std::vector<Wanted> wanted = wanted_rows(chunks);
  float *normed = memory_.take(head_rows * frame_.hidden), *logits = memory_.take(head_rows * frame_.vocabulary);
  const auto count = static_cast<int64_t>(wanted.size());
  for (int64_t low = 0; low < count; low += head_rows) {
    const int64_t high = std::min(low + head_rows, count);
    int64_t rows[head_rows], found[screen_rows];
    bool screened = frame_.screen && high - low <= screen_rows;
    std::vector<int64_t> firsts; // of each chunk, among these rows
    for (int64_t i = low; i < high; ++i) {
      rows[i - low] = wanted[static_cast<size_t>(i)].row;
      screened = screened && likeliest_alone(chunks[wanted[static_cast<size_t>(i)].chunk]);
      if (i == low || wanted[static_cast<size_t>(i)].chunk != wanted[static_cast<size_t>(i) - 1].chunk)
        firsts.push_back(i);
    }
    if (screened && likeliest(x, rows, high - low, normed, logits, found)) {
      for (int64_t i = low; i < high; ++i)
        if (Chunk &c = chunks[wanted[static_cast<size_t>(i)].chunk]; due(c, wanted[static_cast<size_t>(i)].token)) {
          c.sampler->take(found[i - low]);
          c.drawn.push_back(found[i - low]);
        }
      continue;
    }
    head(x, rows, high - low, normed, logits);
    firsts.push_back(high);
    parallel_for(static_cast<int64_t>(firsts.size()) - 1, [&](int64_t i) {
      const int64_t first = firsts[static_cast<size_t>(i)], last = firsts[static_cast<size_t>(i) + 1];
      const Wanted &begin = wanted[static_cast<size_t>(first)];
      finish(chunks[begin.chunk], begin.token, begin.token + last - first, logits + (first - low) * frame_.vocabulary);
    });
  }
}

void Decoder::logits(const std::vector<Chunk> &chunks, float *out) {
  check(chunks, true);
  const Awake awake;
  Pass pass = begin(chunks);
  const float *x = compute_all(chunks, pass);
  float *normed = memory_.take(head_rows * frame_.hidden);
  for (int64_t low = 0; low < pass.rows; low += head_rows) {
    const int64_t count = std::min(head_rows, pass.rows - low);
    int64_t rows[head_rows];
    for (int64_t i = 0; i < count; ++i)
      rows[i] = low + i;
    head(x, rows, count, normed, out + low * frame_.vocabulary);
  }
}

void Decoder::run(const std::vector<Chunk> &chunks, float *x, const float *extra) {
  check(chunks, false);
  if (blocks_.size() != 1 || (!extra && blocks_[0].per_layer_down.matrix))
    refuse("run: the decoder has one block, which is given its second embedding if it has one");
  const Awake awake;
  Pass pass = begin(chunks);
  pass.per_layer = extra;
  pass.per_layer_stride = blocks_[0].per_layer_down.matrix ? blocks_[0].per_layer_down.matrix->rows : 0;
  compute(blocks_[0], pass, x);
}

} // namespace penjing
