#include "decoder/route.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace penjing {
namespace {

constexpr float none = -std::numeric_limits<float>::infinity();

void softmax(float *x, int64_t n) {
  const float highest = *std::max_element(x, x + n);
  float sum = 0;
  for (int64_t i = 0; i < n; ++i)
    sum += x[i] = std::exp(x[i] - highest);
  for (int64_t i = 0; i < n; ++i)
    x[i] /= sum;
}

// The `wanted` highest of n, best first; each is taken out (`taken`). Always `wanted` different numbers, whatever
// the values are, so that a NaN does no harm here and shows in the result.
void best(const float *values, int64_t n, int64_t wanted, bool *taken, int32_t *found) {
  for (int64_t k = 0; k < wanted; ++k) {
    int64_t at = -1;
    for (int64_t i = 0; i < n; ++i)
      if (!taken[i] && (at < 0 || values[i] > values[at]))
        at = i;
    taken[found[k] = static_cast<int32_t>(at)] = true;
  }
}

// Takes out all experts but those of the best groups.
void keep_groups(const Router &router, const float *values, bool *taken) {
  const int64_t size = router.count / router.groups;
  float of_group[max_experts] = {};
  for (int64_t group = 0; group < router.groups; ++group) {
    float first = none, second = none;
    for (const float *v = values + group * size, *end = v + size; v != end; ++v)
      if (*v > first)
        second = first, first = *v;
      else if (*v > second)
        second = *v;
    of_group[group] = router.pair ? first + second : first;
  }
  bool kept[max_experts] = {};
  int32_t found[max_experts];
  best(of_group, router.groups, router.top_groups, kept, found);
  for (int64_t i = 0; i < router.count; ++i)
    taken[i] = !kept[i / size];
}

} // namespace

void route(const Router &router, const float *logits, int32_t *chosen, float *weights) {
  using Scoring = Router::Scoring;
  const int64_t n = router.count, top = router.top_k;
  float scores[max_experts] = {}, choosing[max_experts] = {};
  std::copy(logits, logits + n, scores);
  if (router.scoring == Scoring::softmax)
    softmax(scores, n);
  else if (router.scoring == Scoring::sigmoid)
    for (int64_t i = 0; i < n; ++i)
      scores[i] = 1 / (1 + std::exp(-scores[i]));
  for (int64_t i = 0; i < n; ++i)
    choosing[i] = router.correction ? scores[i] + router.correction[i] : scores[i];
  bool taken[max_experts] = {};
  if (router.groups > 1)
    keep_groups(router, choosing, taken);
  best(choosing, n, top, taken, chosen);
  float sum = 0;
  for (int64_t k = 0; k < top; ++k)
    sum += weights[k] = scores[chosen[k]];
  if (router.scoring == Scoring::chosen)
    softmax(weights, top);
  else if (router.normalized)
    for (int64_t k = 0; k < top; ++k)
      weights[k] /= sum + 1e-20f; // as DeepSeek has it: all scores may have become 0
  for (int64_t k = 0; k < top; ++k)
    weights[k] *= router.expert_scale ? router.scale * router.expert_scale[chosen[k]] : router.scale;
}

} // namespace penjing
