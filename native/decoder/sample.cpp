#include "decoder/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "kernels/kernels.h"
#include "runtime/buffer.h"

namespace penjing {
namespace {

constexpr double greedy_below = 1e-5; // temperatures that would overflow the division are greedy
constexpr float infinite = std::numeric_limits<float>::infinity();
constexpr float lowest = std::numeric_limits<float>::lowest();

int64_t blocks_of(int64_t n) { return (n + softmax_block - 1) / softmax_block; }

// The logits, and the greatest of each block of them.
struct Row {
  const float *logits;
  int64_t size;
  const float *maxima;
  float greatest;

  int64_t blocks() const { return blocks_of(size); }
  int64_t argmax() const { // the lowest of equals
    const int64_t block = std::find(maxima, maxima + blocks(), greatest) - maxima;
    return std::find(logits + block * softmax_block, logits + size, greatest) - logits;
  }
};

Row searched(const float *logits, int64_t size, bool *finite) {
  float *maxima = scratch<float, struct Maxima>(blocks_of(size));
  *finite = kernels().block_maxima(logits, size, maxima);
  return {logits, size, maxima, *std::max_element(maxima, maxima + blocks_of(size))};
}

struct Candidate {
  double weight;
  float logit;
  int32_t id;
};

bool likelier(const Candidate &a, const Candidate &b) { return a.logit != b.logit ? a.logit > b.logit : a.id < b.id; }

// Candidates [0, size): what may be drawn, in the order of ids until something sorts them.
struct Candidates {
  Candidate *all;
  int64_t size;

  double mass() const {
    double sum = 0;
    for (int64_t i = 0; i < size; ++i)
      sum += all[i].weight;
    return sum;
  }
  void keep(int64_t count) { // the likeliest
    if (count >= size)
      return;
    std::nth_element(all, all + count, all + size, likelier);
    size = count;
  }
};

// Those above −∞ in the `blocks` likeliest blocks, and whatever else is as likely as the least likely block's best: so
// at least the `blocks` likeliest of all.
Candidates likeliest(const Row &row, int64_t blocks) {
  float threshold = lowest;
  if (blocks < row.blocks()) {
    float *order = scratch<float, struct Order>(row.blocks());
    std::copy_n(row.maxima, row.blocks(), order);
    std::nth_element(order, order + blocks - 1, order + row.blocks(), std::greater<>());
    threshold = std::max(threshold, order[blocks - 1]);
  }
  Candidate *all = scratch<Candidate, Candidates>(row.size + 1);
  int64_t size = 0;
  for (int64_t block = 0; block < row.blocks(); ++block) {
    if (row.maxima[block] < threshold)
      continue;
    const int64_t end = std::min(row.size, (block + 1) * softmax_block);
    for (int64_t id = block * softmax_block; id < end; ++id) {
      all[size] = {0, row.logits[id], static_cast<int32_t>(id)};
      size += row.logits[id] >= threshold;
    }
  }
  return {all, size};
}

void weigh(Candidates &candidates, const Softmax &softmax) {
  for (int64_t i = 0; i < candidates.size; i += softmax_block) {
    float logits[softmax_block];
    double weights[softmax_block];
    const int64_t count = std::min(softmax_block, candidates.size - i);
    for (int64_t j = 0; j < count; ++j)
      logits[j] = candidates.all[i + j].logit;
    kernels().softmax_weights(logits, count, softmax, weights);
    for (int64_t j = 0; j < count; ++j)
      candidates.all[i + j].weight = weights[j];
  }
}

// Where the sum of weights, from the likeliest on, reaches the target (or passes it); those before are then the
// likelier ones, in any order. Halves until sorting is cheap, so that most are never sorted.
int64_t reach(Candidates &candidates, double target, bool pass) {
  constexpr int64_t sortable = 64;
  const auto there = [&](double sum) { return pass ? sum > target : sum >= target; };
  Candidate *all = candidates.all;
  int64_t begin = 0, end = candidates.size;
  double before = 0;
  while (end - begin > sortable) {
    const int64_t middle = begin + (end - begin) / 2;
    std::nth_element(all + begin, all + middle, all + end, likelier);
    const double half = Candidates{all + begin, middle - begin}.mass();
    if (there(before + half)) {
      end = middle;
    } else {
      before += half;
      begin = middle;
    }
  }
  std::sort(all + begin, all + end, likelier);
  for (; begin + 1 < end; ++begin) {
    before += all[begin].weight;
    if (there(before))
      break;
  }
  return begin;
}

int64_t drawn(Candidates &candidates, double uniform) {
  return candidates.all[reach(candidates, uniform * candidates.mass(), true)].id;
}

// The smallest set of the likeliest that weighs top_p of the total or more (Holtzman et al., arXiv 1904.09751).
void keep_nucleus(Candidates &candidates, double total, double top_p) {
  candidates.size = reach(candidates, top_p * total, false) + 1;
}

// One of all, in the order of ids.
int64_t drawn_of_all(const Row &row, const Softmax &softmax, double uniform) {
  double *sums = scratch<double, Softmax>(row.blocks());
  kernels().softmax_sums(row.logits, row.size, softmax, sums);
  double total = 0, before = 0;
  for (int64_t block = 0; block < row.blocks(); ++block)
    total += sums[block];
  int64_t last = row.argmax(); // were the sum of a block to round below its parts'
  for (int64_t block = 0; block < row.blocks(); before += sums[block++]) {
    if (before + sums[block] <= uniform * total)
      continue;
    const int64_t begin = block * softmax_block, count = std::min(softmax_block, row.size - begin);
    double weights[softmax_block], passed = before;
    kernels().softmax_weights(row.logits + begin, count, softmax, weights);
    for (int64_t i = 0; i < count; ++i) {
      passed += weights[i];
      if (weights[i] > 0)
        last = begin + i;
      if (passed > uniform * total)
        return last;
    }
  }
  return last;
}

int64_t drawn_of_top_k(const Row &row, const Softmax &softmax, const SamplingRules &rules, double uniform) {
  Candidates candidates = likeliest(row, rules.top_k + 1); // one more tells whether min_p leaves more than top_k
  candidates.keep(rules.top_k + 1);
  weigh(candidates, softmax);
  candidates.size = std::partition(candidates.all, candidates.all + candidates.size,
                                   [](const Candidate &c) { return c.weight > 0; }) -
                    candidates.all;
  const bool cut = candidates.size > rules.top_k;
  candidates.keep(rules.top_k);
  if (rules.top_p < 1)
    keep_nucleus(candidates, candidates.mass(), rules.top_p);
  else if (!cut && rules.min_p > 0) { // only rules that cut the tail of an order put the likeliest first
    std::sort(candidates.all, candidates.all + candidates.size,
              [](const Candidate &a, const Candidate &b) { return a.id < b.id; });
    double passed = 0;
    const double target = uniform * candidates.mass();
    int64_t i = 0;
    while (i + 1 < candidates.size && (passed += candidates.all[i].weight) <= target)
      ++i;
    return candidates.all[i].id;
  }
  return drawn(candidates, uniform);
}

int64_t drawn_of_nucleus(const Row &row, const Softmax &softmax, const SamplingRules &rules, double uniform) {
  double *sums = scratch<double, Softmax>(row.blocks()), total = 0;
  kernels().softmax_sums(row.logits, row.size, softmax, sums);
  for (int64_t block = 0; block < row.blocks(); ++block)
    total += sums[block];
  for (int64_t blocks = 32;; blocks *= 8) { // most often the few likeliest weigh enough
    Candidates candidates = likeliest(row, blocks);
    weigh(candidates, softmax);
    if (blocks < row.blocks() && candidates.mass() < rules.top_p * total)
      continue;
    keep_nucleus(candidates, total, rules.top_p);
    return drawn(candidates, uniform);
  }
}

// Philox4x64-10 (Salmon et al., SC 2011): block `counter` of the stream of a key.
void philox(uint64_t counter, uint64_t key0, uint64_t key1, uint64_t out[4]) {
  uint64_t a = counter, b = 0, c = 0, d = 0;
  for (int round = 0; round < 10; ++round) {
    const auto first = static_cast<unsigned __int128>(0xD2E7470EE14C6C93) * a;
    const auto second = static_cast<unsigned __int128>(0xCA5A826395121157) * c;
    a = static_cast<uint64_t>(second >> 64) ^ b ^ key0;
    b = static_cast<uint64_t>(second);
    c = static_cast<uint64_t>(first >> 64) ^ d ^ key1;
    d = static_cast<uint64_t>(first);
    key0 += 0x9E3779B97F4A7C15;
    key1 += 0xBB67AE8584CAA73B;
  }
  out[0] = a, out[1] = b, out[2] = c, out[3] = d;
}

void check(bool holds, const std::string &message) {
  if (!holds)
    throw std::invalid_argument(message);
}

} // namespace

Logprobs log_probabilities(const float *logits, int64_t vocabulary, int64_t token, int64_t alternatives) {
  bool finite;
  const Row row = searched(logits, vocabulary, &finite);
  const Softmax softmax{row.greatest, 1, 0};
  double *sums = scratch<double, Softmax>(row.blocks()), total = 0;
  kernels().softmax_sums(logits, vocabulary, softmax, sums);
  for (int64_t block = 0; block < row.blocks(); ++block)
    total += sums[block];
  const double normaliser = row.greatest + std::log(total);
  Logprobs found{logits[token] - normaliser, {}};
  if (alternatives > 0) {
    Candidates best = likeliest(row, alternatives);
    best.keep(alternatives);
    std::sort(best.all, best.all + best.size, likelier);
    for (int64_t i = 0; i < best.size; ++i)
      found.top.emplace_back(best.all[i].id, best.all[i].logit - normaliser);
  }
  return found;
}

Sampler::Sampler(SamplingRules rules, std::span<const int64_t> prompt, std::span<const int64_t> end_tokens,
                 int64_t vocabulary)
    : rules_(std::move(rules)), end_tokens_(end_tokens.begin(), end_tokens.end()), vocabulary_(vocabulary) {
  const auto token = [&](int64_t id) {
    check(id >= 0 && id < vocabulary,
          "token " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(vocabulary));
  };
  check(vocabulary > 0 && vocabulary < std::numeric_limits<int32_t>::max(), "vocabulary: give 1 to 2^31 − 2 tokens");
  check(rules_.temperature >= 0 && std::isfinite(rules_.temperature), "temperature: give 0 or more");
  check(rules_.top_p >= 0 && rules_.top_p <= 1, "top_p: give 0 to 1");
  check(rules_.min_p >= 0 && rules_.min_p <= 1, "min_p: give 0 to 1");
  check(rules_.repetition_penalty > 0 && std::isfinite(rules_.repetition_penalty),
        "repetition_penalty: give more than 0");
  check(std::isfinite(rules_.presence_penalty), "presence_penalty: give a finite number");
  check(std::isfinite(rules_.frequency_penalty), "frequency_penalty: give a finite number");
  for (int64_t id : end_tokens_)
    token(id);
  for (const auto &[id, bias] : rules_.logit_bias) {
    token(id);
    check(std::isfinite(bias), "logit_bias: give finite numbers");
  }
  for (int64_t id : prompt)
    token(id);
  const bool repetition = rules_.repetition_penalty != 1;
  if (repetition || rules_.presence_penalty != 0 || rules_.frequency_penalty != 0)
    used_at_.assign(static_cast<size_t>(vocabulary), -1);
  if (repetition)
    for (int64_t id : prompt)
      use(id, 0);
}

void Sampler::allow(const uint32_t *masks, int64_t rows, int64_t words) {
  allowed_.assign(masks, masks + rows * words);
  rows_ = rows, words_ = words, row_ = 0;
}

int64_t Sampler::next(float *logits, Logprobs *found, int64_t alternatives) {
  bool finite;
  Row row = searched(logits, vocabulary_, &finite);
  if (!finite)
    throw SamplingError("the model's logits are not finite; its weights are damaged or out of range");
  const float *original = logits;
  if (adjusts()) {
    if (found) {
      float *copy = scratch<float, Logprobs>(vocabulary_);
      original = std::copy_n(logits, vocabulary_, copy) - vocabulary_;
    }
    adjust(logits);
    row = searched(logits, vocabulary_, &finite);
    if (row.greatest == -infinite)
      throw SamplingError("no token may come next: what is allowed, and min_tokens, leave none");
    if (row.greatest == infinite)
      throw SamplingError("the logits with their penalties are not finite");
  }
  int64_t token;
  if (rules_.temperature < greedy_below) {
    token = row.argmax();
  } else {
    const Softmax softmax{row.greatest, 1 / rules_.temperature, rules_.min_p};
    const bool top_k = rules_.top_k > 0 && rules_.top_k < vocabulary_;
    token = top_k              ? drawn_of_top_k(row, softmax, rules_, uniform())
            : rules_.top_p < 1 ? drawn_of_nucleus(row, softmax, rules_, uniform())
                               : drawn_of_all(row, softmax, uniform());
  }
  note(token);
  if (found)
    *found = log_probabilities(original, vocabulary_, token, alternatives);
  return token;
}

bool Sampler::greedy() const { return rules_.temperature < greedy_below && used_at_.empty() && !adjusts(); }

bool Sampler::adjusts() const {
  const bool forbids_end = produced_ < rules_.min_tokens && !end_tokens_.empty();
  return forbids_end || !rules_.logit_bias.empty() || !used_.empty() || row_ < rows_;
}

void Sampler::adjust(float *logits) {
  for (const auto &[id, bias] : rules_.logit_bias)
    logits[id] += bias;
  for (const Used &used : used_) {
    float value = logits[used.id];
    if (rules_.repetition_penalty != 1)
      value = value > 0 ? value / rules_.repetition_penalty : value * rules_.repetition_penalty;
    value = static_cast<float>(value - static_cast<double>(rules_.frequency_penalty) * used.count);
    logits[used.id] = used.count ? value - rules_.presence_penalty : value;
  }
  if (produced_ < rules_.min_tokens)
    for (int64_t id : end_tokens_)
      logits[id] = -infinite;
  if (row_ == rows_)
    return;
  const uint32_t *mask = allowed_.data() + row_ * words_;
  for (int64_t begin = 0, word = 0; begin < vocabulary_; begin += 32, ++word) {
    const uint32_t bits = word < words_ ? mask[word] : 0;
    const int64_t count = std::min<int64_t>(32, vocabulary_ - begin);
    if (bits == ~uint32_t{0})
      continue;
    if (bits == 0)
      std::fill_n(logits + begin, count, -infinite);
    else
      for (int64_t i = 0; i < count; ++i)
        logits[begin + i] = bits >> i & 1 ? logits[begin + i] : -infinite;
  }
}

void Sampler::note(int64_t token) {
  ++produced_;
  row_ = std::min(row_ + 1, rows_);
  if (!used_at_.empty())
    use(token, 1);
}

void Sampler::use(int64_t token, int32_t count) {
  int32_t &at = used_at_[static_cast<size_t>(token)];
  if (at < 0) {
    at = static_cast<int32_t>(used_.size());
    used_.push_back({token, 0});
  }
  used_[static_cast<size_t>(at)].count += count;
}

// In [0, 1): the one that numpy's Philox with key [seed, choice] gives at this place.
double Sampler::uniform() const {
  uint64_t words[4];
  const auto at = static_cast<uint64_t>(produced_);
  philox(1 + at / 4, rules_.seed, rules_.choice, words);
  return static_cast<double>(words[at % 4] >> 11) * 0x1p-53;
}

} // namespace penjing
