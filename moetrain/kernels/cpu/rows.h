// Operations with one pass over rows or elements: RMS norm, log-probabilities, rows of experts, sum of squares, AdamW.
// The order of sums does not depend on the number of threads.
#pragma once

#include <limits>

#include "vectors.h"

// y = x / sqrt(mean(x^2) + eps) * weight; returns 1 / sqrt(mean(x^2) + eps).
inline float rms_norm_row(const bf16* row, const float* weight, int64_t width, float eps, bf16* y) {
  floats squares = every(0.0f);
  float square = 0;
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) squares += load(row + i) * load(row + i);
  for (; i < width; i++) square += widen(row[i]) * widen(row[i]);
  const float over = 1.0f / std::sqrt((square + sum(squares)) / width + eps);
  for (i = 0; i + LANES <= width; i += LANES) store(y + i, load(row + i) * over * load(weight + i));
  for (; i < width; i++) y[i] = narrow(widen(row[i]) * over * weight[i]);
  return over;
}

// The same for rows [rows][width]; inverse [rows] is kept for the backward pass.
inline void rms_norm(const bf16* x, const float* weight, int64_t rows, int64_t width, float eps, bf16* y, float* inverse) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) inverse[r] = rms_norm_row(x + r * width, weight, width, eps, y + r * width);
}

// With n = x / rms: grad_x = (g w - n mean(g w n)) / rms and grad_weight = sum over rows of g n.
inline void rms_norm_backward(const bf16* grad, const bf16* x, const float* weight, const float* inverse, int64_t rows,
                              int64_t width, bf16* grad_x, float* grad_weight) {
  constexpr int64_t BLOCK = 256;
  const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
  Scratch<float> partial(blocks * width);
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; block++) {
    float* by_weight = partial.get() + block * width;
    std::memset(by_weight, 0, width * sizeof(float));
    for (int64_t r = block * BLOCK; r < std::min((block + 1) * BLOCK, rows); r++) {
      const bf16 *g = grad + r * width, *row = x + r * width;
      const float over = inverse[r];
      floats alongs = every(0.0f);
      float along = 0;
      int64_t i = 0;
      for (; i + LANES <= width; i += LANES) {
        const floats both = load(row + i) * over * load(g + i);
        store(by_weight + i, load(by_weight + i) + both);
        alongs += both * load(weight + i);
      }
      for (; i < width; i++) {
        const float both = widen(row[i]) * over * widen(g[i]);
        by_weight[i] += both;
        along += both * weight[i];
      }
      const float mean = (along + sum(alongs)) / width * over;
      for (i = 0; i + LANES <= width; i += LANES)
        store(grad_x + r * width + i, (load(g + i) * load(weight + i) - load(row + i) * mean) * over);
      for (; i < width; i++) grad_x[r * width + i] = narrow((widen(g[i]) * weight[i] - widen(row[i]) * mean) * over);
    }
  }
  std::memset(grad_weight, 0, width * sizeof(float));
  for (int64_t block = 0; block < blocks; block++)
    for (int64_t i = 0; i < width; i++) grad_weight[i] += partial.get()[block * width + i];
}

// For logits [rows][size] divided by the temperature of their row: log of the sum of exp, log-probability of the
// target, entropy; each [rows]. temperatures [rows]; null means 1 everywhere.
inline void log_probabilities(const bf16* logits, const int64_t* targets, const float* temperatures, int64_t rows,
                              int64_t size, float* normalizers, float* logprobs, float* entropies) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const bf16* row = logits + r * size;
    const float scale = temperatures == nullptr ? 1.0f : 1.0f / temperatures[r];
    floats tops = every(-std::numeric_limits<float>::infinity());
    float top = -std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) {
      const floats x = load(row + i);
      tops = x > tops ? x : tops;
    }
    for (; i < size; i++) top = std::max(top, widen(row[i]));
    top = std::max(top, largest(tops)) * scale;
    floats terms = every(0.0f), weighted = every(0.0f);
    float term = 0, weight = 0;
    for (i = 0; i + LANES <= size; i += LANES) {
      const floats x = load(row + i) * scale - top, e = exponential(x);
      terms += e;
      weighted += e * x;
    }
    for (; i < size; i++) {
      const float x = widen(row[i]) * scale - top, e = exponential(x);
      term += e;
      weight += e * x;
    }
    term += sum(terms);
    normalizers[r] = top + std::log(term);
    logprobs[r] = widen(row[targets[r]]) * scale - normalizers[r];
    entropies[r] = std::log(term) - (weight + sum(weighted)) / term;
  }
}

// The gradients of the logits, given the gradients g of the log-probabilities: g (onehot(target) - p) / temperature.
inline void log_probabilities_backward(const float* grads, const bf16* logits, const int64_t* targets,
                                       const float* normalizers, const float* temperatures, int64_t rows, int64_t size,
                                       bf16* grad_logits) {
#pragma omp parallel for schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    const bf16* row = logits + r * size;
    bf16* out = grad_logits + r * size;
    const float scale = temperatures == nullptr ? 1.0f : 1.0f / temperatures[r], grad = grads[r] * scale;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(out + i, exponential(load(row + i) * scale - normalizers[r]) * -grad);
    for (; i < size; i++) out[i] = narrow(exponential(widen(row[i]) * scale - normalizers[r]) * -grad);
    out[targets[r]] = narrow(grad * (1.0f - exponential(widen(row[targets[r]]) * scale - normalizers[r])));
  }
}

// rows[places[n][c]] = x[n], for each of the `chosen` places of a token
inline void scatter_rows(const bf16* x, const int64_t* places, int64_t tokens, int64_t chosen, int64_t width, bf16* rows) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < tokens; n++)
    for (int64_t c = 0; c < chosen; c++)
      std::memcpy(rows + places[n * chosen + c] * width, x + n * width, width * sizeof(bf16));
}

// out[n] = sum over c of weights[n][c] rows[places[n][c]]; null weights mean 1 everywhere
inline void combine_rows(const bf16* rows, const int64_t* places, const float* weights, int64_t tokens, int64_t chosen,
                         int64_t width, bf16* out) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < tokens; n++) {
    const auto weight = [&](int64_t c) { return weights == nullptr ? 1.0f : weights[n * chosen + c]; };
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      floats total = every(0.0f);
      for (int64_t c = 0; c < chosen; c++) total += load(rows + places[n * chosen + c] * width + i) * weight(c);
      store(out + n * width + i, total);
    }
    for (; i < width; i++) {
      float total = 0;
      for (int64_t c = 0; c < chosen; c++) total += widen(rows[places[n * chosen + c] * width + i]) * weight(c);
      out[n * width + i] = narrow(total);
    }
  }
}

// grad_rows[places[n][c]] = weights[n][c] grad[n] and grad_weights[n][c] = grad[n] . rows[places[n][c]]
inline void combine_rows_backward(const bf16* grad, const bf16* rows, const int64_t* places, const float* weights,
                                  int64_t tokens, int64_t chosen, int64_t width, bf16* grad_rows, float* grad_weights) {
#pragma omp parallel for schedule(static)
  for (int64_t n = 0; n < tokens; n++)
    for (int64_t c = 0; c < chosen; c++) {
      const int64_t at = places[n * chosen + c] * width;
      const float weight = weights[n * chosen + c];
      floats alongs = every(0.0f);
      float along = 0;
      int64_t i = 0;
      for (; i + LANES <= width; i += LANES) {
        const floats g = load(grad + n * width + i);
        alongs += g * load(rows + at + i);
        store(grad_rows + at + i, g * weight);
      }
      for (; i < width; i++) {
        const float g = widen(grad[n * width + i]);
        along += g * widen(rows[at + i]);
        grad_rows[at + i] = narrow(g * weight);
      }
      grad_weights[n * chosen + c] = along + sum(alongs);
    }
}

// Sum of squares in float64.
inline double squares(const float* x, int64_t size) {
  typedef double doubles __attribute__((vector_size(8 * LANES)));
  doubles totals = {};
  double total = 0;
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) {
    const doubles wide = __builtin_convertvector(load(x + i), doubles);
    totals += wide * wide;
  }
  for (; i < size; i++) total += double(x[i]) * x[i];
  for (int64_t l = 0; l < LANES; l++) total += totals[l];
  return total;
}

struct AdamW {
  float keep, first, kept, second;  // 1 - lr decay, 1 - beta1, beta2, 1 - beta2
  float correction, eps, step;      // sqrt(1 - beta2^t), eps, lr / (1 - beta1^t)
};

// One AdamW step in place (arXiv 1711.05101), all float32.
inline void adamw(float* param, const float* grad, float* mean, float* square, int64_t size, const AdamW& by) {
  for (int64_t i = 0; i < size; i++) {
    mean[i] += by.first * (grad[i] - mean[i]);
    square[i] = square[i] * by.kept + by.second * grad[i] * grad[i];
    param[i] = param[i] * by.keep - by.step * mean[i] / (std::sqrt(square[i]) / by.correction + by.eps);
  }
}
