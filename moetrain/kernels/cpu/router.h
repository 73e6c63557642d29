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

// out[e] = x . w[e] for COUNT rows of w. Each sum adds its products lane by lane, then the lanes, then the rest.
template <int64_t COUNT>
inline void dots(const bf16* x, const float* w, int64_t width, float* out) {
  floats sums[COUNT];
  float rest[COUNT];
#pragma GCC unroll 4
  for (int64_t e = 0; e < COUNT; e++) {
    sums[e] = every(0.0f);
    rest[e] = 0;
  }
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const floats now = load(x + i);
#pragma GCC unroll 4
    for (int64_t e = 0; e < COUNT; e++) sums[e] += now * load(w + e * width + i);
  }
  for (; i < width; i++)
    for (int64_t e = 0; e < COUNT; e++) rest[e] += widen(x[i]) * w[e * width + i];
  for (int64_t e = 0; e < COUNT; e++) out[e] = rest[e] + sum(sums[e]);
}

// The logits [E] of one token. Training calls this function too, so that both choose the same experts.
inline void router_logits(const Router& router, const bf16* x, float* logits) {
  int64_t e = 0;
  for (; e + 4 <= router.experts; e += 4) dots<4>(x, router.weight + e * router.hidden, router.hidden, logits + e);
  for (; e < router.experts; e++) dots<1>(x, router.weight + e * router.hidden, router.hidden, logits + e);
}

// Turns the logits of a token into scores, in place.
inline void score(const Router& router, float* logits) {
  const int64_t experts = router.experts;
  if (router.function == 2) {
    for (int64_t e = 0; e < experts; e++) {
      const float x = logits[e];
      logits[e] = std::sqrt(x > 20.0f ? x : std::log1p(std::exp(x)));
    }
    return;
  }
  const bool is_softmax = router.function == 1;
  const float most = is_softmax ? *std::max_element(logits, logits + experts) : 0.0f;
  const auto at = [&](auto x) { return is_softmax ? exponential(x - most) : sigmoid(x); };
  int64_t e = 0;
  for (; e + LANES <= experts; e += LANES) store(logits + e, at(load(logits + e)));
  for (; e < experts; e++) logits[e] = at(logits[e]);
  if (!is_softmax) return;
  float total = 0;
  for (e = 0; e < experts; e++) total += logits[e];
  for (e = 0; e < experts; e++) logits[e] /= total;
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

// The ids [K] of the experts with the largest biased scores, in that order.
inline void choose(const Router& router, const float* scores, int64_t* ids) {
  Scratch<float> biased(router.experts);
  for (int64_t e = 0; e < router.experts; e++) biased[e] = scores[e] + router.bias[e];
  if (router.groups > 1) close_groups(router, biased.get());
  for (int64_t k = 0; k < router.chosen; k++) {
    ids[k] = place_of_largest(biased.get(), router.experts);
    biased[ids[k]] = -std::numeric_limits<float>::infinity();
  }
}

// ids and weights [K] of the experts of one token.
inline void route(const Router& router, const bf16* x, int64_t* ids, float* weights) {
  Scratch<float> scores(router.experts);
  router_logits(router, x, scores.get());
  score(router, scores.get());
  choose(router, scores.get(), ids);
  float total = 0;
  for (int64_t k = 0; k < router.chosen; k++) total += weights[k] = scores[ids[k]];
  for (int64_t k = 0; k < router.chosen; k++)
    weights[k] = (router.normalize ? weights[k] / (total + 1e-20f) : weights[k]) * router.factor;
}

// For training: logits and scores [N][E] and ids [N][K] of tokens x [N][D].
inline void route_rows(const Router& router, const bf16* x, int64_t rows, float* logits, float* scores, int64_t* ids) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    float *of_row = logits + r * router.experts, *scored = scores + r * router.experts;
    router_logits(router, x + r * router.hidden, of_row);
    std::memcpy(scored, of_row, router.experts * sizeof(float));
    score(router, scored);
    choose(router, scored, ids + r * router.chosen);
  }
}
