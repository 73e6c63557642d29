// Attention of new tokens with the bits of training: over the keys and values of each head instead of latents, with the
// sums of `attention` for a document that begins at the start of its row. A query gives the same bits for any rows beside
// it and any threads.
//
// The cache holds what training multiplies, in the form of DensePanel. A page of a head holds its keys (columns are
// positions, inputs the query-key width), then its values (columns are values, inputs positions).
#pragma once

#include "attention.h"
#include "decode_attention.h"
#include "packed.h"

struct HeadPages {
  int64_t heads, width, value;  // query-key and value width of a head
  bf16* pages;                  // [pages][heads][size()]; all numbers are finite, and those beyond the widths are zero
  int64_t inputs() const { return up_to(width, GROUP); }
  int64_t size() const { return PAGE * (inputs() + up_to(value, GROUP)); }
  bf16* keys(int64_t page, int64_t h, int64_t panel) const {
    return pages + (page * heads + h) * size() + panel * PANEL * inputs();
  }
  bf16* values(int64_t page, int64_t h, int64_t panel) const {
    return pages + (page * heads + h) * size() + PAGE * inputs() + panel * PANEL * PAGE;
  }

  // Writes the key [width] and the value [value] of one position.
  void write(int64_t page, int64_t h, int64_t position, const bf16* key, const bf16* from) const {
    bf16* to = keys(page, h, position / PANEL);
    for (int64_t i = 0; i < width; i++) to[DensePanel::place(position % PANEL, i)] = key[i];
    for (int64_t j = 0; j < value; j++) values(page, h, j / PANEL)[DensePanel::place(j % PANEL, position)] = from[j];
  }
};
static_assert(GROUP % PANEL == 0 && PAGE % GROUP == 0);

// A panel of the values of a sequence: PAGE inputs of each of its pages.
struct PagedPanel {
  const bf16* from;  // the panel in page 0
  int64_t stride;    // between pages
  const int32_t* table;
  template <class P>
  using Half = DensePanel::Half<P>;
  const uint8_t* group(int64_t g) const {
    constexpr int64_t GROUPS = PAGE / GROUP;
    return reinterpret_cast<const uint8_t*>(from + table[g / GROUPS] * stride) + g % GROUPS * DensePanel::BYTES;
  }
};

// sums[rows][PANEL] = x times a panel of k inputs, for rows <= MOST_ROWS.
template <class P, class Panel>
void head_times_panel(const bf16* x, int64_t ldx, int64_t rows, int64_t k, Panel panel, float* sums) {
#if defined(__AMX_BF16__)
  if constexpr (std::is_same_v<P, Tiled>) {
    set_row_tiles(rows);
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t g = 0; g < k / GROUP; g++) {
      _tile_loadd(4, x + g * GROUP, ldx * sizeof(bf16));
      _tile_loadd(6, panel.group(g), 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panel.group(g) + TILE_BYTES, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    _tile_stored(0, sums, PANEL * sizeof(float));
    _tile_stored(1, sums + TILE, PANEL * sizeof(float));
    memory_barrier();
    return;
  } else
#endif
  few_rows_times_panel<P>(x, ldx, rows, k, panel, sums);
}

// One head of `rows` <= MOST_ROWS rows of one sequence: row r attends to the positions 0..positions[r]. table: the pages
// of the sequence. queries: row stride ldq, zeros up to inputs(). Writes out [rows][value] with row stride ldo.
template <class P>
void attend_decompressed(const HeadPages& cache, int64_t h, const bf16* queries, int64_t ldq, const int32_t* positions,
                         int64_t rows, const int32_t* table, float scale, bf16* out, int64_t ldo) {
  const int64_t seen = *std::max_element(positions, positions + rows) + 1, ld = up_to(seen, GROUP);
  Scratch<float> scores(rows * ld);
  Scratch<bf16> shares(rows * ld);
  alignas(64) float sums[MOST_ROWS * PANEL];
  float totals[MOST_ROWS];
  for (int64_t start = 0; start < seen; start += PANEL) {
    const auto* keys = reinterpret_cast<const uint8_t*>(cache.keys(table[start / PAGE], h, start % PAGE / PANEL));
    head_times_panel<P>(queries, ldq, rows, cache.inputs(), DensePanel{keys}, sums);
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(scores.get() + r * ld + start, sums + r * PANEL, PANEL * sizeof(float));
  }
  for (int64_t r = 0; r < rows; r++) {
    float most;
    totals[r] = softmax_row(scores.get() + r * ld, 0, positions[r] + 1, ld, scale, shares.get() + r * ld, &most);
  }
  for (int64_t j = 0; j < cache.value; j += PANEL) {
    const PagedPanel values{cache.values(0, h, j / PANEL), cache.heads * cache.size(), table};
    head_times_panel<P>(shares.get(), ld, rows, ld, values, sums);
    for (int64_t r = 0; r < rows; r++) {
      const float over = 1.0f / totals[r];
      for (int64_t i = 0; i < std::min(PANEL, cache.value - j); i++) out[r * ldo + j + i] = narrow(sums[r * PANEL + i] * over);
    }
  }
}
