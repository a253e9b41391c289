// From logits to the next token of one sequence: logit bias and penalties, what is allowed, temperature, min-p, top-k,
// top-p (in this order), one draw.
//
// A sequence draws from its own counter-based generator, so its text depends on its logits and its seed, not on what
// else is in the batch, on threads, or on the instruction set (all arithmetic here is float64, and without fused
// operations).
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

namespace penjing {

// Logits that are not finite, or of which none may be chosen. The sequence cannot go on; others can.
class SamplingError : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

// Natural log-probabilities of a token and of the likeliest ones, best first (of equals the lower id).
struct Logprobs {
  double chosen;
  std::vector<std::pair<int64_t, double>> top;
};

// Log-softmax of logits (vocabulary,) at `token`, and the `alternatives` likeliest.
Logprobs log_probabilities(const float *logits, int64_t vocabulary, int64_t token, int64_t alternatives);

// How tokens are chosen; the names are those of penjing.engine.SamplingParams, and so are the defaults.
struct SamplingRules {
  double temperature = 1;
  int64_t top_k = 0; // 0 or less: all
  double top_p = 1, min_p = 0;
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  std::vector<std::pair<int64_t, float>> logit_bias;
  uint64_t seed = 0, choice = 0; // the key of the generator
  int64_t min_tokens = 0;        // no end token before so many
};

class Sampler {
public:
  // Throws std::invalid_argument for rules out of range and tokens outside the vocabulary.
  Sampler(SamplingRules rules, std::span<const int64_t> prompt, std::span<const int64_t> end_tokens,
          int64_t vocabulary);

  // What may be chosen, one row of `words` words for each of the next `rows` calls of next(), in place of what was
  // allowed before: bit i % 32 of word i / 32 for token i, as xgrammar and llguidance have it. Tokens beyond the words
  // are not allowed. After these rows everything is.
  void allow(const uint32_t *masks, int64_t rows, int64_t words);

  // The next token, and, if `found` is not null, log-probabilities by the logits as they came. Notes the token: it
  // counts for the penalties and moves the generator on, so guesses that turn out wrong must never come here.
  // Changes the logits (vocabulary,). Throws SamplingError, and then has noted nothing.
  int64_t next(float *logits, Logprobs *found = nullptr, int64_t alternatives = 0);

  // Is the next token the first of the greatest logits as they come, and so are those after it?
  bool greedy() const;
  // Notes the token that next() would have chosen.
  void take(int64_t token) { note(token); }

  int64_t vocabulary() const { return vocabulary_; }

private:
  struct Used {
    int64_t id;
    int32_t count; // in the output
  };

  bool adjusts() const;
  void adjust(float *logits);
  void note(int64_t token);
  void use(int64_t token, int32_t count);
  double uniform() const;

  SamplingRules rules_;
  std::vector<int64_t> end_tokens_;
  int64_t vocabulary_, produced_ = 0;
  std::vector<Used> used_;        // what penalties apply to
  std::vector<int32_t> used_at_;  // by token: where it is in used_, or −1; empty without penalties
  std::vector<uint32_t> allowed_; // rows of words_ words
  int64_t words_ = 0, row_ = 0, rows_ = 0;
};

} // namespace penjing
