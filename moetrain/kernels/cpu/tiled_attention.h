// The attention of decode_attention.h by the tile registers of AMX.
//
// A tile of 16 cached positions, as it lies in its page, is multiplied with 16 queries, so keys are not packed. The softmax
// of a span of SPAN positions runs over vectors of queries. The spans of a query are added in their order, so its result
// depends on its own positions only: not on the other queries, on the threads, or on how a prompt was cut into calls.
#pragma once

#include "decode_attention.h"
#include "tiles.h"

#if defined(__AMX_BF16__)
constexpr int64_t SPAN = 512;                // positions of a partial result; whole pages
constexpr int64_t STRIP = 2 * TILE;          // latents whose values are packed at a time
constexpr float NO_LOGIT = -std::numeric_limits<float>::infinity();

// A partial or whole result, in `size()` floats: mixed latents [queries][width], whose columns are in the
// order of `interleave`, then the largest logit and the sum of the shares of each query.
struct TileResult {
  float* memory;
  int64_t padded, width;

  float* mixed(int64_t query) const { return memory + query * width; }
  float* largest() const { return memory + padded * width; }
  float* sums() const { return largest() + padded; }
};

// Queries of rows of one sequence at `positions`, whose pages are in `table`. A query sees its own position, too.
struct TileQueries {
  DecodeAttention shape;
  const bf16* queries;  // [rows][H][C + R], C + R even
  const int32_t *positions, *table;
  int64_t rows;

  int64_t count() const { return rows * shape.heads; }
  int64_t blocks() const { return (count() + TILE - 1) / TILE; }
  int64_t padded() const { return blocks() * TILE; }
  int64_t width() const { return up_to(shape.latent, STRIP); }
  int64_t longest() const { return *std::max_element(positions, positions + rows) + 1; }
  int64_t spans() const { return (longest() + SPAN - 1) / SPAN; }
  int64_t size() const { return padded() * (width() + 2); }
  TileResult result(float* memory) const { return {memory, padded(), width()}; }
};

// The first `count` numbers of up to 32, then zeros.
inline __m512i load_first(const bf16* from, int64_t count) {
  check_access(from, std::min<int64_t>(count, 32) * sizeof(bf16));
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~__mmask32(0) : (__mmask32(1) << count) - 1, from);
}

// Writes `count` numbers, up to STRIP, of two rows as [2][TILE] pairs: columns 8 i .. 8 i + 3 come first, 8 i + 4 ..
// 8 i + 7 second.
inline void interleave(const bf16* first, const bf16* second, int64_t count, uint8_t* left, uint8_t* right) {
  const __m512i a = load_first(first, count), b = load_first(second, count);
  _mm512_store_si512(left, _mm512_unpacklo_epi16(a, b));
  _mm512_store_si512(right, _mm512_unpackhi_epi16(a, b));
}

// Packs queries as the right operand: for each block [(C + R) / 2][TILE] pairs. Queries beyond the last are zero.
inline void pack_queries(const TileQueries& in, bf16* out) {
  const int64_t width = in.shape.width();
  for (int64_t q = 0; q < in.padded(); q += TILE, out += TILE * width)
    for (int64_t i = 0; i < width; i += TILE_INPUTS) {
      const int64_t now = std::min(TILE_INPUTS, width - i);
      floats pairs_of[TILE];
#pragma GCC unroll 16
      for (int64_t r = 0; r < TILE; r++)
        pairs_of[r] = q + r < in.count() ? bits<floats>(load_first(in.queries + (q + r) * width + i, now)) : every(0.0f);
      transpose(pairs_of);
      for (int64_t p = 0; p < now / 2; p++) std::memcpy(out + (i + 2 * p) * TILE, &pairs_of[p], sizeof(floats));
    }
}

// scores[PAGE][TILE] of the positions of a page and one block of queries.
inline void scores_of_page(const bf16* page, const bf16* queries, int64_t width, float* scores) {
  const int64_t stride = width * 2, whole = width / TILE_INPUTS * TILE_INPUTS;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < whole; i += TILE_INPUTS) {
    _tile_loadd(5, queries + i * TILE, 2 * TILE * sizeof(bf16));
    _tile_loadd(4, page + i, stride);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(4, page + TILE * width + i, stride);
    _tile_dpbf16ps(1, 4, 5);
    _tile_loadd(4, page + 2 * TILE * width + i, stride);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(4, page + 3 * TILE * width + i, stride);
    _tile_dpbf16ps(3, 4, 5);
  }
  if (whole < width) {
    _tile_loadd(7, queries + whole * TILE, 2 * TILE * sizeof(bf16));
    _tile_loadd(6, page + whole, stride);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(6, page + TILE * width + whole, stride);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(6, page + 2 * TILE * width + whole, stride);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, page + 3 * TILE * width + whole, stride);
    _tile_dpbf16ps(3, 6, 7);
  }
  _tile_stored(0, scores, TILE * sizeof(float));
  _tile_stored(1, scores + TILE * TILE, TILE * sizeof(float));
  _tile_stored(2, scores + 2 * TILE * TILE, TILE * sizeof(float));
  _tile_stored(3, scores + 3 * TILE * TILE, TILE * sizeof(float));
}

// Turns scores [count][TILE] of the positions from `start` on into shares, as a left operand [count / 32][TILE][32].
inline void shares_of_block(float* scores, int64_t count, int64_t start, ints lengths, float scale, bf16* shares,
                            float* largest, float* sums) {
  floats most = every(NO_LOGIT), total = every(0.0f);
  for (int64_t s = 0; s < count; s++) {
    const floats logits = lengths > int32_t(start + s) ? load(scores + s * TILE) * scale : every(NO_LOGIT);
    store(scores + s * TILE, logits);
    most = logits > most ? logits : most;
  }
  const floats from = most == NO_LOGIT ? every(0.0f) : most;
  for (int64_t s = 0; s < count; s += TILE_INPUTS) {
    floats pairs_of[TILE];
#pragma GCC unroll 16
    for (int64_t p = 0; p < TILE; p++) {
      const floats first = load(scores + (s + 2 * p) * TILE) - from, second = load(scores + (s + 2 * p + 1) * TILE) - from;
      const floats of_first = first < -87.0f ? every(0.0f) : exponential(first);
      const floats of_second = second < -87.0f ? every(0.0f) : exponential(second);
      total = (total + of_first) + of_second;
      pairs_of[p] = pairs(narrow(of_first), narrow(of_second));
    }
    transpose(pairs_of);
#pragma GCC unroll 16
    for (int64_t q = 0; q < TILE; q++) std::memcpy(shares + s * TILE + q * TILE_INPUTS, &pairs_of[q], sizeof(floats));
  }
  store(largest, most);
  store(sums, total);
}

// Computes the partial result of one span.
inline void attend_span(const TileQueries& in, const bf16* queries, int64_t span, TileResult result) {
  const DecodeAttention& shape = in.shape;
  const int64_t width = shape.width(), rest = width % TILE_INPUTS, blocks = in.blocks(), start = span * SPAN;
  const int64_t count = up_to(std::min(SPAN, in.longest() - start), PAGE);
  Scratch<float> scores(count * TILE);
  Scratch<bf16> shares(blocks * count * TILE);
  Scratch<uint8_t> values(count / TILE_INPUTS * 2 * TILE_BYTES);
  set_tiles(1000 + rest, {TILE, TILE, TILE, TILE, TILE, TILE, rest > 0 ? TILE : 0, rest / 2},
            {64, 64, 64, 64, 64, 64, 2 * rest, 64});
  for (int64_t b = 0; b < blocks; b++) {
    memory_barrier();
    for (int64_t s = 0; s < count; s += PAGE) {
      scores_of_page(shape.pages + in.table[(start + s) / PAGE] * PAGE * width, queries + b * TILE * width, width,
                     scores.get() + s * TILE);
    }
    memory_barrier();
    ints lengths;
    for (int64_t q = 0; q < TILE; q++) lengths[q] = in.positions[std::min(b * TILE + q, in.count() - 1) / shape.heads] + 1;
    shares_of_block(scores.get(), count, start, lengths, shape.scale, shares.get() + b * count * TILE,
                    result.largest() + b * TILE, result.sums() + b * TILE);
  }
  set_tiles(2000, {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE}, {64, 64, 64, 64, 64, 64, 64, 64});
  const int64_t stride = result.width * sizeof(float);
  for (int64_t c = 0; c < shape.latent; c += STRIP) {
    const int64_t columns = std::min(STRIP, shape.latent - c);
    for (int64_t s = 0; s < count; s += 2) {
      const bf16* row = shape.pages + (in.table[(start + s) / PAGE] * PAGE + (start + s) % PAGE) * width + c;
      uint8_t* to = values.get() + s / TILE_INPUTS * 2 * TILE_BYTES + s % TILE_INPUTS / 2 * 64;
      interleave(row, row + width, columns, to, to + TILE_BYTES);
    }
    memory_barrier();
    for (int64_t b = 0; b < blocks; b++) {
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t s = 0; s < count; s += TILE_INPUTS) {
        _tile_loadd(4, shares.get() + (b * count + s) * TILE, 64);
        _tile_loadd(5, values.get() + s / TILE_INPUTS * 2 * TILE_BYTES, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, values.get() + (s / TILE_INPUTS * 2 + 1) * TILE_BYTES, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      _tile_stored(0, result.mixed(b * TILE) + c, stride);
      _tile_stored(1, result.mixed(b * TILE) + c + TILE, stride);
    }
    memory_barrier();
  }
}

// Adds the partial result of a later span to that of the earlier ones, for one block of queries.
inline void add_span(TileResult whole, TileResult part, int64_t block) {
  const int64_t first = block * TILE;
  const floats before = load(whole.largest() + first), added = load(part.largest() + first);
  const floats most = added > before ? added : before;
  alignas(64) float kept[TILE], taken[TILE];
  store(kept, exponential(before - most));
  store(taken, exponential(added - most));
  store(whole.largest() + first, most);
  store(whole.sums() + first, load(whole.sums() + first) * load(kept) + load(part.sums() + first) * load(taken));
  for (int64_t q = 0; q < TILE; q++) {
    float* to = whole.mixed(first + q);
    const float* from = part.mixed(first + q);
    for (int64_t c = 0; c < whole.width; c += LANES) store(to + c, load(to + c) * kept[q] + load(from + c) * taken[q]);
  }
}

// Writes the mixed latents [ld_out] of one query in bfloat16.
inline void write_mixed(TileResult whole, int64_t query, int64_t latent, bf16* out) {
  constexpr float SMALLEST = std::numeric_limits<float>::min();
  const float* from = whole.mixed(query);
  const float total = whole.sums()[query];
  alignas(64) bf16 strip[STRIP];
  for (int64_t c = 0; c < latent; c += STRIP) {
    halves parts[2];
    for (int64_t p = 0; p < 2; p++) {
      const floats x = load(from + c + p * TILE);
      // Tiles turn subnormal sums into zeros when more is added: so does this, whether more was added or not.
      parts[p] = narrow((x < SMALLEST && x > -SMALLEST ? every(0.0f) : x) / total);
    }
    for (int64_t i = 0; i < STRIP; i += 4) std::memcpy(strip + i, reinterpret_cast<bf16*>(&parts[i / 4 % 2]) + i / 8 * 4, 4 * sizeof(bf16));
    std::memcpy(out + c, strip, std::min(STRIP, latent - c) * sizeof(bf16));
  }
}

// Writes the mixed latents of a block of queries; ld_out: distance of two queries.
inline void write_block(const TileQueries& in, TileResult whole, int64_t block, bf16* out, int64_t ld_out) {
  for (int64_t q = block * TILE; q < std::min((block + 1) * TILE, in.count()); q++)
    write_mixed(whole, q, in.shape.latent, out + q * ld_out);
}

// The attention of a group of rows, by the calling thread. out: [queries][ld_out].
inline void attend_by_tiles(const TileQueries& in, bf16* out, int64_t ld_out) {
  Scratch<bf16> queries(in.padded() * in.shape.width());
  pack_queries(in, queries.get());
  Scratch<float> memory(2 * in.size());
  const TileResult whole = in.result(memory.get()), part = in.result(memory.get() + in.size());
  for (int64_t span = 0; span < in.spans(); span++) {
    attend_span(in, queries.get(), span, span == 0 ? whole : part);
    if (span > 0)
      for (int64_t b = 0; b < in.blocks(); b++) add_span(whole, part, b);
  }
  for (int64_t b = 0; b < in.blocks(); b++) write_block(in, whole, b, out, ld_out);
}

// The attention of few groups by a team, whose threads share the spans. memory: `size()` floats for each span of a group.
inline void team_attend_by_tiles(const TileQueries& in, float* memory, bf16* out, int64_t ld_out) {
#pragma omp for schedule(dynamic)
  for (int64_t span = 0; span < in.spans(); span++) {
    Scratch<bf16> queries(in.padded() * in.shape.width());
    pack_queries(in, queries.get());
    attend_span(in, queries.get(), span, in.result(memory + span * in.size()));
  }
#pragma omp for schedule(static)
  for (int64_t b = 0; b < in.blocks(); b++) {
    const TileResult whole = in.result(memory);
    for (int64_t span = 1; span < in.spans(); span++) add_span(whole, in.result(memory + span * in.size()), b);
    write_block(in, whole, b, out, ld_out);
  }
}
#endif
