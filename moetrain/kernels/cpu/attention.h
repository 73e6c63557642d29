// The core of multi-head latent attention (arXiv 2405.04434, section 2.1), without its projections: rotary positions,
// scores, softmax and values of packed rows, forward and backward. Scores exist for one chunk of queries at a time, and
// the backward pass recomputes them (arXiv 2307.08691).
//
// B rows, T tokens, H heads, N width without position, R rotary width, Q = N + R, V value width. Token t attends to the
// keys first_seen[b][t]..t.
#pragma once

#include <limits>

#include "products.h"

struct AttentionShape {
  int64_t rows, tokens, heads, plain, rotary, value;
  float scale;
  int64_t width() const { return plain + rotary; }
};

// Outputs of the projections: q [B][T][H][N + R], kv [B][T][H][N + V], k_rotary [B][T][R] with row stride `ld_rotary`;
// cosine and sine [B][T][R / 2] float32; first_seen [B][T].
struct AttentionInput {
  const bf16 *q, *kv, *k_rotary;
  int64_t ld_rotary;
  const float *cosine, *sine;
  const int32_t* first_seen;
};

// Rotates the pairs (x0, x1), (x2, x3)..; stores the first members of all pairs, then the second members.
inline void rotate(const bf16* x, const float* cosine, const float* sine, int64_t rotary, bf16* out) {
  const auto turn = [&](int64_t p, auto first, auto second, auto c, auto s) {
    store(out + p, first * c - second * s);
    store(out + rotary / 2 + p, second * c + first * s);
  };
  int64_t p = 0;
  for (; p + LANES <= rotary / 2; p += LANES)
    turn(p, firsts(x + 2 * p), seconds(x + 2 * p), load(cosine + p), load(sine + p));
  for (; p < rotary / 2; p++) turn(p, widen(x[2 * p]), widen(x[2 * p + 1]), cosine[p], sine[p]);
}
// The gradient of x, given the gradient of the output of `rotate`.
inline void rotate_back(const float* grad, const float* cosine, const float* sine, int64_t rotary, bf16* out) {
  const auto turn = [&](int64_t p, auto first, auto second, auto c, auto s) {
    store_pairs(out + 2 * p, first * c + second * s, second * c - first * s);
  };
  const float* half = grad + rotary / 2;
  int64_t p = 0;
  for (; p + LANES <= rotary / 2; p += LANES) turn(p, load(grad + p), load(half + p), load(cosine + p), load(sine + p));
  for (; p < rotary / 2; p++) turn(p, grad[p], half[p], cosine[p], sine[p]);
}

// One head of one row: its queries and keys after rotation, [T][Q] bfloat16.
class Head {
 public:
  Head(const AttentionShape& shape, const AttentionInput& in, int64_t b, int64_t h)
      : q(shape.tokens * shape.width()), k(shape.tokens * shape.width()), first_seen(in.first_seen + b * shape.tokens) {
    const int64_t width = shape.width();
    for (int64_t t = 0; t < shape.tokens; t++) {
      const int64_t at = b * shape.tokens + t;
      const float *cosine = in.cosine + at * shape.rotary / 2, *sine = in.sine + at * shape.rotary / 2;
      const bf16* from = in.q + (at * shape.heads + h) * width;
      std::memcpy(q.get() + t * width, from, shape.plain * sizeof(bf16));
      rotate(from + shape.plain, cosine, sine, shape.rotary, q.get() + t * width + shape.plain);
      std::memcpy(k.get() + t * width, in.kv + (at * shape.heads + h) * (shape.plain + shape.value),
                  shape.plain * sizeof(bf16));
      rotate(in.k_rotary + at * in.ld_rotary, cosine, sine, shape.rotary, k.get() + t * width + shape.plain);
    }
  }
  // The first key that any of the queries start..end attends to, rounded down to a panel boundary.
  int64_t first_key(int64_t start, int64_t end) const {
    return *std::min_element(first_seen + start, first_seen + end) / PANEL * PANEL;
  }

  Scratch<bf16> q, k;
  const int32_t* first_seen;
};

// A row contains valid entries in first..last - 1: sets the other entries of the same vectors to x.
inline void surround(float* row, int64_t first, int64_t last, float x) {
  std::fill(row + first / LANES * LANES, row + first, x);
  std::fill(row + last, row + up_to(last, LANES), x);
}
inline void clear_around(bf16* row, int64_t first, int64_t last, int64_t size) {
  std::memset(row, 0, first * sizeof(bf16));
  std::memset(row + last, 0, (size - last) * sizeof(bf16));
}
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();  // score of a masked key: its exp is 0

// out = exp(scale * (score - most)) for keys first..last - 1, zero elsewhere. Returns the sum, and in `most` the largest
// score.
inline float softmax_row(float* scores, int64_t first, int64_t last, int64_t size, float scale, bf16* out, float* most) {
  const int64_t start = first / LANES * LANES;
  surround(scores, first, last, HIDDEN);
  floats tops = every(HIDDEN), totals = every(0.0f);
  for (int64_t j = start; j < last; j += LANES) {
    const floats x = load(scores + j);
    tops = x > tops ? x : tops;
  }
  const float top = largest(tops);
  for (int64_t j = start; j < last; j += LANES) {
    const floats p = exponential((load(scores + j) - top) * scale);
    totals += p;
    store(out + j, p);
  }
  clear_around(out, first, last, size);
  const float total = sum(totals);
  *most = total == total ? top : total;  // propagates NaN, which the comparisons skip
  return total;
}

// out [B][T][H][V]; log_sums and largest [B][H][T]: log of the sum of exp of the logits, and the largest logit.
template <class P>
void attention(const AttentionShape& shape, const AttentionInput& in, bf16* out, float* log_sums, float* largest_logits) {
  const int64_t tokens = shape.tokens, width = shape.width(), value = shape.value;
  const int64_t keys = up_to(tokens, PANEL), padded_value = up_to(value, PANEL);
#pragma omp parallel
  {
    Work<P> work;
    Scratch<float> k_panels(keys * units<P>(width)), v_panels(padded_value * units<P>(tokens)), left(CHUNK * ROW_STRIDE);
    Scratch<float> scores(CHUNK * keys), sums(CHUNK * padded_value);
    Scratch<bf16> p(CHUNK * keys);
    float totals[CHUNK];
#pragma omp for schedule(dynamic)
    for (int64_t z = 0; z < shape.rows * shape.heads; z++) {
      const int64_t b = z / shape.heads, h = z % shape.heads;
      const Head head(shape, in, b, h);
      pack_all<P, true>(head.k.get(), width, tokens, width, k_panels.get());
      pack_all<P, false>(in.kv + (b * tokens * shape.heads + h) * (shape.plain + value) + shape.plain,
                         shape.heads * (shape.plain + value), value, tokens, v_panels.get());
      for (int64_t start = 0; start < tokens; start += CHUNK) {
        const int64_t end = std::min(start + CHUNK, tokens), rows = end - start;
        const int64_t first = head.first_key(start, end), seen = end - first, ld = up_to(seen, PANEL);
        rows_times_panels<P>(head.q.get() + start * width, width, rows, width, k_panels.get() + first * units<P>(width),
                             units<P>(width), seen, scores.get(), ld, false, left.get());
        for (int64_t r = 0; r < rows; r++) {
          const int64_t t = start + r;
          float most;
          totals[r] = softmax_row(scores.get() + r * ld, head.first_seen[t] - first, t + 1 - first, ld, shape.scale,
                                  p.get() + r * ld, &most);
          largest_logits[z * tokens + t] = most * shape.scale;
          log_sums[z * tokens + t] = most * shape.scale + std::log(totals[r]);
        }
        rows_times_panels<P>(p.get(), ld, rows, seen, v_panels.get() + first / P::STEP * PANEL, units<P>(tokens), value,
                             sums.get(), padded_value, false, left.get());
        for (int64_t r = 0; r < rows; r++) {
          bf16* to = out + ((b * tokens + start + r) * shape.heads + h) * value;
          const float over = 1.0f / totals[r];
          for (int64_t i = 0; i < value; i++) to[i] = narrow(sums.get()[r * padded_value + i] * over);
        }
      }
    }
  }
}

// For keys first..last - 1: computes the probabilities `p` from scores, and the gradients of the scores from `grad`, the
// gradients of the probabilities. Both are zero elsewhere.
inline void softmax_gradient_row(float* scores, float* grad, int64_t first, int64_t last, int64_t size, float scale,
                                 float log_sum, bf16* p, bf16* grad_scores) {
  const int64_t start = first / LANES * LANES;
  surround(scores, first, last, HIDDEN);
  surround(grad, first, last, 0.0f);
  floats alongs = every(0.0f);
  for (int64_t j = start; j < last; j += LANES) {
    const floats x = exponential(load(scores + j) * scale - log_sum);
    alongs += x * load(grad + j);
    store(p + j, x);
  }
  const float along = sum(alongs);
  for (int64_t j = start; j < last; j += LANES) store(grad_scores + j, load(p + j) * (load(grad + j) - along) * scale);
  clear_around(p, first, last, size);
  clear_around(grad_scores, first, last, size);
}

struct AttentionGradient {
  bf16 *q, *kv, *k_rotary;  // k_rotary [B][T][R]
};

template <class P>
void attention_backward(const AttentionShape& shape, const AttentionInput& in, const bf16* grad_out, const float* log_sums,
                        const AttentionGradient& grads) {
  constexpr int64_t QUERIES = 2 * CHUNK;
  const int64_t tokens = shape.tokens, width = shape.width(), value = shape.value, plain = shape.plain;
  const int64_t keys = up_to(tokens, PANEL), padded_value = up_to(value, PANEL), padded_width = up_to(width, PANEL);
  const int64_t ld_kv = shape.heads * (plain + value), ld_out = shape.heads * value;
  Scratch<float> grad_k_rotary(shape.rows * shape.heads * tokens * shape.rotary);  // per head, rotated
#pragma omp parallel
  {
    Work<P> work;
    Scratch<float> k_panels(keys * units<P>(width)), v_panels(keys * units<P>(value));  // transposed
    Scratch<float> k_rows(padded_width * units<P>(tokens)), left(CHUNK * ROW_STRIDE);
    Scratch<float> q_rows(padded_width * QUERIES), out_rows(padded_value * QUERIES), tiles(up_to(keys, BESIDE) * QUERIES);
    Scratch<float> scores(CHUNK * keys), grad_p(CHUNK * keys), grad_q(CHUNK * padded_width);
    Scratch<bf16> p(QUERIES * keys), grad_scores(QUERIES * keys);
    Scratch<float> grad_k(keys * padded_width), grad_v(keys * padded_value);
#pragma omp for schedule(dynamic)
    for (int64_t z = 0; z < shape.rows * shape.heads; z++) {
      const int64_t b = z / shape.heads, h = z % shape.heads;
      const Head head(shape, in, b, h);
      const bf16* v = in.kv + (b * tokens * shape.heads + h) * (plain + value) + plain;
      const bf16* grad_head = grad_out + (b * tokens * shape.heads + h) * value;
      pack_all<P, true>(head.k.get(), width, tokens, width, k_panels.get());
      pack_all<P, true>(v, ld_kv, tokens, value, v_panels.get());
      pack_all<P, false>(head.k.get(), width, width, tokens, k_rows.get());
      std::memset(grad_k.get(), 0, keys * padded_width * sizeof(float));
      std::memset(grad_v.get(), 0, keys * padded_value * sizeof(float));
      for (int64_t begin = 0; begin < tokens; begin += QUERIES) {
        const int64_t stop = std::min(begin + QUERIES, tokens), queries = stop - begin;
        const int64_t first = head.first_key(begin, stop), seen = stop - first, ld = up_to(seen, PANEL);
        for (int64_t start = begin; start < stop; start += CHUNK) {
          const int64_t rows = std::min(CHUNK, stop - start), visible = start + rows - first;
          rows_times_panels<P>(head.q.get() + start * width, width, rows, width, k_panels.get() + first * units<P>(width),
                               units<P>(width), visible, scores.get(), ld, false, left.get());
          rows_times_panels<P>(grad_head + start * ld_out, ld_out, rows, value, v_panels.get() + first * units<P>(value),
                               units<P>(value), visible, grad_p.get(), ld, false, left.get());
          for (int64_t r = 0; r < rows; r++) {
            const int64_t t = start + r, at = (t - begin) * ld;
            softmax_gradient_row(scores.get() + r * ld, grad_p.get() + r * ld, head.first_seen[t] - first, t + 1 - first,
                                 ld, shape.scale, log_sums[z * tokens + t], p.get() + at, grad_scores.get() + at);
          }
          rows_times_panels<P>(grad_scores.get() + (start - begin) * ld, ld, rows, visible,
                               k_rows.get() + first / P::STEP * PANEL, units<P>(tokens), width, grad_q.get(),
                               padded_width, false, left.get());
          for (int64_t r = 0; r < rows; r++) {
            const int64_t at = b * tokens + start + r;
            const float* from = grad_q.get() + r * padded_width;
            bf16* to = grads.q + (at * shape.heads + h) * width;
            narrow_row(from, to, plain);
            rotate_back(from + plain, in.cosine + at * shape.rotary / 2, in.sine + at * shape.rotary / 2, shape.rotary,
                        to + plain);
          }
        }
        pack_all<P, false>(head.q.get() + begin * width, width, width, queries, q_rows.get());
        pack_all<P, false>(grad_head + begin * ld_out, ld_out, value, queries, out_rows.get());
        pack_left_transposed<P>(p.get(), ld, seen, ld, queries, tiles.get());
        tiles_times_panels<P>(tiles.get(), seen, out_rows.get(), padded_value, units<P>(queries),
                              grad_v.get() + first * padded_value, padded_value, true);
        pack_left_transposed<P>(grad_scores.get(), ld, seen, ld, queries, tiles.get());
        tiles_times_panels<P>(tiles.get(), seen, q_rows.get(), padded_width, units<P>(queries),
                              grad_k.get() + first * padded_width, padded_width, true);
      }
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t at = b * tokens + t;
        bf16* to = grads.kv + (at * shape.heads + h) * (plain + value);
        narrow_row(grad_k.get() + t * padded_width, to, plain);
        narrow_row(grad_v.get() + t * padded_value, to + plain, value);
        std::memcpy(grad_k_rotary.get() + (z * tokens + t) * shape.rotary, grad_k.get() + t * padded_width + plain,
                    shape.rotary * sizeof(float));
      }
    }
#pragma omp for schedule(static)
    for (int64_t at = 0; at < shape.rows * tokens; at++) {
      const int64_t b = at / tokens, t = at % tokens;
      float* total = grad_k_rotary.get() + (b * shape.heads * tokens + t) * shape.rotary;  // over heads
      for (int64_t h = 1; h < shape.heads; h++)
        for (int64_t i = 0; i < shape.rotary; i++) total[i] += total[h * tokens * shape.rotary + i];
      rotate_back(total, in.cosine + at * shape.rotary / 2, in.sine + at * shape.rotary / 2, shape.rotary,
                  grads.k_rotary + at * shape.rotary);
    }
  }
}
