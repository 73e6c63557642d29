// Products with few rows, whose weights stay in memory as they are read: INT4 codes with scales, or bfloat16.
//
// A weight matrix [columns][k] is cut into panels of PANEL columns, and a panel into groups of GROUP inputs, which follow
// each other in memory. The matrix is packed once. A panel is multiplied with up to MOST_ROWS rows at a time while its
// sums stay in registers; for many rows a panel is first unpacked into the panel of `products.h`. Each sum adds its
// products in the order of `tile`, so that both give the same bits, for any number of rows and threads.
#pragma once

#include "feed_forward.h"
#include "tiles.h"

constexpr int64_t GROUP = 32;        // inputs that share a scale
constexpr int64_t PAIRS = GROUP / 2;
constexpr int64_t MOST_ROWS = 8;     // rows whose sums stay in registers
constexpr int64_t MOST_PASSES = 4;   // times that a panel is read again; for more rows it is unpacked once
constexpr int64_t FEW_ROWS = 4;      // rows that take no longer than reading the weights

// Two consecutive inputs of LANES columns, as the products of P read them.
template <class P>
struct Pair;
template <>
struct Pair<Widened> {
  floats first, second;
};
#if defined(__AVX512BF16__)
template <>
struct Pair<Paired> {
  floats both;
};
#endif

inline floats add_pair(floats sums, const bf16* row, const Pair<Widened>& weights) {
  return Widened::add(Widened::add(sums, widen(row[0]), weights.first), widen(row[1]), weights.second);
}
#if defined(__AVX512BF16__)
inline floats add_pair(floats sums, const bf16* row, const Pair<Paired>& weights) {
  float both;
  std::memcpy(&both, row, sizeof(both));
  return Paired::add(sums, both, weights.both);
}
#endif

// A panel of bfloat16 weights: [groups][2 halves][PAIRS][LANES] words of two consecutive inputs.
struct DensePanel {
  static constexpr int64_t BYTES = GROUP * PANEL * 2;  // of a group
  const uint8_t* from;
  const uint8_t* group(int64_t g) const { return from + g * BYTES; }
  // The place of input i of column c among all numbers of the panel.
  static int64_t place(int64_t c, int64_t i) {
    return i / GROUP * GROUP * PANEL + ((c / LANES * PAIRS + i % GROUP / 2) * LANES + c % LANES) * 2 + i % 2;
  }

  template <class P>
  struct Half {
    const bf16* words;
    explicit Half(const uint8_t* group, int64_t half)
        : words(reinterpret_cast<const bf16*>(group) + half * PAIRS * 2 * LANES) {}
    Pair<P> at(int64_t pair) const {
      const bf16* word = words + pair * 2 * LANES;
      if constexpr (std::is_same_v<P, Widened>) return {firsts(word), seconds(word)};
      else return {bits<floats>(load_pairs(word))};
    }
  };

  // w is [columns][k]; columns beyond the last are zero.
  static void pack(const bf16* w, int64_t columns, int64_t k, uint8_t* out) {
    for (int64_t start = 0; start < k; start += GROUP)
      for (int64_t c = 0; c < PANEL; c++)
        for (int64_t i = start; i < start + GROUP; i++)
          reinterpret_cast<bf16*>(out)[place(c, i)] = c < columns ? w[c * k + i] : bf16(0);
  }
};

// A panel of INT4 codes: [groups] of codes [2 halves][2][2 blocks][LANES] words, then scales [PANEL] in bfloat16.
//
// Lane 2c + p of block b holds the inputs 2j + p, j = 0..7, of column b * LANES / 2 + c in its bits 4j..4j + 3, as code
// + 8. Shifting both blocks by 4j brings two consecutive inputs of a column into neighbouring lanes.
struct Int4Panel {
  static constexpr int64_t CODE_BYTES = GROUP * PANEL / 2, BYTES = CODE_BYTES + PANEL * 2;  // of a group
  static constexpr int64_t AHEAD = 8;  // groups between the one that is multiplied and the one that is fetched
  const uint8_t* from;
  const uint8_t* group(int64_t g) const { return from + g * BYTES; }

  template <class P>
  struct Half {
    const uint8_t* codes;
    floats scales[2], offsets[2];
    words blocks[2];

    Half(const uint8_t* group, int64_t half) : codes(group + half * 4 * sizeof(words)) {
      const floats s = load(reinterpret_cast<const bf16*>(group + CODE_BYTES) + half * LANES);
      ints doubled[2];
      for (int64_t l = 0; l < LANES; l++) {
        doubled[0][l] = l / 2;
        doubled[1][l] = LANES / 2 + l / 2;
      }
      for (int64_t b = 0; b < 2; b++) {
        scales[b] = __builtin_shuffle(s, doubled[b]);
        offsets[b] = scales[b] * -136.0f;
      }
    }

    // bfloat16(code * scale), exact before the rounding: 128 + (code + 8) is a float with the code in bits 16..19.
    floats weights(int64_t b, int64_t j) const {
      const words code = j < 4 ? blocks[b] << (16 - 4 * j) : blocks[b] >> (4 * j - 16);
#if defined(__AVX512F__)
      // The compiler would compute the offset again, by a second multiplication.
      const __m512i biased = _mm512_ternarylogic_epi32(bits<__m512i>(code), _mm512_set1_epi32(0xf0000),
                                                       _mm512_set1_epi32(0x43000000), 0xea);
      return bits<floats>(_mm512_fmadd_ps(bits<__m512>(biased), bits<__m512>(scales[b]), bits<__m512>(offsets[b])));
#else
      return bits<floats>((code & 0xf0000u) | 0x43000000u) * scales[b] + offsets[b];
#endif
    }

    Pair<P> at(int64_t pair) {
      if (pair % 8 == 0)
        for (int64_t b = 0; b < 2; b++) std::memcpy(&blocks[b], codes + (pair / 8 * 2 + b) * sizeof(words), sizeof(words));
      const floats low = weights(0, pair % 8), high = weights(1, pair % 8);
      if constexpr (std::is_same_v<P, Widened>) {
        ints even, odd;
        for (int64_t l = 0; l < LANES; l++) {
          even[l] = 2 * l;
          odd[l] = 2 * l + 1;
        }
        return {widen(narrow(__builtin_shuffle(low, high, even))), widen(narrow(__builtin_shuffle(low, high, odd)))};
      } else {
#if defined(__AVX512BF16__)
        return {bits<floats>(_mm512_cvtne2ps_pbh(bits<__m512>(high), bits<__m512>(low)))};
#endif
      }
    }
  };

  // codes [columns][k] from -8 to 7, scales [columns][k / GROUP]
  static void pack(const int8_t* codes, const bf16* scales, int64_t columns, int64_t k, uint8_t* out) {
    for (int64_t g = 0; g < k / GROUP; g++, out += BYTES) {
      std::memset(out, 0, BYTES);
      auto* at = reinterpret_cast<uint32_t*>(out);
      for (int64_t c = 0; c < std::min(columns, PANEL); c++) {
        const int64_t half = c / LANES, block = c % LANES / (LANES / 2), lane = c % (LANES / 2) * 2;
        for (int64_t i = 0; i < GROUP; i++) {
          const uint32_t code = uint32_t(codes[c * k + g * GROUP + i] + 8);
          at[((half * 2 + i / 16) * 2 + block) * LANES + lane + i % 2] |= code << (i % 16 / 2 * 4);
        }
        reinterpret_cast<bf16*>(out + CODE_BYTES)[c] = scales[c * (k / GROUP) + g];
      }
    }
  }
};

// c[r][PANEL] = the product of R rows with one panel. The sums restart every DEPTH units, as in `rows_times_panels`.
template <class P, class Panel, int64_t R>
__attribute__((noinline)) void rows_times_panel(const bf16* x, int64_t ldx, int64_t k, Panel panel, float* c) {
  constexpr int64_t GROUPS = DEPTH * P::STEP / GROUP;
  for (int64_t start = 0; start < k / GROUP; start += GROUPS) {
    floats sums[R][2];
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; r++) sums[r][0] = sums[r][1] = floats{};
    for (int64_t g = start; g < std::min(start + GROUPS, k / GROUP); g++) {
      const uint8_t* group = panel.group(g);
      if constexpr (std::is_same_v<Panel, Int4Panel>) {  // the processor alone fetches too late
#pragma GCC unroll 16
        for (int64_t at = 0; at < Panel::BYTES; at += 64) __builtin_prefetch(group + Panel::AHEAD * Panel::BYTES + at);
      }
      // A sum waits for the one before it, so both halves are added side by side.
      typename Panel::template Half<P> left(group, 0), right(group, 1);
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < PAIRS; pair++) {
        const Pair<P> of_left = left.at(pair), of_right = right.at(pair);
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; r++) {
          const bf16* row = x + r * ldx + g * GROUP + 2 * pair;
          sums[r][0] = add_pair(sums[r][0], row, of_left);
          sums[r][1] = add_pair(sums[r][1], row, of_right);
        }
      }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; r++)
      for (int64_t h = 0; h < 2; h++) {
        float* to = c + r * PANEL + h * LANES;
        store(to, start > 0 ? load(to) + sums[r][h] : sums[r][h]);
      }
  }
}

// The same for up to MOST_ROWS rows.
template <class P, class Panel, int64_t R = MOST_ROWS>
void few_rows_times_panel(const bf16* x, int64_t ldx, int64_t rows, int64_t k, Panel panel, float* c) {
  if (rows == R) return rows_times_panel<P, Panel, R>(x, ldx, k, panel, c);
  if constexpr (R > 1) few_rows_times_panel<P, Panel, R - 1>(x, ldx, rows, k, panel, c);
}

// Unpacks a panel into [units][PANEL], as `pack_right_transposed` packs the same weights in bfloat16.
template <class P, class Panel>
void unpack(Panel panel, int64_t k, float* out) {
  for (int64_t g = 0; g < k / GROUP; g++)
    for (int64_t h = 0; h < 2; h++) {
      typename Panel::template Half<P> half(panel.group(g), h);
      float* to = out + g * GROUP / P::STEP * PANEL + h * LANES;
#pragma GCC unroll 16
      for (int64_t pair = 0; pair < PAIRS; pair++) {
        const Pair<P> weights = half.at(pair);
        if constexpr (std::is_same_v<P, Widened>) {
          store(to + 2 * pair * PANEL, weights.first);
          store(to + (2 * pair + 1) * PANEL, weights.second);
        } else {
          store(to + pair * PANEL, weights.both);
        }
      }
    }
}

// y[r][0..columns) = x[r] times one panel, rounded to bfloat16; columns <= PANEL. Each thread has its own scratch.
template <class P, class Panel>
void panel_product(const bf16* x, int64_t ldx, int64_t rows, int64_t k, Panel panel, bf16* y, int64_t ldy, int64_t columns) {
  if (k == 0) {  // a block without a dense part
    for (int64_t r = 0; r < rows; r++) std::memset(y + r * ldy, 0, columns * sizeof(bf16));
    return;
  }
  alignas(64) float sums[CHUNK * PANEL];
  const auto finish = [&](int64_t first, int64_t count) {
    for (int64_t r = 0; r < count; r++) narrow_row(sums + r * PANEL, y + (first + r) * ldy, columns);
  };
  if constexpr (std::is_same_v<P, Tiled>) {
#if defined(__AMX_BF16__)
    for (int64_t i = 0; i < rows; i += CHUNK) {
      const int64_t now = std::min(CHUNK, rows - i);
      few_tiles_times_panel(x + i * ldx, ldx, now, k, panel.from, sums);
      finish(i, now);
    }
#endif
  } else if (rows <= MOST_PASSES * MOST_ROWS) {
    for (int64_t i = 0; i < rows; i += MOST_ROWS) {
      const int64_t now = std::min(MOST_ROWS, rows - i);
      few_rows_times_panel<P>(x + i * ldx, ldx, now, k, panel, sums);
      finish(i, now);
    }
  } else {
    Scratch<float> unpacked(units<P>(k) * PANEL), left(CHUNK * ROW_STRIDE);
    unpack<P>(panel, k, unpacked.get());
    for (int64_t i = 0; i < rows; i += CHUNK) {
      const int64_t now = std::min(CHUNK, rows - i);
      rows_times_panels<P>(x + i * ldx, ldx, now, k, unpacked.get(), units<P>(k), PANEL, sums, PANEL, false, left.get());
      finish(i, now);
    }
  }
}

// Routed experts [E] with gate and up [2 F][D] and down [D][F], packed by panel. Inputs are padded to multiples of GROUP:
// D to `padded`, F to `inner`.
template <class Panel>
struct PackedExperts {
  const uint8_t *gate_up, *down;
  int64_t num, padded, hidden, width;

  int64_t inner() const { return up_to(width, GROUP); }
  static int64_t bytes(int64_t columns, int64_t k) { return up_to(columns, PANEL) * k / GROUP / PANEL * Panel::BYTES; }
  Panel gate(int64_t e, int64_t panel) const { return {gate_up + 2 * e * bytes(width, padded) + bytes(panel * PANEL, padded)}; }
  Panel up(int64_t e, int64_t panel) const { return {gate_up + (2 * e + 1) * bytes(width, padded) + bytes(panel * PANEL, padded)}; }
  Panel out(int64_t e, int64_t panel) const { return {down + e * bytes(hidden, inner()) + bytes(panel * PANEL, inner())}; }
};

// The functions below are called by all threads of a team, which share the panels. Each panel is computed by one thread.

// y[rows][columns] = x[rows][k] times a packed matrix. k is a multiple of GROUP. WAIT: the threads wait for each other.
template <class P, class Panel, bool WAIT = true>
void team_product(const bf16* x, int64_t ldx, int64_t rows, int64_t k, const uint8_t* matrix, int64_t columns, bf16* y,
                  int64_t ldy) {
  const int64_t size = k / GROUP * Panel::BYTES;
#pragma omp for schedule(static) nowait
  for (int64_t j = 0; j < columns; j += PANEL)
    panel_product<P>(x, ldx, rows, k, Panel{matrix + j / PANEL * size}, y + j, ldy, std::min(PANEL, columns - j));
  if constexpr (WAIT) {
#pragma omp barrier
  }
}

// inner[rows][columns from j] = silu(gate x) * up x, for one panel of each.
template <class P, class Panel>
void swiglu_panel(const bf16* x, int64_t ldx, int64_t rows, int64_t k, Panel gate, Panel up, int64_t columns, bf16* inner,
                  int64_t ld_inner) {
  Scratch<bf16> both(2 * rows * PANEL);
  bf16* ups = both.get() + rows * PANEL;
  panel_product<P>(x, ldx, rows, k, gate, both.get(), PANEL, columns);
  panel_product<P>(x, ldx, rows, k, up, ups, PANEL, columns);
  for (int64_t r = 0; r < rows; r++) swiglu_row(both.get() + r * PANEL, ups + r * PANEL, columns, inner + r * ld_inner);
}

// y[rows][D] of rows x [rows][padded] sorted by expert; those of expert e end at ends[e]. inner: [rows]
// [F padded], zeros. Threads take turns with the panels of the experts that have rows, and do not
// wait for each other at the end.
template <class P, class Panel>
void team_experts(const bf16* x, const int64_t* ends, const PackedExperts<Panel>& experts, bf16* inner, bf16* y) {
  const int64_t padded = experts.padded, hidden = experts.hidden, width = experts.width, ld = experts.inner();
  const int64_t wide = up_to(width, PANEL) / PANEL, tall = up_to(hidden, PANEL) / PANEL;
  Scratch<int64_t> chosen(experts.num);
  int64_t num_chosen = 0, most_rows = 0;
  const auto first_row = [&](int64_t e) { return e == 0 ? 0 : ends[e - 1]; };
  for (int64_t e = 0; e < experts.num; e++)
    if (const int64_t rows = ends[e] - first_row(e)) {
      chosen[num_chosen++] = e;
      most_rows = std::max(most_rows, rows);
    }
  // Few rows take the time of reading, so a thread reads panels that follow each other. More rows take the time of
  // multiplying, which differs between experts, so the threads share the panels of each.
  const auto run = [&](int64_t tasks) {
    const int64_t threads = omp_get_num_threads();
    return int(most_rows <= FEW_ROWS ? std::max<int64_t>((tasks + threads - 1) / threads, 1) : 1);
  };
#pragma omp for schedule(static, run(num_chosen * wide))
  for (int64_t task = 0; task < num_chosen * wide; task++) {
    const int64_t e = chosen[task / wide], j = task % wide * PANEL, first = first_row(e);
    swiglu_panel<P>(x + first * padded, padded, ends[e] - first, padded, experts.gate(e, j / PANEL), experts.up(e, j / PANEL),
                    std::min(PANEL, width - j), inner + first * ld + j, ld);
  }
#pragma omp for schedule(static, run(num_chosen * tall)) nowait
  for (int64_t task = 0; task < num_chosen * tall; task++) {
    const int64_t e = chosen[task / tall], j = task % tall * PANEL, first = first_row(e);
    panel_product<P>(inner + first * ld, ld, ends[e] - first, ld, experts.out(e, j / PANEL), y + first * hidden + j, hidden,
                     std::min(PANEL, hidden - j));
  }
}

template <class P, class Panel>
void packed_experts(const bf16* x, const int64_t* ends, const PackedExperts<Panel>& experts, bf16* y) {
  Scratch<bf16> inner(ends[experts.num - 1] * experts.inner());
  std::memset(inner.get(), 0, ends[experts.num - 1] * experts.inner() * sizeof(bf16));
#pragma omp parallel
  team_experts<P, Panel>(x, ends, experts, inner.get(), y);
}
