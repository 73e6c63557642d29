// The sums of panels.h by the tile registers of AMX. A panel of pairs is read as two tiles of TILE columns side by side.
#pragma once

#include "panels.h"

#if defined(__AMX_BF16__)
// A panel of pairs by 32 inputs; the last part is copied if it has fewer.
struct TilePanel {
  const float* panel;
  int64_t depth;
  alignas(64) float rest[TILE_PAIRS * PANEL];

  TilePanel(const float* panel, int64_t depth) : panel(panel), depth(depth) {
    const int64_t now = depth % TILE_PAIRS;
    if (now == 0) return;
    std::memcpy(rest, panel + (depth - now) * PANEL, now * PANEL * sizeof(float));
    std::memset(rest + now * PANEL, 0, (TILE_PAIRS - now) * PANEL * sizeof(float));
  }
  const float* at(int64_t u) const { return u + TILE_PAIRS > depth ? rest : panel + u * PANEL; }
};

// c[..][2 TILE] (+)= the rows of two left tiles, from left(part, row of tiles, &stride), times a panel.
template <bool MORE, class Left>
inline void two_tiles_times_panel(Left left, const TilePanel& panel, float* c, int64_t ldc, bool add) {
  const int64_t stride = ldc * sizeof(float);
  memory_barrier();
  if (add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + TILE, stride);
    if constexpr (MORE) {
      _tile_loadd(2, c + TILE * ldc, stride);
      _tile_loadd(3, c + TILE * ldc + TILE, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (MORE) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t u = 0; u < panel.depth; u += TILE_PAIRS) {
    const float* right = panel.at(u);
    int64_t ld;
    const void* rows = left(u, 0, ld);
    _tile_loadd(4, rows, ld);
    _tile_loadd(6, right, PANEL * sizeof(float));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, right + TILE, PANEL * sizeof(float));
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (MORE) {
      rows = left(u, 1, ld);
      _tile_loadd(5, rows, ld);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + TILE, stride);
  if constexpr (MORE) {
    _tile_stored(2, c + TILE * ldc, stride);
    _tile_stored(3, c + TILE * ldc + TILE, stride);
  }
  memory_barrier();
}

// By tiles; the sums do not restart.
template <>
inline void rows_times_panels<Tiled>(const bf16* a, int64_t lda, int64_t rows, int64_t k, const float* panels,
                                     int64_t depth, int64_t columns, float* c, int64_t ldc, bool add, float* scratch) {
  const int64_t whole = k / TILE_INPUTS * TILE_INPUTS, rest = k - whole;
  auto* last = reinterpret_cast<bf16*>(scratch);  // the last part of the rows, [rows][TILE_INPUTS]
  if (rest > 0)
    for (int64_t r = 0; r < rows; r++) {
      std::memcpy(last + r * TILE_INPUTS, a + r * lda + whole, rest * sizeof(bf16));
      std::memset(last + r * TILE_INPUTS + rest, 0, (TILE_INPUTS - rest) * sizeof(bf16));
    }
  set_row_tiles(rows);
  const auto left = [&](int64_t u, int64_t t, int64_t& ld) {
    const bool is_last = 2 * u >= whole;
    ld = (is_last ? TILE_INPUTS : lda) * sizeof(bf16);
    return is_last ? last + t * TILE * TILE_INPUTS : a + t * TILE * lda + 2 * u;
  };
  for (int64_t j = 0; j < columns; j += PANEL) {
    const TilePanel panel(panels + j * depth, units<Tiled>(k));
    if (rows > TILE) two_tiles_times_panel<true>(left, panel, c + j, ldc, add);
    else two_tiles_times_panel<false>(left, panel, c + j, ldc, add);
  }
}

template <>
inline void tiles_times_panels<Tiled>(const float* tiles, int64_t rows, const float* panels, int64_t columns, int64_t depth,
                                      float* c, int64_t ldc, bool add) {
  const int64_t size = TILE * padded_units<Tiled>(depth);  // of TILE rows
  set_row_tiles(2 * TILE);
  for (int64_t j = 0; j < columns; j += PANEL) {
    const TilePanel panel(panels + j * depth, depth);
    for (int64_t r = 0; r < rows; r += 2 * TILE) {
      const auto left = [&](int64_t u, int64_t t, int64_t& ld) {
        ld = TILE_PAIRS * sizeof(float);
        return tiles + (r / TILE + t) * size + u * TILE;
      };
      const auto multiply = [&](float* to, int64_t ld, bool more) {
        if (rows - r > TILE) two_tiles_times_panel<true>(left, panel, to, ld, more);
        else two_tiles_times_panel<false>(left, panel, to, ld, more);
      };
      float* to = c + r * ldc + j;
      const int64_t now = std::min(2 * TILE, rows - r), wide = std::min(PANEL, columns - j);
      if (wide == PANEL && now % TILE == 0) {
        multiply(to, ldc, add);
        continue;
      }
      alignas(64) float edge[2 * TILE * PANEL];
      if (add)
        for (int64_t i = 0; i < now; i++) std::memcpy(edge + i * PANEL, to + i * ldc, wide * sizeof(float));
      multiply(edge, PANEL, add);
      for (int64_t i = 0; i < now; i++) std::memcpy(to + i * ldc, edge + i * PANEL, wide * sizeof(float));
    }
  }
}
#endif
