// Products of bfloat16 matrices with float32 sums. Rows are contiguous; ld is the row stride in elements.
//
// Both operands are packed into panels of 32-bit units, so that one tile of TILE_ROWS x PANEL sums stays in registers
// while a panel streams through the L1 cache (the scheme of Goto and van de Geijn, ACM TOMS 34(3), 2008). The unit
// depends on the CPU. It is either one bfloat16 widened to float32, for fused multiply-add, or a pair of bfloat16, for
// the pair instruction, which is four times as fast on some CPUs and half as fast on others. Tiles of AMX read pairs, too,
// but add them in the order that tiles.h states.
#pragma once

#include <omp.h>

#include "tiles.h"

constexpr int64_t PANEL = 2 * LANES;
constexpr int64_t DEPTH = 512, OUTER_DEPTH = 256;  // units per pass over the sums, and per pass of an outer product
constexpr int64_t ROW_STRIDE = DEPTH + LANES;      // of packed rows; not a power of two, to avoid cache conflicts
constexpr int64_t BLOCK_UNITS = 1 << 18;           // units per block of panels: 1 MB
constexpr int64_t CHUNK = up_to(32, TILE_ROWS);    // rows per call of a product
constexpr int64_t BESIDE = LANES % TILE_ROWS == 0 ? LANES : TILE_ROWS;  // interleaved rows of a transposed left operand

struct Widened {
  static constexpr int64_t STEP = 1;  // bfloat16 numbers per unit
  static floats add(floats sums, float a, floats b) { return sums + a * b; }
};
#if defined(__AVX512BF16__)
struct Paired {
  static constexpr int64_t STEP = 2;
  static floats add(floats sums, float a, floats b) {
    return bits<floats>(_mm512_dpbf16_ps(bits<__m512>(sums), bits<__m512bh>(every(a)), bits<__m512bh>(b)));
  }
};
#else
using Paired = Widened;
#endif

struct Tiled {
  static constexpr int64_t STEP = 2;
};

// What a thread holds while it multiplies with units of P.
template <class P>
struct Work {
  Work() {}
};
template <>
struct Work<Tiled> {
  TileWork tiles;
};

template <class P>
inline int64_t units(int64_t elements) { return (elements + P::STEP - 1) / P::STEP; }
inline float pair(bf16 first, bf16 second) { return bits<float>(first | uint32_t(second) << 16); }

// c[r][j] (+)= sum over u of a[r * ROWS + u * DEPTHS] b[u][j], r < TILE_ROWS, j < PANEL
template <class P, int64_t ROWS, int64_t DEPTHS>
__attribute__((noinline)) void tile(const float* a, const float* b, int64_t depth, float* c, int64_t ldc, bool add) {
  floats sums[TILE_ROWS][2];
#pragma GCC unroll 8
  for (int64_t r = 0; r < TILE_ROWS; r++) sums[r][0] = sums[r][1] = floats{};
  for (int64_t u = 0; u < depth; u++, a += DEPTHS, b += PANEL) {
    const floats left = load(b), right = load(b + LANES);
#pragma GCC unroll 8
    for (int64_t r = 0; r < TILE_ROWS; r++) {
      sums[r][0] = P::add(sums[r][0], a[r * ROWS], left);
      sums[r][1] = P::add(sums[r][1], a[r * ROWS], right);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < TILE_ROWS; r++)
    for (int64_t half = 0; half < 2; half++) {
      float* to = c + r * ldc + half * LANES;
      store(to, add ? load(to) + sums[r][half] : sums[r][half]);
    }
}

// Transposes a square of vectors, by swapping blocks of 1, 2, 4.. lanes.
template <int64_t SIZE = 1>
inline void transpose(floats* rows) {
  ints first, second;
  for (int64_t l = 0; l < LANES; l++) {
    first[l] = l & SIZE ? LANES + l - SIZE : l;
    second[l] = l & SIZE ? LANES + l : l + SIZE;
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; i++) {
    if (i & SIZE) continue;
    const floats above = rows[i], below = rows[i + SIZE];
    rows[i] = __builtin_shuffle(above, below, first);
    rows[i + SIZE] = __builtin_shuffle(above, below, second);
  }
  if constexpr (2 * SIZE < LANES) transpose<2 * SIZE>(rows);
}

inline void transpose_square(float* square) {
  floats rows[LANES];
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; i++) rows[i] = load(square + i * LANES);
  transpose(rows);
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; i++) store(square + i * LANES, rows[i]);
}

// Packs rows of a left operand [rows][k], widened or copied: row r at out + r * ROW_STRIDE, zeros up to a full tile.
template <class P>
void pack_left(const bf16* a, int64_t lda, int64_t rows, int64_t k, float* out) {
  for (int64_t r = 0; r < up_to(rows, TILE_ROWS); r++, out += ROW_STRIDE, a += lda) {
    if (r >= rows) {
      std::memset(out, 0, units<P>(k) * sizeof(float));
    } else if constexpr (P::STEP == 1) {
      int64_t i = 0;
      for (; i + LANES <= k; i += LANES) store(out + i, load(a + i));
      for (; i < k; i++) out[i] = widen(a[i]);
    } else {
      std::memcpy(out, a, k * sizeof(bf16));
      if (k % 2) reinterpret_cast<bf16*>(out)[k] = 0;
    }
  }
}

// Units that a left operand has for every row, with those that fill the last tile.
template <class P>
inline int64_t padded_units(int64_t depth) { return std::is_same_v<P, Tiled> ? up_to(depth, TILE_PAIRS) : depth; }

// Packs a left operand that is stored transposed as [k][rows]: [units][BESIDE] for every BESIDE rows; for tiles [units /
// TILE_PAIRS][BESIDE][TILE_PAIRS]. Rows up to `readable` may also be read.
template <class P>
void pack_left_transposed(const bf16* a, int64_t lda, int64_t rows, int64_t readable, int64_t k, float* out) {
  const int64_t depth = units<P>(k), padded = padded_units<P>(depth);
  for (int64_t r = 0; r < rows; r += BESIDE, out += BESIDE * padded) {
    for (int64_t u = 0; u < depth; u++) {
      const bf16* first = a + u * P::STEP * lda + r;
      const bool both = P::STEP * u + 1 < k;
      if (BESIDE == LANES && r + LANES <= readable) {
        if constexpr (P::STEP == 1) store(out + u * BESIDE, load(first));
        else store(out + u * BESIDE, pairs(as_halves(first), both ? as_halves(first + lda) : halves{}));
        continue;
      }
      for (int64_t i = 0; i < BESIDE; i++) {
        float unit = 0;
        if (r + i < rows) {
          if constexpr (P::STEP == 1) unit = widen(first[i]);
          else unit = pair(first[i], both ? first[lda + i] : bf16(0));
        }
        out[u * BESIDE + i] = unit;
      }
    }
    if constexpr (std::is_same_v<P, Tiled>) {
      std::memset(out + depth * BESIDE, 0, (padded - depth) * BESIDE * sizeof(float));
      for (int64_t u = 0; u < padded; u += LANES) transpose_square(out + u * BESIDE);
    }
  }
}

// Packs one panel [units][PANEL] of a right operand [k][columns]; if T is float, it is rounded to bfloat16.
template <class P, class T>
void pack_right(const T* b, int64_t ldb, int64_t columns, int64_t k, float* out) {
  for (int64_t u = 0; u < units<P>(k); u++, out += PANEL) {
    const T* first = b + u * P::STEP * ldb;
    const bool both = P::STEP * u + 1 < k;
    if (columns >= PANEL) {
      for (int64_t j = 0; j < PANEL; j += LANES) {
        if constexpr (P::STEP == 1) store(out + j, widen(as_halves(first + j)));
        else store(out + j, pairs(as_halves(first + j), both ? as_halves(first + ldb + j) : halves{}));
      }
      continue;
    }
    for (int64_t j = 0; j < PANEL; j++) {
      float unit = 0;
      if (j < columns) {
        if constexpr (P::STEP == 1) unit = widen(as_bf16(first + j));
        else unit = pair(as_bf16(first + j), both ? as_bf16(first + ldb + j) : bf16(0));
      }
      out[j] = unit;
    }
  }
}

// LANES units of a row from unit u on, all within the row.
template <class P, class T>
floats load_units(const T* row, int64_t u) {
  if constexpr (P::STEP == 1) return widen(as_halves(row + u));
  halves both[2] = {as_halves(row + 2 * u), as_halves(row + 2 * u + LANES)};
  floats units;
  std::memcpy(&units, both, sizeof(units));
  return units;
}

// Packs one panel of a right operand that is stored transposed as [columns][k].
template <class P, class T>
void pack_right_transposed(const T* b, int64_t ldb, int64_t columns, int64_t k, float* out) {
  const int64_t depth = units<P>(k);
  for (int64_t j = 0; j < PANEL; j += LANES) {
    int64_t u = 0;
    if (j + LANES <= columns) {
      for (; (u + LANES) * P::STEP <= k; u += LANES) {
        floats block[LANES];
#pragma GCC unroll 16
        for (int64_t i = 0; i < LANES; i++) block[i] = load_units<P>(b + (j + i) * ldb, u);
        transpose(block);
#pragma GCC unroll 16
        for (int64_t i = 0; i < LANES; i++) store(out + (u + i) * PANEL + j, block[i]);
      }
    }
    for (; u < depth; u++)
      for (int64_t i = j; i < j + LANES; i++) {
        const T* row = b + i * ldb;
        float unit = 0;
        if (i < columns) {
          if constexpr (P::STEP == 1) unit = widen(as_bf16(row + u));
          else unit = pair(as_bf16(row + 2 * u), 2 * u + 1 < k ? as_bf16(row + 2 * u + 1) : bf16(0));
        }
        out[u * PANEL + i] = unit;
      }
  }
}

// c[rows][ldc] (+)= a[rows][k] times the panels, with columns padded to full panels. `depth`: units per panel; the
// product starts at the first. c and scratch (CHUNK * ROW_STRIDE) have room for full tiles; rows <= CHUNK.
template <class P>
void rows_times_panels(const bf16* a, int64_t lda, int64_t rows, int64_t k, const float* panels, int64_t depth,
                       int64_t columns, float* c, int64_t ldc, bool add, float* scratch) {
  for (int64_t start = 0; start < units<P>(k); start += DEPTH) {
    const int64_t now = std::min(DEPTH, units<P>(k) - start);
    pack_left<P>(a + start * P::STEP, lda, rows, std::min(now * P::STEP, k - start * P::STEP), scratch);
    for (int64_t j = 0; j < columns; j += PANEL)
      for (int64_t r = 0; r < rows; r += TILE_ROWS)
        tile<P, ROW_STRIDE, 1>(scratch + r * ROW_STRIDE, panels + j * depth + start * PANEL, now, c + r * ldc + j, ldc,
                               add || start > 0);
  }
}

// c[rows][columns] (+)= the output of `pack_left_transposed` times panels of the same number of units.
template <class P>
void tiles_times_panels(const float* tiles, int64_t rows, const float* panels, int64_t columns, int64_t depth, float* c,
                        int64_t ldc, bool add) {
  for (int64_t j = 0; j < columns; j += PANEL)
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const float* from = tiles + r / BESIDE * BESIDE * depth + r % BESIDE;
      float* to = c + r * ldc + j;
      if (rows - r >= TILE_ROWS && columns - j >= PANEL) {
        tile<P, 1, BESIDE>(from, panels + j * depth, depth, to, ldc, add);
        continue;
      }
      alignas(64) float edge[TILE_ROWS * PANEL];
      tile<P, 1, BESIDE>(from, panels + j * depth, depth, edge, PANEL, false);
      for (int64_t i = 0; i < std::min(TILE_ROWS, rows - r); i++)
        for (int64_t l = 0; l < std::min(PANEL, columns - j); l++)
          to[i * ldc + l] = (add ? to[i * ldc + l] : 0.0f) + edge[i * PANEL + l];
    }
}

inline void narrow_row(const float* from, bf16* to, int64_t size) {
  int64_t i = 0;
  for (; i + LANES <= size; i += LANES) store(to + i, load(from + i));
  for (; i < size; i++) to[i] = narrow(from[i]);
}

// Packs the panel that begins at column j of a right operand, into its place among all panels.
template <class P, bool TRANSPOSED, class T>
void pack_panel(const T* b, int64_t ldb, int64_t columns, int64_t k, int64_t j, float* out) {
  if constexpr (TRANSPOSED) pack_right_transposed<P>(b + j * ldb, ldb, columns - j, k, out + j * units<P>(k));
  else pack_right<P>(b + j, ldb, columns - j, k, out + j * units<P>(k));
}

// Packs all panels of a right operand, on the calling thread.
template <class P, bool TRANSPOSED, class T>
void pack_all(const T* b, int64_t ldb, int64_t columns, int64_t k, float* out) {
  for (int64_t j = 0; j < columns; j += PANEL) pack_panel<P, TRANSPOSED>(b, ldb, columns, k, j, out);
}

// Packs all panels of a right operand, divided among the threads of the calling team.
template <class P, bool TRANSPOSED, class T>
void pack_panels(const T* b, int64_t ldb, int64_t columns, int64_t k, float* out) {
#pragma omp for schedule(static)
  for (int64_t j = 0; j < columns; j += PANEL) pack_panel<P, TRANSPOSED>(b, ldb, columns, k, j, out);
}
