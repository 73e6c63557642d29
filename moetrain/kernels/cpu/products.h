// Products of bfloat16 matrices with float32 sums, in parallel.
#pragma once

#include "tiled_products.h"

// y[m][n] = x[m][k] w, where w is [k][n], or [n][k] if TRANSPOSED
template <class P, bool TRANSPOSED, class T>
void product(const bf16* x, int64_t ldx, const T* w, int64_t ldw, bf16* y, int64_t ldy, int64_t m, int64_t n, int64_t k) {
  const int64_t depth = units<P>(k), padded = up_to(n, PANEL);
  // Number of columns whose panels stay in the L2 cache while all rows are multiplied with them.
  const int64_t block = std::clamp(BLOCK_UNITS / std::max<int64_t>(depth, 1) / PANEL * PANEL, PANEL, padded);
  Scratch<float> panels(padded * depth);
#pragma omp parallel
  {
    Work<P> work;
    pack_panels<P, TRANSPOSED>(w, ldw, n, k, panels.get());
    Scratch<float> left(CHUNK * ROW_STRIDE), sums(CHUNK * block);
    for (int64_t j = 0; j < n; j += block) {
      const int64_t columns = std::min(block, n - j);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < m; i += CHUNK) {
        const int64_t rows = std::min(CHUNK, m - i);
        rows_times_panels<P>(x + i * ldx, ldx, rows, k, panels.get() + j * depth, depth, columns, sums.get(), block,
                             false, left.get());
        for (int64_t r = 0; r < rows; r++) narrow_row(sums.get() + r * block, y + (i + r) * ldy + j, columns);
      }
    }
  }
}

// out[n][k] (+)= a[m][n]^T b[m][k], in float32
template <class P>
void outer(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, float* out, int64_t ldo, int64_t m, int64_t n,
           int64_t k, bool add) {
  const int64_t block = OUTER_DEPTH * P::STEP;
  const int64_t padded = up_to(k, PANEL) * OUTER_DEPTH;
  Scratch<float> panels(2 * padded);  // two, so a finished thread can pack the next block while others read this one
#pragma omp parallel
  {
    Work<P> work;
    Scratch<float> tiles(up_to(CHUNK, BESIDE) * OUTER_DEPTH);
    // The same number of parts per thread; the split does not change any sum.
    const int64_t parts = up_to((n + CHUNK - 1) / CHUNK, omp_get_num_threads());
    const int64_t part = std::max(up_to((n + parts - 1) / std::max<int64_t>(parts, 1), TILE_ROWS), TILE_ROWS);
    for (int64_t start = 0; start < m; start += block) {
      const int64_t rows = std::min(block, m - start), depth = units<P>(rows);
      float* now = panels.get() + start / block % 2 * padded;
      pack_panels<P, false>(b + start * ldb, ldb, k, rows, now);
#pragma omp for schedule(static) nowait
      for (int64_t i = 0; i < n; i += part) {
        const int64_t columns = std::min(part, n - i);
        pack_left_transposed<P>(a + start * lda + i, lda, columns, n - i, rows, tiles.get());
        tiles_times_panels<P>(tiles.get(), columns, now, k, depth, out + i * ldo, ldo, add || start > 0);
      }
    }
    if (m == 0 && !add) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n; i++) std::memset(out + i * ldo, 0, k * sizeof(float));
    }
  }
}
