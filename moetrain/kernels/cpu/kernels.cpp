// The C functions that Python calls, with pointers and sizes; `units` is what products read at a time: 0 widened numbers,
// 1 pairs, 2 tiles.
#include <chrono>
#include <omp.h>

#include "attention.h"
#include "decode.h"
#include "feed_forward.h"
#include "packed.h"
#include "rows.h"
#include "tiled_experts.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {
template <class Call>
void with_units(int units, Call call) {
#if defined(__AMX_BF16__)
  if (units == 2) return call(Tiled{});
#endif
  if (units == 1) call(Paired{});
  else call(Widened{});
}

constexpr int64_t SLICE = 1 << 13;  // elements that fit in the cache

// Calls the function with (start, size) of each slice; slices are divided among threads.
template <class Call>
void in_slices(int64_t size, Call call) {
#pragma omp parallel for schedule(static)
  for (int64_t start = 0; start < size; start += SLICE) call(start, std::min(SLICE, size - start));
}

template <class P>
double seconds_of_a_tile() {
  constexpr int64_t ELEMENTS = 256, TIMES = 400, TRIES = 20;
  Scratch<float> a(TILE_ROWS * ROW_STRIDE), b(ELEMENTS * PANEL), c(TILE_ROWS * PANEL);
  std::fill_n(a.get(), TILE_ROWS * ROW_STRIDE, pair(0x3f8d, 0x3f99));  // about 1, read as floats and as pairs
  std::fill_n(b.get(), ELEMENTS * PANEL, pair(0x3f77, 0x3f84));
  double best = 1e9;
  for (int64_t attempt = 0; attempt < TRIES; attempt++) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t i = 0; i < TIMES; i++) {
      tile<P, ROW_STRIDE, 1>(a.get(), b.get(), units<P>(ELEMENTS), c.get(), PANEL, false);
      asm volatile("" : : "r"(c.get()) : "memory");  // keeps the compiler from removing the tile
    }
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

template <class P, class T>
void experts(const bf16* x, const int64_t* ends, int64_t num, int64_t hidden, int64_t width, const T* gate_up,
             const T* down, bf16* kept, bf16* y) {
#pragma omp parallel for schedule(dynamic) if (num >= 2 * omp_get_max_threads())
  for (int64_t e = 0; e < num; e++) {
    const int64_t first = e == 0 ? 0 : ends[e - 1], rows = ends[e] - first;
    const T* gate = gate_up + e * 2 * width * hidden;
    if (rows > 0)
      feed_forward<P, T>(x + first * hidden, rows, {gate, gate + width * hidden, down + e * hidden * width, hidden, width},
                         kept + first * 2 * width, y + first * hidden);
  }
}

template <class P, class T>
void experts_backward(const bf16* grad_y, const bf16* x, const bf16* kept, const int64_t* ends, int64_t num, int64_t hidden,
                      int64_t width, const T* gate_up, const T* down, bf16* grad_x, float* grad_gate_up, float* grad_down) {
#pragma omp parallel for schedule(dynamic) if (num >= 2 * omp_get_max_threads())
  for (int64_t e = 0; e < num; e++) {
    const int64_t first = e == 0 ? 0 : ends[e - 1], rows = ends[e] - first;
    const T* gate = gate_up + e * 2 * width * hidden;
    float* grad_gate = grad_gate_up + e * 2 * width * hidden;
    feed_forward_backward<P, T>(grad_y + first * hidden, x + first * hidden, kept + first * 2 * width, rows,
                                {gate, gate + width * hidden, down + e * hidden * width, hidden, width},
                                grad_x + first * hidden,
                                {grad_gate, grad_gate + width * hidden, grad_down + e * hidden * width});
  }
}
}  // namespace

// Speedup of a tile with pairs over one with widened numbers; 1 if the CPU has no pair instruction.
EXPORT double gain_of_pairs() {
  return Paired::STEP == Widened::STEP ? 1.0 : seconds_of_a_tile<Widened>() / seconds_of_a_tile<Paired>();
}

// Whether this process can multiply by tiles; asks the operating system for them.
EXPORT int tiles_available() { return request_tiles(); }

EXPORT void linear(int units, const bf16* x, const float* w, bf16* y, int64_t m, int64_t n, int64_t k) {
  with_units(units, [&](auto p) { product<decltype(p), true>(x, k, w, k, y, n, m, n, k); });
}

// grad_x [m][k] from grad_y [m][n] and w [n][k]
EXPORT void linear_grad_x(int units, const bf16* grad_y, const float* w, bf16* grad_x, int64_t m, int64_t n, int64_t k) {
  with_units(units, [&](auto p) { product<decltype(p), false>(grad_y, n, w, k, grad_x, k, m, k, n); });
}

// grad_w [n][k] (+)= grad_y^T x
EXPORT void linear_grad_w(int units, const bf16* grad_y, const bf16* x, float* grad_w, int64_t m, int64_t n, int64_t k,
                          int add) {
  with_units(units, [&](auto p) { outer<decltype(p)>(grad_y, n, x, k, grad_w, k, m, n, k, add != 0); });
}

EXPORT void swiglu(const bf16* gate, const bf16* up, bf16* hidden, int64_t size) {
  in_slices(size, [&](int64_t at, int64_t n) { swiglu_row(gate + at, up + at, n, hidden + at); });
}

EXPORT void swiglu_backward(const bf16* grad_hidden, const bf16* gate, const bf16* up, bf16* grad_gate, bf16* grad_up,
                            int64_t size) {
  in_slices(size, [&](int64_t at, int64_t n) {
    swiglu_gradient_row(gate + at, up + at, grad_hidden + at, n, nullptr, grad_gate + at, grad_up + at);
  });
}

// Rows of x are sorted by expert; the rows of expert e end at ends[e]. Weights are float32, or bfloat16 if `halves`.
EXPORT void expert_rows(int units, int half, const bf16* x, const int64_t* ends, const void* gate_up, const void* down,
                        bf16* kept, bf16* y, int64_t num, int64_t hidden, int64_t width) {
  with_units(units, [&](auto p) {
    using P = decltype(p);
    if (half)
      experts<P>(x, ends, num, hidden, width, static_cast<const bf16*>(gate_up), static_cast<const bf16*>(down), kept, y);
    else
      experts<P>(x, ends, num, hidden, width, static_cast<const float*>(gate_up), static_cast<const float*>(down), kept, y);
  });
}

EXPORT void expert_rows_backward(int units, int half, const bf16* grad_y, const bf16* x, const bf16* kept,
                                 const int64_t* ends, const void* gate_up, const void* down, bf16* grad_x,
                                 float* grad_gate_up, float* grad_down, int64_t num, int64_t hidden, int64_t width) {
  with_units(units, [&](auto p) {
    using P = decltype(p);
    if (half)
      experts_backward<P>(grad_y, x, kept, ends, num, hidden, width, static_cast<const bf16*>(gate_up),
                          static_cast<const bf16*>(down), grad_x, grad_gate_up, grad_down);
    else
      experts_backward<P>(grad_y, x, kept, ends, num, hidden, width, static_cast<const float*>(gate_up),
                          static_cast<const float*>(down), grad_x, grad_gate_up, grad_down);
  });
}

// Bytes of a packed matrix [columns][k], of INT4 or bfloat16; k is a multiple of 32.
EXPORT int64_t packed_bytes(int int4, int64_t columns, int64_t k) {
  return int4 ? PackedExperts<Int4Panel>::bytes(columns, k) : PackedExperts<DensePanel>::bytes(columns, k);
}

// codes [num][columns][k] from -8 to 7 and scales [num][columns][k / 32] to panels for products with these units.
EXPORT void pack_int4(int units, const int8_t* codes, const bf16* scales, uint8_t* out, int64_t num, int64_t columns,
                      int64_t k) {
  const int64_t panels = up_to(columns, PANEL) / PANEL, groups = k / GROUP;
  const auto pack = units == 2 ? Int4Tiles::pack : Int4Panel::pack;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < num * panels; task++) {
    const int64_t first = task / panels * columns + task % panels * PANEL;
    const int64_t rest = columns - task % panels * PANEL;
    pack(codes + first * k, scales + first * groups, rest, k, out + task * groups * Int4Panel::BYTES);
  }
}

// w [num][columns][k] to panels
EXPORT void pack_dense(const bf16* w, uint8_t* out, int64_t num, int64_t columns, int64_t k) {
  const int64_t panels = up_to(columns, PANEL) / PANEL;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < num * panels; task++)
    DensePanel::pack(w + (task / panels * columns + task % panels * PANEL) * k, columns - task % panels * PANEL, k,
                     out + task * (k / GROUP) * DensePanel::BYTES);
}

// y [rows][columns] = x [rows][k] times a matrix from `pack_dense`
EXPORT void packed_linear(int units, const bf16* x, const uint8_t* matrix, bf16* y, int64_t rows, int64_t columns, int64_t k) {
  with_units(units, [&](auto p) {
#pragma omp parallel
    {
      TileWork work;
      team_product<decltype(p), DensePanel>(x, k, rows, k, matrix, columns, y, columns);
    }
  });
}

// Rows of x are sorted by expert; the rows of expert e end at ends[e]. gate_up and down: from `pack_int4`, gate and up as
// two matrices.
EXPORT void packed_expert_rows(int units, const bf16* x, const int64_t* ends, const uint8_t* gate_up, const uint8_t* down,
                               bf16* y, int64_t num, int64_t hidden, int64_t width) {
#if defined(__AMX_BF16__)
  if (units == 2) return tiled_experts(x, ends, {gate_up, down, num, hidden, hidden, width}, y);
#endif
  with_units(units, [&](auto p) { packed_experts<decltype(p), Int4Panel>(x, ends, {gate_up, down, num, hidden, hidden, width}, y); });
}

// Sends x [rows][D], the embeddings of new tokens, through all layers; x holds the residual stream after it, and `out`
// [rows][D] its last norm. shape, factors and layers: the fields of DecodeShape and DecodeLayer in their order.
EXPORT void decode_rows(int units, const int64_t* shape, const float* factors, const DecodeLayer* layers,
                        const float* last_norm, const int32_t* sequences, const int32_t* positions, const int32_t* tables,
                        const float* cosine, const float* sine, bf16* pages, bf16* x, bf16* out, int64_t rows,
                        int64_t table_width, int64_t num_pages) {
  DecodeShape s;
  std::memcpy(&s, shape, 15 * sizeof(int64_t));
  std::memcpy(&s.eps, factors, 4 * sizeof(float));
  const DecodeRows in{rows, sequences, positions, tables, table_width, cosine, sine, pages, num_pages};
  with_units(units, [&](auto p) {
    Decode<decltype(p)> decode(s, in, layers, x);
#pragma omp parallel num_threads(decode.threads())
    {
      TileWork work;
      decode(last_norm);
    }
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(out + r * s.hidden, decode.rows() + r * decode.row_width(), s.hidden * sizeof(bf16));
  });
}

EXPORT void latent_attention(int units, const bf16* q, const bf16* kv, const bf16* k_rotary, const float* cosine,
                             const float* sine, const int32_t* first_seen, bf16* out, float* log_sums, float* largest_logits,
                             int64_t ld_rotary, int64_t rows, int64_t tokens, int64_t heads, int64_t plain, int64_t rotary,
                             int64_t value, float scale) {
  with_units(units, [&](auto p) {
    attention<decltype(p)>({rows, tokens, heads, plain, rotary, value, scale},
                           {q, kv, k_rotary, ld_rotary, cosine, sine, first_seen}, out, log_sums, largest_logits);
  });
}

EXPORT void latent_attention_backward(int units, const bf16* grad_out, const bf16* q, const bf16* kv, const bf16* k_rotary,
                                      const float* cosine, const float* sine, const int32_t* first_seen,
                                      const float* log_sums, bf16* grad_q, bf16* grad_kv, bf16* grad_k_rotary,
                                      int64_t ld_rotary, int64_t rows, int64_t tokens, int64_t heads, int64_t plain,
                                      int64_t rotary, int64_t value, float scale) {
  with_units(units, [&](auto p) {
    attention_backward<decltype(p)>({rows, tokens, heads, plain, rotary, value, scale},
                                    {q, kv, k_rotary, ld_rotary, cosine, sine, first_seen}, grad_out, log_sums,
                                    {grad_q, grad_kv, grad_k_rotary});
  });
}

EXPORT void rms_norm_rows(const bf16* x, const float* weight, bf16* y, float* inverse, int64_t rows, int64_t width,
                          float eps) {
  rms_norm(x, weight, rows, width, eps, y, inverse);
}

EXPORT void rms_norm_rows_backward(const bf16* grad, const bf16* x, const float* weight, const float* inverse, bf16* grad_x,
                                   float* grad_weight, int64_t rows, int64_t width) {
  rms_norm_backward(grad, x, weight, inverse, rows, width, grad_x, grad_weight);
}

EXPORT void logprob_rows(const bf16* logits, const int64_t* targets, const float* temperatures, float* normalizers,
                         float* logprobs, float* entropies, int64_t rows, int64_t size) {
  log_probabilities(logits, targets, temperatures, rows, size, normalizers, logprobs, entropies);
}

EXPORT void logprob_rows_backward(const float* grads, const bf16* logits, const int64_t* targets, const float* normalizers,
                                  const float* temperatures, bf16* grad_logits, int64_t rows, int64_t size) {
  log_probabilities_backward(grads, logits, targets, normalizers, temperatures, rows, size, grad_logits);
}

// function: the number of the score function, see `Router`.
EXPORT void router_rows(const bf16* x, const float* weight, const float* bias, float* logits, float* scores, int64_t* ids,
                        int64_t rows, int64_t hidden, int64_t experts, int64_t chosen, int64_t groups, int64_t best_groups,
                        int64_t function) {
  route_rows({weight, bias, hidden, experts, chosen, groups, best_groups, function, 0, 1.0f}, x, rows, logits, scores, ids);
}

EXPORT void spread_rows(const bf16* x, const int64_t* places, bf16* rows, int64_t tokens, int64_t chosen, int64_t width) {
  scatter_rows(x, places, tokens, chosen, width, rows);
}

EXPORT void sum_rows(const bf16* rows, const int64_t* places, const float* weights, bf16* out, int64_t tokens,
                     int64_t chosen, int64_t width) {
  combine_rows(rows, places, weights, tokens, chosen, width, out);
}

EXPORT void sum_rows_backward(const bf16* grad, const bf16* rows, const int64_t* places, const float* weights,
                              bf16* grad_rows, float* grad_weights, int64_t tokens, int64_t chosen, int64_t width) {
  combine_rows_backward(grad, rows, places, weights, tokens, chosen, width, grad_rows, grad_weights);
}

EXPORT void adamw_step(float* param, const float* grad, float* mean, float* square, int64_t size, float keep, float first,
                       float kept, float second, float correction, float eps, float step) {
  in_slices(size, [&](int64_t at, int64_t n) {
    adamw(param + at, grad + at, mean + at, square + at, n, {keep, first, kept, second, correction, eps, step});
  });
}

EXPORT void sum_of_squares(const float* x, int64_t size, double* total) {
  Scratch<double> of_slices(size / SLICE + 1);
  in_slices(size, [&](int64_t at, int64_t n) { of_slices.get()[at / SLICE] = squares(x + at, n); });
  *total = 0;
  for (int64_t at = 0; at < size; at += SLICE) *total += of_slices.get()[at / SLICE];
}
