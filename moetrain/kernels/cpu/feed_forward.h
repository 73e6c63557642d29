// SwiGLU feed-forward of a dense layer or of routed experts: down(silu(gate x) * up x). D hidden, F width, m rows.
#pragma once

#include "products.h"

// The weights of one layer or expert: gate and up [F][D], down [D][F]. If T is float, they are rounded to bfloat16.
template <class T>
struct FeedForward {
  const T *gate, *up, *down;
  int64_t hidden, width;
};
struct FeedForwardGradient {
  float *gate, *up, *down;
};

// hidden = silu(gate) * up
inline void swiglu_row(const bf16* gate, const bf16* up, int64_t width, bf16* hidden) {
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const floats x = load(gate + i);
    store(hidden + i, x * sigmoid(x) * load(up + i));
  }
  for (; i < width; i++) hidden[i] = narrow(widen(gate[i]) * sigmoid(widen(gate[i])) * widen(up[i]));
}

// The gradients of gate and up, given the gradient of hidden; also recomputes hidden on request. T is float or bf16.
template <class T>
void swiglu_gradient_row(const bf16* gate, const bf16* up, const T* grad_hidden, int64_t width, bf16* hidden,
                         bf16* grad_gate, bf16* grad_up) {
  const auto at = [&](int64_t i, auto x, auto u, auto grad) {
    const auto s = sigmoid(x), silu = x * s;
    if (hidden != nullptr) store(hidden + i, silu * u);
    store(grad_up + i, grad * silu);
    store(grad_gate + i, grad * u * (s + silu * (1.0f - s)));
  };
  int64_t i = 0;
  for (; i + LANES <= width; i += LANES) at(i, load(gate + i), load(up + i), load(grad_hidden + i));
  for (; i < width; i++) at(i, get(gate + i), get(up + i), get(grad_hidden + i));
}

// Writes y[m][D], and gate_up[m][2F] for the backward pass.
template <class P, class T>
void feed_forward(const bf16* x, int64_t m, const FeedForward<T>& layer, bf16* gate_up, bf16* y) {
  const int64_t hidden = layer.hidden, width = layer.width, padded_width = up_to(width, PANEL);
  const int64_t padded = std::max(2 * padded_width, up_to(hidden, PANEL));
  Scratch<float> first(2 * padded_width * units<P>(hidden)), second(up_to(hidden, PANEL) * units<P>(width));
#pragma omp parallel
  {
    Work<P> work;
    pack_panels<P, true>(layer.gate, hidden, width, hidden, first.get());
    pack_panels<P, true>(layer.up, hidden, width, hidden, first.get() + padded_width * units<P>(hidden));
    pack_panels<P, true>(layer.down, width, hidden, width, second.get());
    Scratch<float> left(CHUNK * ROW_STRIDE), sums(CHUNK * padded);
    Scratch<bf16> inner(CHUNK * width);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m; i += CHUNK) {
      const int64_t rows = std::min(CHUNK, m - i);
      rows_times_panels<P>(x + i * hidden, hidden, rows, hidden, first.get(), units<P>(hidden), 2 * padded_width,
                           sums.get(), padded, false, left.get());
      for (int64_t r = 0; r < rows; r++) {
        bf16* both = gate_up + (i + r) * 2 * width;
        narrow_row(sums.get() + r * padded, both, width);
        narrow_row(sums.get() + r * padded + padded_width, both + width, width);
        swiglu_row(both, both + width, width, inner.get() + r * width);
      }
      rows_times_panels<P>(inner.get(), width, rows, width, second.get(), units<P>(width), hidden, sums.get(), padded,
                           false, left.get());
      for (int64_t r = 0; r < rows; r++) narrow_row(sums.get() + r * padded, y + (i + r) * hidden, hidden);
    }
  }
}

// Writes grad_x[m][D] and the gradients of the weights; these are overwritten, not accumulated.
template <class P, class T>
void feed_forward_backward(const bf16* grad_y, const bf16* x, const bf16* gate_up, int64_t m, const FeedForward<T>& layer,
                           bf16* grad_x, const FeedForwardGradient& grads) {
  const int64_t hidden = layer.hidden, width = layer.width, padded_hidden = up_to(hidden, PANEL);
  const int64_t padded = std::max(up_to(width, PANEL), padded_hidden);
  Scratch<float> by_down(up_to(width, PANEL) * units<P>(hidden)), by_gate(padded_hidden * units<P>(width)),
      by_up(padded_hidden * units<P>(width));
  Scratch<bf16> inner(m * width), grad_gate_up(m * 2 * width);
#pragma omp parallel
  {
    Work<P> work;
    pack_panels<P, false>(layer.down, width, width, hidden, by_down.get());
    pack_panels<P, false>(layer.gate, hidden, hidden, width, by_gate.get());
    pack_panels<P, false>(layer.up, hidden, hidden, width, by_up.get());
    Scratch<float> left(CHUNK * ROW_STRIDE), sums(CHUNK * padded);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < m; i += CHUNK) {
      const int64_t rows = std::min(CHUNK, m - i);
      rows_times_panels<P>(grad_y + i * hidden, hidden, rows, hidden, by_down.get(), units<P>(hidden), width, sums.get(),
                           padded, false, left.get());
      bf16* grad = grad_gate_up.get() + i * 2 * width;
      for (int64_t r = 0; r < rows; r++)
        swiglu_gradient_row(gate_up + (i + r) * 2 * width, gate_up + ((i + r) * 2 + 1) * width, sums.get() + r * padded,
                            width, inner.get() + (i + r) * width, grad + r * 2 * width, grad + (r * 2 + 1) * width);
      rows_times_panels<P>(grad, 2 * width, rows, width, by_gate.get(), units<P>(width), hidden, sums.get(), padded,
                           false, left.get());
      rows_times_panels<P>(grad + width, 2 * width, rows, width, by_up.get(), units<P>(width), hidden, sums.get(), padded,
                           true, left.get());
      for (int64_t r = 0; r < rows; r++) narrow_row(sums.get() + r * padded, grad_x + (i + r) * hidden, hidden);
    }
  }
  outer<P>(grad_gate_up.get(), 2 * width, x, hidden, grads.gate, hidden, m, width, hidden, false);
  outer<P>(grad_gate_up.get() + width, 2 * width, x, hidden, grads.up, hidden, m, width, hidden, false);
  outer<P>(grad_y, hidden, inner.get(), width, grads.down, width, m, hidden, width, false);
}
