// Which experts work on a token, and how much each counts.
#pragma once

#include <cstdint>

namespace penjing {

struct Router {
  enum class Scoring { softmax, sigmoid, chosen } scoring; // chosen: a softmax over the chosen logits alone
  int64_t count, top_k;
  bool normalized;            // scores of the chosen are divided by their sum
  float scale;                // a factor on them
  int64_t groups, top_groups; // only experts of the best groups may be chosen
  bool pair;                  // a group is as good as its two best together, not as its best
  const float *correction;    // (count), added to scores for choosing only; or null
  const float *expert_scale;  // (count), a factor on each expert's score; or null
};

constexpr int64_t max_experts = 1024;

// logits (count) → the chosen experts (top_k), best first, and their weights; among equals the lower number is first.
// DeepSeek-V3 (arXiv 2412.19437) for groups and correction.
void route(const Router &router, const float *logits, int32_t *chosen, float *weights);

} // namespace penjing
