// The router: scores of a token for all experts, the experts with the largest biased scores, and their weights.
#pragma once

#include <limits>

#include "vectors.h"

struct Router {
  const float *weight, *bias;  // [E][D], [E]
  int64_t hidden, experts, chosen, groups, best_groups;
  int64_t function;  // 0 sigmoid, 1 softmax, 2 square root of softplus
  int64_t normalize;
  float factor;
};

inline float dot(const bf16* x, const float* w, int64_t width) {
  floats sums = every(0.0f);
  float rest = 0;
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) sums += load(x + i) * load(w + i);
  for (; i < width; i++) rest += widen(x[i]) * w[i];
  return rest + sum(sums);
}

inline void score(const Router& router, float* logits) {
  if (router.function == 1) {
    const float most = *std::max_element(logits, logits + router.experts);
    float total = 0;
    for (int64_t e = 0; e < router.experts; e++) total += logits[e] = std::exp(logits[e] - most);
    for (int64_t e = 0; e < router.experts; e++) logits[e] /= total;
    return;
  }
  for (int64_t e = 0; e < router.experts; e++) {
    const float x = logits[e];
    if (router.function == 0) logits[e] = 1.0f / (1.0f + std::exp(-x));
    else logits[e] = std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));
  }
}

// The index of the largest number; the first of equals.
inline int64_t place_of_largest(const float* x, int64_t size) { return std::max_element(x, x + size) - x; }

// Closes all groups but those whose two best scores have the largest sums.
inline void close_groups(const Router& router, float* biased) {
  const int64_t size = router.experts / router.groups;
  Scratch<float> sums(router.groups);
  Scratch<int64_t> open(router.groups);
  for (int64_t g = 0; g < router.groups; g++) {
    const float* in = biased + g * size;
    const int64_t first = place_of_largest(in, size);
    float second = size > 1 ? -std::numeric_limits<float>::infinity() : 0.0f;
    for (int64_t i = 0; i < size; i++)
      if (i != first) second = std::max(second, in[i]);
    sums[g] = in[first] + second;
    open[g] = 0;
  }
  for (int64_t n = 0; n < router.best_groups; n++) {
    const int64_t g = place_of_largest(sums.get(), router.groups);
    open[g] = 1;
    sums[g] = -std::numeric_limits<float>::infinity();
  }
  for (int64_t e = 0; e < router.experts; e++)
    if (!open[e / size]) biased[e] = -std::numeric_limits<float>::infinity();
}

// ids and weights [K] of the experts of one token.
inline void route(const Router& router, const bf16* x, int64_t* ids, float* weights) {
  Scratch<float> scores(router.experts), biased(router.experts);
  for (int64_t e = 0; e < router.experts; e++) scores[e] = dot(x, router.weight + e * router.hidden, router.hidden);
  score(router, scores.get());
  for (int64_t e = 0; e < router.experts; e++) biased[e] = scores[e] + router.bias[e];
  if (router.groups > 1) close_groups(router, biased.get());
  float total = 0;
  for (int64_t k = 0; k < router.chosen; k++) {
    ids[k] = place_of_largest(biased.get(), router.experts);
    weights[k] = scores[ids[k]];
    biased[ids[k]] = -std::numeric_limits<float>::infinity();
    total += weights[k];
  }
  for (int64_t k = 0; k < router.chosen; k++)
    weights[k] = (router.normalize ? weights[k] / (total + 1e-20f) : weights[k]) * router.factor;
}
