// Routed experts with INT4 weights by tiles (tiles.h). The weights are the left operand, so that a row of a tile is one
// column of a matrix, whose 32 inputs share a scale: their bfloat16 weights are looked up among the 16 of that scale.
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
      for (int64_t c = 0; c < std::min(columns, PANEL); c++) {
        auto* words = reinterpret_cast<uint16_t*>(out + c / TILE * HALF_BYTES) + c % TILE / 4 * GROUP;
        for (int64_t i = 0; i < GROUP; i++) words[i] |= (codes[c * k + g * GROUP + i] + 8) << c % 4 * 4;
        reinterpret_cast<bf16*>(out + CODE_BYTES)[c] = scales[c * groups + g];
      }
    }
  }
};

#if defined(__AMX_BF16__)
// bfloat16(code * scale) of every code and scale, 2 MB. The scales of a model have few exponents, so only 4 KB per exponent
// and sign are read, and stay in the cache.
struct ScaledCodes {
  alignas(64) bf16 of[1 << 16][16];
  ScaledCodes() {
    for (int64_t scale = 0; scale < 1 << 16; scale++)
      for (int64_t code = 0; code < 16; code++) of[scale][code] = narrow((code - 8) * widen(bf16(scale)));
  }
};
inline const uint8_t* scaled_codes() {
  static const auto* made = new ScaledCodes;
  return reinterpret_cast<const uint8_t*>(made->of);
}

constexpr int64_t AHEAD = 6 * Int4Tiles::BYTES;  // bytes from what is read to what is fetched from memory

// For each scale of a group, the offset of its 16 products in the table.
struct Offsets {
  alignas(64) int64_t bytes[TILE];  // 64 bits wide, because each is added to a pointer

  void read(const uint8_t* scales) {
    _mm_prefetch(scales + AHEAD, _MM_HINT_T0);
    for (int64_t h = 0; h < TILE; h += 8) {
      const __m512i eight = _mm512_cvtepu16_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 2 * h)));
      _mm512_store_si512(bytes + h, _mm512_slli_epi64(eight, 5));
    }
  }
};

using Sums = float[TILE * TILE];  // of TILE columns and up to TILE rows

// Half a panel.
struct Strip {
  const uint8_t *codes, *scales;  // of the first group
  Strip(Int4Tiles panel, int64_t half)
      : codes(panel.from + half * Int4Tiles::HALF_BYTES), scales(panel.from + Int4Tiles::CODE_BYTES + half * TILE * 2) {}
};

// Makes the tile [TILE columns][GROUP inputs] of one group. Permutes and shifts limit the speed: two execution units run
// them. A shift runs on one of them only, the high half of a product by a power of two on both, so it replaces the shift.
inline void unpack_tile(const uint8_t* codes, const Offsets& offsets, const uint8_t* table, uint8_t* out) {
#pragma GCC unroll 4
  for (int64_t v = 0; v < TILE / 4; v++) {
    _mm_prefetch(codes + AHEAD + 64 * v, _MM_HINT_T0);
    const __m512i four = _mm512_loadu_si512(codes + 64 * v);
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; j++) {
      const int64_t c = 4 * v + j;
      const __m256i scaled = _mm256_load_si256(reinterpret_cast<const __m256i*>(table + offsets.bytes[c]));
      const __m512i indices = j == 0 ? four : _mm512_mulhi_epu16(four, _mm512_set1_epi16(1 << (16 - 4 * j)));
      // Five bits of an index are read. The fifth belongs to the next code, so the 16 numbers are repeated.
      _mm512_store_si512(out + 64 * c, _mm512_permutexvar_epi16(indices, _mm512_broadcast_i64x4(scaled)));
    }
  }
}

// Calls use(group, offsets[S]) for each of at least one group. The offsets of the next group are computed before, to hide
// the latency.
template <int64_t S, class Use>
inline void for_groups(const Strip (&strips)[S], int64_t groups, Use use) {
  Offsets offsets[2][S];
  const auto read = [&](int64_t g) {
    for (int64_t s = 0; s < S; s++) offsets[g % 2][s].read(strips[s].scales + g * Int4Tiles::BYTES);
  };
  read(0);
  for (int64_t g = 0; g < groups; g++) {
    if (g + 1 < groups) read(g + 1);
    memory_barrier();  // the compiler would keep them in registers, and extract each number by several instructions
    use(g, offsets[g % 2]);
  }
}

// Calls use(i) for each i below N, as a constant.
template <class Use, int64_t... I>
inline void each(std::integer_sequence<int64_t, I...>, Use use) {
  (use(std::integral_constant<int64_t, I>()), ...);
}
template <int64_t N, class Use>
inline void each(Use use) {
  each(std::make_integer_sequence<int64_t, N>(), use);
}

// A block of rows, [k / 2][rows] pairs of inputs.
struct Block {
  const bf16* from;
  int64_t rows;
};

// The tile registers: sums in 0 to 3, [blocks][S]; the tile of strip s in 4 + s % 2; one block, or two if MORE, in 6 and 7.
template <bool MORE>
inline void load_blocks(Block block, Block more, int64_t g) {
  load_tile<6>(block.from + g * GROUP * block.rows, block.rows * 4);
  if constexpr (MORE) load_tile<7>(more.from + g * GROUP * more.rows, more.rows * 4);
}
template <int64_t S, bool MORE, int64_t s>
inline void add_products() {
  multiply_tiles<s, 4 + s % 2, 6>();
  if constexpr (MORE) multiply_tiles<S + s, 4 + s % 2, 7>();
}
template <int64_t S, bool MORE>
inline void add_group(const uint8_t* tiles, Block block, Block more, int64_t g) {
  load_blocks<MORE>(block, more, g);
  each<S>([&](auto s) {
    load_tile<4 + s % 2>(tiles + s * TILE_BYTES, 64);
    add_products<S, MORE, s>();
  });
}

// The products for at most 4 / S blocks: each unpacked tile is used once, so it is not kept. A pipeline of three stages:
// step (g, s) multiplies the tile that the previous step loaded, loads tile s of group g - 1, and unpacks tile s of group g.
template <int64_t S, bool MORE>
void strips_times_few(const Strip (&strips)[S], int64_t groups, Block block, Block more) {
  alignas(64) uint8_t tiles[2][S * TILE_BYTES];
  const uint8_t* table = scaled_codes();
  for_groups(strips, groups, [&](int64_t g, const Offsets* offsets) {
    each<S>([&](auto s) {
      const bool is_loaded = s == 0 ? g > 1 : g > 0;
      if (is_loaded) add_products<S, MORE, (s + S - 1) % S>();
      if (g > 0) {
        if constexpr (s == 0) load_blocks<MORE>(block, more, g - 1);
        load_tile<4 + s % 2>(tiles[(g - 1) % 2] + s * TILE_BYTES, 64);
      }
      unpack_tile(strips[s].codes + g * Int4Tiles::BYTES, offsets[s], table, tiles[g % 2] + s * TILE_BYTES);
    });
  });
  if (groups > 1) add_products<S, MORE, S - 1>();
  add_group<S, MORE>(tiles[(groups - 1) % 2], block, more, groups - 1);
}

// Makes the tiles [groups][S].
template <int64_t S>
void unpack_strips(const Strip (&strips)[S], int64_t groups, uint8_t* tiles) {
  const uint8_t* table = scaled_codes();
  for_groups(strips, groups, [&](int64_t g, const Offsets* offsets) {
    for (int64_t s = 0; s < S; s++, tiles += TILE_BYTES)
      unpack_tile(strips[s].codes + g * Int4Tiles::BYTES, offsets[s], table, tiles);
  });
}

// Calls use(first row, number of rows, sums[S]) for each block of rows; sums are [TILE columns][rows]. For more than 4 / S
// blocks, all groups are unpacked first.
template <int64_t S, class Use>
void strips_times_blocks(const Strip (&strips)[S], const bf16* x, int64_t rows, int64_t k, Use use) {
  constexpr int64_t TOGETHER = 4 / S * TILE;
  alignas(64) Sums sums[4];
  const bool is_few = rows <= TOGETHER;
  const int64_t groups = k / GROUP;
  Scratch<uint8_t> tiles(is_few ? 0 : groups * S * TILE_BYTES);
  if (!is_few) unpack_strips(strips, groups, tiles.get());
  for (int64_t r = 0; r < rows; r += TOGETHER) {
    const int64_t n = std::min(TILE, rows - r), num_more = std::min(TOGETHER - TILE, rows - r - n), last = S == 4 ? n : num_more;
    set_tiles(100 * S + n + num_more, {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE},
              {n * 4, n * 4, last * 4, last * 4, 64, 64, n * 4, num_more * 4});
    _tile_zero(0);
    _tile_zero(1);
    if (last > 0) {
      _tile_zero(2);
      _tile_zero(3);
    }
    const Block block{x + r * k, n}, more{x + (r + n) * k, num_more};
    const auto add = [&](auto has_more) {
      if (is_few) return strips_times_few<S, has_more>(strips, groups, block, more);
      for (int64_t g = 0; g < groups; g++) add_group<S, has_more>(tiles.get() + g * S * TILE_BYTES, block, more, g);
    };
    if (num_more == 0) add(std::false_type());
    if constexpr (S == 2)
      if (num_more > 0) add(std::true_type());
    _tile_stored(0, sums[0], n * 4);
    _tile_stored(1, sums[1], n * 4);
    if (last > 0) {
      _tile_stored(2, sums[2], last * 4);
      _tile_stored(3, sums[3], last * 4);
    }
    memory_barrier();
    use(r, n, sums);
    if (num_more > 0) use(r + n, num_more, sums + S);
  }
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
