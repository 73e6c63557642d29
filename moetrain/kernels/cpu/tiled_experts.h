// Routed experts with INT4 weights by tiles (tiles.h). The weights are the left operand, so that a row of a tile is one
// column of a matrix, whose 32 inputs share a scale: their bfloat16 weights are looked up in a table of 16.
//
// A panel of PANEL columns has two halves of TILE columns, and lies in memory as it is read: [k / GROUP] of codes [2 halves]
// [TILE / 4][GROUP] words, then scales [PANEL]. Word i of columns 4 v.. holds the codes of input i, that of column 4 v + j
// in its bits 4 j.., as code + 8. The right operand are blocks of up to TILE rows, each [k / 2][rows] pairs of inputs.
#pragma once

#include <numeric>

#include "packed.h"

// A panel of PackedExperts.
struct Int4Tiles {
  static constexpr int64_t HALF_BYTES = TILE * GROUP / 2, CODE_BYTES = 2 * HALF_BYTES, BYTES = Int4Panel::BYTES;
  const uint8_t* from;

  // codes [columns][k] from -8 to 7, scales [columns][k / GROUP]
  static void pack(const int8_t* codes, const bf16* scales, int64_t columns, int64_t k, uint8_t* out) {
    const int64_t groups = k / GROUP;
    for (int64_t g = 0; g < groups; g++, out += BYTES) {
      std::memset(out, 0, BYTES);
      for (int64_t c = 0; c < PANEL; c++) {
        const bf16 scale = c < columns ? scales[c * groups + g] : bf16(0);
        const bool is_zero = (scale & 0x7f80) == 0;  // has no exponent for the table
        auto* words = reinterpret_cast<uint16_t*>(out + c / TILE * HALF_BYTES) + c % TILE / 4 * GROUP;
        for (int64_t i = 0; i < GROUP; i++) words[i] |= (is_zero ? 8 : codes[c * k + g * GROUP + i] + 8) << c % 4 * 4;
        reinterpret_cast<bf16*>(out + CODE_BYTES)[c] = scale;
      }
    }
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

constexpr int64_t AHEAD = 6 * Int4Tiles::BYTES;   // bytes from what is read to what is fetched from memory
constexpr int64_t FEW_TILES = 4;                  // that are unpacked before they are multiplied

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

using Sums = float[TILE * TILE];  // of TILE columns and up to TILE rows

// Half a panel.
struct Strip {
  const uint8_t *codes, *scales;  // of the first group
  Strip(Int4Tiles panel, int64_t half)
      : codes(panel.from + half * Int4Tiles::HALF_BYTES), scales(panel.from + Int4Tiles::CODE_BYTES + half * TILE * 2) {}
};

// Makes the tile [TILE columns][GROUP inputs] of one group.
inline void unpack_tile(const uint8_t* codes, const Scales& scales, uint8_t* out) {
  constexpr __mmask32 NOT_ZERO = ~(1u << 8 | 1u << 24);
  const auto* table = reinterpret_cast<const uint8_t*>(scaled_codes.of);
#pragma GCC unroll 4
  for (int64_t v = 0; v < TILE / 4; v++) {
    _mm_prefetch(codes + AHEAD + 64 * v, _MM_HINT_T0);
    __m512i four = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 4
    for (int64_t c = 4 * v; c < 4 * v + 4; c++) {
      const __m256i half = _mm256_load_si256(reinterpret_cast<const __m256i*>(table + scales.places[c]));
      const __m512i values = _mm512_broadcast_i64x4(half), power = _mm512_set1_epi32(scales.powers[c]);
      const __m512i scaled = _mm512_maskz_add_epi16(NOT_ZERO, values, power);
      _mm512_store_si512(out + 64 * c, _mm512_permutexvar_epi16(four, scaled));  // reads five bits: both halves are equal
      four = _mm512_srli_epi16(four, 4);
    }
  }
}

// Makes the tiles [count][S] of groups from `start` on.
template <int64_t S>
inline void unpack_strips(const Strip (&strips)[S], int64_t start, int64_t count, uint8_t* tiles) {
  constexpr int64_t AT_ONCE = FEW_TILES / S;  // the scales of several groups are read before use, to hide their latency
  for (int64_t done = start; done < start + count; done += AT_ONCE) {
    const int64_t now = std::min(AT_ONCE, start + count - done);
    Scales scales[AT_ONCE][S];
    for (int64_t i = 0; i < now; i++)
      for (int64_t s = 0; s < S; s++) {
        const uint8_t* from = strips[s].scales + (done + i) * Int4Tiles::BYTES;
        _mm_prefetch(from + AHEAD, _MM_HINT_T0);
        scales[i][s].read(from);
      }
    memory_barrier();  // the compiler would keep them in registers, and extract each number by several instructions
    for (int64_t i = 0; i < now; i++)
      for (int64_t s = 0; s < S; s++, tiles += TILE_BYTES)
        unpack_tile(strips[s].codes + (done + i) * Int4Tiles::BYTES, scales[i][s], tiles);
  }
}

// Adds the products of tiles [groups][S] with 4 / S blocks of rows, of which the second may be empty, to the tile
// registers 0 to 3: [blocks][S].
template <int64_t S, bool MORE>
void tiles_times_blocks(const uint8_t* tiles, int64_t groups, const bf16* x, int64_t rows, const bf16* more, int64_t num_more) {
  static_assert(S == 2 || (S == 4 && !MORE));
  for (int64_t g = 0; g < groups; g++, tiles += S * TILE_BYTES) {
    _tile_loadd(6, x + g * GROUP * rows, rows * 4);
    _tile_loadd(4, tiles, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, tiles + TILE_BYTES, 64);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (S == 4) {
      _tile_loadd(4, tiles + 2 * TILE_BYTES, 64);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, tiles + 3 * TILE_BYTES, 64);
      _tile_dpbf16ps(3, 5, 6);
    }
    if constexpr (MORE) {
      _tile_loadd(7, more + g * GROUP * num_more, num_more * 4);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
}

// Calls use(first row, number of rows, sums[S]) for each block of rows; sums are [TILE columns][rows].
//
// For at most 4 / S blocks a few groups are unpacked at a time, while those before are multiplied; for more, all groups are
// unpacked first.
template <int64_t S, class Use>
void strips_times_blocks(const Strip (&strips)[S], const bf16* x, int64_t rows, int64_t k, Use use) {
  constexpr int64_t FEW = FEW_TILES / S, TOGETHER = 4 / S * TILE;
  alignas(64) uint8_t few[2 * FEW_TILES * TILE_BYTES];
  alignas(64) Sums sums[4];
  const bool is_few = rows <= TOGETHER;
  const int64_t groups = k / GROUP, at_once = is_few ? FEW : groups;
  Scratch<uint8_t> many(is_few ? 0 : groups * S * TILE_BYTES);
  const auto tiles = [&](int64_t start) { return is_few ? few + start / FEW % 2 * FEW_TILES * TILE_BYTES : many.get(); };
  const auto multiply = [&](int64_t start) {
    const int64_t now = std::min(at_once, groups - start);
    for (int64_t r = 0; r < rows; r += TOGETHER) {
      const int64_t n = std::min(TILE, rows - r), more = std::min(TOGETHER - TILE, rows - r - n), last = S == 4 ? n : more;
      set_tiles(100 * S + n + more, {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
                {n * 4, n * 4, last * 4, last * 4, 64, 64, n * 4, more * 4});
      memory_barrier();
      if (start == 0) {
        _tile_zero(0);
        _tile_zero(1);
        if (last > 0) {
          _tile_zero(2);
          _tile_zero(3);
        }
      }
      const bf16* block = x + r * k + start * GROUP * n;
      const bf16* other = x + (r + n) * k + start * GROUP * more;
      if constexpr (S == 2) {
        if (more > 0) tiles_times_blocks<S, true>(tiles(start), now, block, n, other, more);
        else tiles_times_blocks<S, false>(tiles(start), now, block, n, other, more);
      } else {
        tiles_times_blocks<S, false>(tiles(start), now, block, n, other, more);
      }
      if (start + now < groups) continue;
      _tile_stored(0, sums[0], n * 4);
      _tile_stored(1, sums[1], n * 4);
      if (last > 0) {
        _tile_stored(2, sums[2], last * 4);
        _tile_stored(3, sums[3], last * 4);
      }
      memory_barrier();
      use(r, n, sums);
      if (more > 0) use(r + n, more, sums + S);
    }
  };
  for (int64_t start = 0; start < groups; start += at_once) {
    unpack_strips(strips, start, std::min(at_once, groups - start), tiles(start));
    if (start > 0) multiply(start - at_once);
  }
  multiply((groups - 1) / at_once * at_once);
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
    for (int64_t p = 0; p < LANES; p++) {
      bf16* to = out + (i / 2 + p) * 2 * rows;
      check_access(to, rows * 2 * sizeof(bf16));
      _mm512_mask_storeu_epi32(to, (1u << rows) - 1, bits<__m512i>(pairs[p]));
    }
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
  for (int64_t r = 0; r < rows; r++) {
    check_access(y + r * ldy, columns * sizeof(bf16));
    _mm256_mask_storeu_epi16(y + r * ldy, (1u << columns) - 1, bits<__m256i>(narrow(block[r])));
  }
}

// y[rows][D] of the rows x[tokens[..]] [padded], sorted by expert; those of expert e end at ends[e]. Called by all threads
// of a team, which do not wait for each other at the end. sorted: [rows][padded], inner: [rows][F padded].
inline void team_tiled_experts(const bf16* x, const int64_t* tokens, const int64_t* ends, const PackedExperts<Int4Tiles>& experts,
                               bf16* sorted, bf16* inner, bf16* y) {
  const int64_t padded = experts.padded, hidden = experts.hidden, ld = experts.inner();
  const int64_t wide = up_to(experts.width, PANEL) / PANEL, tall = up_to(hidden, PANEL) / PANEL, pairs = (tall + 1) / 2;
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
    const int64_t e = chosen[task / wide], j = task % wide, first = first_row(e), rows = ends[e] - first;
    const Int4Tiles gate = experts.gate(e, j), up = experts.up(e, j);
    const auto write = [&](int64_t half, int64_t r, int64_t n, const float* gates, const float* ups) {
      swiglu_block(gates, ups, n, inner + (first + r) * ld + (2 * j + half) * TILE * n);
    };
    if (rows <= TILE) {
      const Strip strips[] = {{gate, 0}, {gate, 1}, {up, 0}, {up, 1}};
      strips_times_blocks(strips, sorted + first * padded, rows, padded, [&](int64_t r, int64_t n, const Sums* sums) {
        write(0, r, n, sums[0], sums[2]);
        write(1, r, n, sums[1], sums[3]);
      });
      continue;
    }
    for (int64_t half = 0; half < 2; half++) {
      const Strip strips[] = {{gate, half}, {up, half}};
      strips_times_blocks(strips, sorted + first * padded, rows, padded, [&](int64_t r, int64_t n, const Sums* sums) {
        write(half, r, n, sums[0], sums[1]);
      });
    }
  }
#pragma omp for schedule(static) nowait
  for (int64_t task = 0; task < num_chosen * pairs; task++) {
    const int64_t e = chosen[task / pairs], p = task % pairs, first = first_row(e), rows = ends[e] - first;
    const auto write = [&](int64_t j, int64_t r, int64_t n, const float* sums) {
      if (j < hidden) narrow_block(sums, n, std::min(TILE, hidden - j), y + (first + r) * hidden + j, hidden);
    };
    if (rows <= TILE && p + pairs < tall) {
      const Int4Tiles left = experts.out(e, p), right = experts.out(e, p + pairs);
      const Strip strips[] = {{left, 0}, {left, 1}, {right, 0}, {right, 1}};
      strips_times_blocks(strips, inner + first * ld, rows, ld, [&](int64_t r, int64_t n, const Sums* sums) {
        for (int64_t s = 0; s < 4; s++) write((p + s / 2 * pairs) * PANEL + s % 2 * TILE, r, n, sums[s]);
      });
      continue;
    }
    for (int64_t panel = p; panel < tall; panel += pairs) {
      const Strip strips[] = {{experts.out(e, panel), 0}, {experts.out(e, panel), 1}};
      strips_times_blocks(strips, inner + first * ld, rows, ld, [&](int64_t r, int64_t n, const Sums* sums) {
        for (int64_t s = 0; s < 2; s++) write(panel * PANEL + s * TILE, r, n, sums[s]);
      });
    }
  }
}

// The same for sorted rows x, with its own team.
inline void tiled_experts(const bf16* x, const int64_t* ends, const PackedExperts<Int4Tiles>& experts, bf16* y) {
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
