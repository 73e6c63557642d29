// Routed experts with INT4 weights by tiles (tiles.h). The weights are the left operand, so that a row of a tile is one
// column of a matrix, whose 32 inputs share a scale: their bfloat16 weights are looked up in a table of 16.
//
// Matrices are strips of TILE columns: [k / GROUP][4][64 bytes] of codes, then [k / GROUP][TILE] scales. Word i of the
// 64 bytes of columns 4 v.. holds the codes of input i, that of column 4 v + j in its bits 4 j.., as code + 8. The right
// operand are blocks of up to TILE rows, each [k / 2][rows] pairs of inputs.
#pragma once

#include <numeric>

#include "packed.h"

// Two strips, as a panel of PackedExperts.
struct Int4Strips {
  static constexpr int64_t BYTES = Int4Panel::BYTES;  // of a group
  const uint8_t* from;

  const uint8_t* strip(int64_t half, int64_t k) const { return from + half * (k / GROUP) * (BYTES / 2); }

  // codes [columns][k] from -8 to 7, scales [columns][k / GROUP]
  static void pack(const int8_t* codes, const bf16* scales, int64_t columns, int64_t k, uint8_t* out) {
    const int64_t groups = k / GROUP;
    std::memset(out, 0, groups * BYTES);
    for (int64_t c = 0; c < std::min(columns, PANEL); c++) {
      uint8_t* strip = out + c / TILE * groups * (BYTES / 2);
      const int64_t column = c % TILE;
      for (int64_t g = 0; g < groups; g++) {
        const bf16 scale = scales[c * groups + g];
        auto* words = reinterpret_cast<uint16_t*>(strip + g * TILE * GROUP / 2) + column / 4 * GROUP;
        for (int64_t i = 0; i < GROUP; i++)  // a scale of zero has no exponent for the table
          words[i] |= ((scale & 0x7f80) == 0 ? 8 : codes[c * k + g * GROUP + i] + 8) << column % 4 * 4;
        reinterpret_cast<bf16*>(strip + groups * TILE * GROUP / 2)[g * TILE + column] = scale;
      }
    }
    for (int64_t c = std::min(columns, PANEL); c < PANEL; c++)  // code zero
      for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < GROUP; i++)
          reinterpret_cast<uint16_t*>(out + c / TILE * groups * (BYTES / 2) + g * TILE * GROUP / 2)[c % TILE / 4 * GROUP + i] |=
              8 << c % 4 * 4;
  }
};

#if defined(__AMX_BF16__)
// bfloat16(code * scale) for the mantissas of all scales from 1 to 2.
struct ScaledCodes {
  alignas(64) bf16 of[128][16];
  ScaledCodes() {
    for (int64_t m = 0; m < 128; m++)
      for (int64_t code = 0; code < 16; code++) of[m][code] = narrow((code - 8) * (1.0f + m / 128.0f));
  }
};
inline const ScaledCodes scaled_codes;

// What the table needs to know about the scales of a group: places of their mantissas in bytes, and their signs and
// exponents twice, as differences to those of 1.
struct Scales {
  alignas(64) uint32_t places[TILE], powers[TILE];

  void read(const uint8_t* scales) {
    constexpr bf16 ONE = 0x3f80;
    const __m512i scale = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)));
    _mm512_store_si512(places, _mm512_slli_epi32(_mm512_and_si512(scale, _mm512_set1_epi32(0x7f)), 5));
    const __m512i power = _mm512_sub_epi32(_mm512_and_si512(scale, _mm512_set1_epi32(0xff80)), _mm512_set1_epi32(ONE));
    _mm512_store_si512(powers, _mm512_or_si512(_mm512_and_si512(power, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(power, 16)));
  }
};

// Makes the tile [TILE columns][GROUP inputs] of one group of a strip.
inline void unpack_tile(const uint8_t* codes, const Scales& scales, uint8_t* out) {
  constexpr __mmask32 NOT_ZERO = ~(1u << 8 | 1u << 24);
  constexpr int64_t AHEAD = 2048;  // bytes; the next strip follows
  const auto* table = reinterpret_cast<const uint8_t*>(scaled_codes.of);
#pragma GCC unroll 4
  for (int64_t v = 0; v < TILE / 4; v++) {
    _mm_prefetch(codes + AHEAD + 64 * v, _MM_HINT_T0);
    __m512i four = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 4
    for (int64_t c = 4 * v; c < 4 * v + 4; c++) {
      const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(table + scales.places[c]));
      const __m512i values = _mm512_broadcast_i64x4(half), power = _mm512_set1_epi32(scales.powers[c]);
      const __m512i scaled = _mm512_mask_add_epi16(values, NOT_ZERO, values, power);
      _mm512_store_si512(out + 64 * c, _mm512_permutexvar_epi16(four, scaled));  // reads five bits: both halves are equal
      four = _mm512_srli_epi16(four, 4);
    }
  }
}

// A strip with inputs of `groups` groups.
struct Strip {
  const uint8_t *codes, *scales;
  Strip(const uint8_t* from, int64_t groups) : codes(from), scales(from + groups * TILE * GROUP / 2) {}
};

// Makes the tiles [count][2] of groups from `start` on of two strips.
inline void unpack_strips(const Strip& first, const Strip& second, int64_t start, int64_t count, uint8_t* tiles) {
  constexpr int64_t AT_ONCE = 4;  // the scales of several groups are read before they are used, to hide their latency
  for (int64_t done = 0; done < count; done += AT_ONCE) {
    const int64_t now = std::min(AT_ONCE, count - done);
    Scales scales[AT_ONCE][2];
    for (int64_t i = 0; i < now; i++) {
      scales[i][0].read(first.scales + (start + done + i) * TILE * 2);
      scales[i][1].read(second.scales + (start + done + i) * TILE * 2);
    }
    memory_barrier();  // the compiler would keep them in registers, and extract each number by several instructions
    for (int64_t i = 0; i < now; i++, tiles += 2 * TILE_BYTES) {
      unpack_tile(first.codes + (start + done + i) * TILE * GROUP / 2, scales[i][0], tiles);
      unpack_tile(second.codes + (start + done + i) * TILE * GROUP / 2, scales[i][1], tiles + TILE_BYTES);
    }
  }
}

// Adds the products of two strips of tiles [groups][2] with one or two blocks of rows.
template <bool MORE>
void tiles_times_blocks(const uint8_t* tiles, int64_t groups, const bf16* x, int64_t rows, const bf16* more, int64_t num_more) {
  for (int64_t g = 0; g < groups; g++, tiles += 2 * TILE_BYTES) {
    _tile_loadd(6, x + g * GROUP * rows, rows * 4);
    _tile_loadd(4, tiles, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, tiles + TILE_BYTES, 64);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (MORE) {
      _tile_loadd(7, more + g * GROUP * num_more, num_more * 4);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Calls use(first row, number of rows, sums of the first strip, of the second) for each block; sums are [TILE][rows].
//
// For at most two blocks of rows a few groups are unpacked at a time, while those before are multiplied; for more, all
// groups are unpacked first.
template <class Use>
void strips_times_blocks(const uint8_t* first, const uint8_t* second, const bf16* x, int64_t rows, int64_t k, Use use) {
  constexpr int64_t FEW = 4;
  alignas(64) uint8_t few[2 * FEW * 2 * TILE_BYTES];
  alignas(64) float sums[4][TILE * TILE];
  const bool is_few = rows <= 2 * TILE;
  const int64_t groups = k / GROUP, together = is_few ? FEW : groups;
  Scratch<uint8_t> many(is_few ? 0 : groups * 2 * TILE_BYTES);
  const Strip left(first, groups), right(second, groups);
  const auto tiles = [&](int64_t start) { return is_few ? few + start / FEW % 2 * FEW * 2 * TILE_BYTES : many.get(); };
  const auto multiply = [&](int64_t start) {
    const int64_t now = std::min(together, groups - start);
    for (int64_t r = 0; r < rows; r += 2 * TILE) {
      const int64_t n = std::min(TILE, rows - r), more = std::min(TILE, rows - r - n);
      set_tiles(100 + n + more, {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
                {n * 4, n * 4, more * 4, more * 4, 64, 64, n * 4, more * 4});
      memory_barrier();
      if (start == 0) {
        _tile_zero(0);
        _tile_zero(1);
        if (more > 0) {
          _tile_zero(2);
          _tile_zero(3);
        }
      }
      const bf16* block = x + r * k + start * GROUP * n;
      const bf16* other = x + (r + n) * k + start * GROUP * more;
      if (more > 0) tiles_times_blocks<true>(tiles(start), now, block, n, other, more);
      else tiles_times_blocks<false>(tiles(start), now, block, n, other, more);
      if (start + now < groups) continue;
      _tile_stored(0, sums[0], n * 4);
      _tile_stored(1, sums[1], n * 4);
      if (more > 0) {
        _tile_stored(2, sums[2], more * 4);
        _tile_stored(3, sums[3], more * 4);
      }
      memory_barrier();
      use(r, n, sums[0], sums[1]);
      if (more > 0) use(r + n, more, sums[2], sums[3]);
    }
  };
  for (int64_t start = 0; start < groups; start += together) {
    unpack_strips(left, right, start, std::min(together, groups - start), tiles(start));
    if (start > 0) multiply(start - together);
  }
  multiply((groups - 1) / together * together);
}

// Writes the rows x[tokens[0..rows)] of k numbers as a block.
inline void pack_block(const bf16* x, const int64_t* tokens, int64_t rows, int64_t k, bf16* out) {
  if (rows == 1) {
    std::memcpy(out, x + tokens[0] * k, k * sizeof(bf16));
    return;
  }
  for (int64_t i = 0; i < k; i += 2 * LANES) {
    floats pairs[LANES];
    for (int64_t r = 0; r < LANES; r++) pairs[r] = bits<floats>(load_pairs(x + tokens[std::min(r, rows - 1)] * k + i));
    transpose(pairs);
    for (int64_t p = 0; p < LANES; p++)
      _mm512_mask_storeu_epi32(out + (i / 2 + p) * 2 * rows, (1u << rows) - 1, bits<__m512i>(pairs[p]));
  }
}

// hidden = silu(gate) * up for sums [TILE columns][rows], as [TILE / 2][rows] pairs.
inline void swiglu_block(const float* gate, const float* up, int64_t rows, bf16* hidden) {
  bf16 gates[TILE * TILE], ups[TILE * TILE], both[TILE * TILE];
  narrow_row(gate, gates, TILE * rows);
  narrow_row(up, ups, TILE * rows);
  swiglu_row(gates, ups, TILE * rows, both);
  for (int64_t c = 0; c < TILE; c += 2)
    for (int64_t r = 0; r < rows; r++) {
      hidden[(c * rows / 2 + r) * 2] = both[c * rows + r];
      hidden[(c * rows / 2 + r) * 2 + 1] = both[(c + 1) * rows + r];
    }
}

// y[rows][columns], rounded, from sums [TILE columns][rows]; columns <= TILE.
inline void narrow_block(const float* sums, int64_t rows, int64_t columns, bf16* y, int64_t ldy) {
  if (rows == 1) return narrow_row(sums, y, columns);
  floats block[TILE];
  for (int64_t c = 0; c < TILE; c++) block[c] = load(sums + c * rows);
  transpose(block);
  for (int64_t r = 0; r < rows; r++)
    _mm256_mask_storeu_epi16(y + r * ldy, (1u << columns) - 1, bits<__m256i>(narrow(block[r])));
}

// y[rows][D] of the rows x[tokens[..]] [padded], sorted by expert; those of expert e end at ends[e]. Called by all threads
// of a team, which do not wait for each other at the end. sorted: [rows][padded], inner: [rows][F padded].
inline void team_tiled_experts(const bf16* x, const int64_t* tokens, const int64_t* ends, const PackedExperts<Int4Strips>& experts,
                               bf16* sorted, bf16* inner, bf16* y) {
  const int64_t padded = experts.padded, hidden = experts.hidden, ld = experts.inner();
  const int64_t wide = up_to(experts.width, PANEL) / TILE, tall = up_to(hidden, PANEL) / PANEL;
  Scratch<int64_t> chosen(experts.num);
  int64_t num_chosen = 0;
  const auto first_row = [&](int64_t e) { return e == 0 ? 0 : ends[e - 1]; };
  for (int64_t e = 0; e < experts.num; e++)
    if (ends[e] > first_row(e)) chosen[num_chosen++] = e;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < num_chosen; i++)
    for (int64_t r = first_row(chosen[i]); r < ends[chosen[i]]; r += TILE)
      pack_block(x, tokens + r, std::min(TILE, ends[chosen[i]] - r), padded, sorted + r * padded);
#pragma omp for schedule(static)
  for (int64_t task = 0; task < num_chosen * wide; task++) {
    const int64_t e = chosen[task / wide], strip = task % wide, first = first_row(e);
    strips_times_blocks(experts.gate(e, strip / 2).strip(strip % 2, padded), experts.up(e, strip / 2).strip(strip % 2, padded),
                        sorted + first * padded, ends[e] - first, padded,
                        [&](int64_t r, int64_t n, const float* gate, const float* up) {
                          swiglu_block(gate, up, n, inner + (first + r) * ld + strip * TILE * n);
                        });
  }
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < num_chosen * tall; task++) {
    const int64_t e = chosen[task / tall], j = task % tall * PANEL, first = first_row(e);
    const Int4Strips panel = experts.out(e, j / PANEL);
    strips_times_blocks(panel.strip(0, ld), panel.strip(1, ld), inner + first * ld, ends[e] - first, ld,
                        [&](int64_t r, int64_t n, const float* left, const float* right) {
                          bf16* to = y + (first + r) * hidden + j;
                          narrow_block(left, n, std::min(TILE, hidden - j), to, hidden);
                          if (j + TILE < hidden) narrow_block(right, n, std::min(TILE, hidden - j - TILE), to + TILE, hidden);
                        });
  }
}

// The same for sorted rows x, with its own team.
inline void tiled_experts(const bf16* x, const int64_t* ends, const PackedExperts<Int4Strips>& experts, bf16* y) {
  const int64_t rows = ends[experts.num - 1];
  Scratch<int64_t> tokens(rows);
  std::iota(tokens.get(), tokens.get() + rows, int64_t(0));
  Scratch<bf16> sorted(rows * experts.padded), inner(rows * experts.inner());
#pragma omp parallel
  {
    TileWork work;
    team_tiled_experts(x, tokens.get(), ends, experts, sorted.get(), inner.get(), y);
  }
}
#endif
