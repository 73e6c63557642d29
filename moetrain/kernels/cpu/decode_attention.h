// Attention of new tokens over a paged cache of latents, with the key and value projections absorbed into the queries and
// the outputs (arXiv 2405.04434, section 2.1.2). A query of C + R numbers meets the cached [C latent | R rotary key] of
// each position, and the result is a mixture of latents.
//
// The softmax runs over pages in their order (arXiv 2112.05682), so the result of a query depends on its own positions
// only: not on the other rows, on the threads, or on how a prompt was cut into calls.
#pragma once

#include <limits>

#include "products.h"

constexpr int64_t PAGE = 64;  // positions of a page

struct DecodeAttention {
  int64_t heads, latent, rotary;
  float scale;
  const bf16* pages;  // [pages][PAGE][C + R]; all numbers are finite
  int64_t width() const { return latent + rotary; }
};

// Rows of one sequence: row i has `lengths[i]` positions, its own included. queries [rows][H][C + R], out [rows][H][C].
// table: the pages of the sequence. rows * H <= CHUNK, or one row.
template <class P>
void attend(const DecodeAttention& shape, const bf16* queries, const int32_t* lengths, int64_t rows, const int32_t* table,
            bf16* out) {
  const int64_t width = shape.width(), latent = shape.latent, all = rows * shape.heads, padded = up_to(all, TILE_ROWS);
  const int64_t padded_latent = up_to(latent, PANEL);
  Scratch<float> keys(units<P>(width) * PAGE), values(units<P>(PAGE) * padded_latent), scores(padded * PAGE),
      mixed(padded * padded_latent), left(CHUNK * ROW_STRIDE);
  Scratch<float> largest(all), sums(all);
  Scratch<bf16> shares(padded * PAGE);
  std::fill_n(largest.get(), all, -std::numeric_limits<float>::infinity());
  std::fill_n(sums.get(), all, 0.0f);
  std::fill_n(mixed.get(), padded * padded_latent, 0.0f);
  const int64_t longest = *std::max_element(lengths, lengths + rows);
  for (int64_t start = 0; start < longest; start += PAGE) {
    const int64_t count = std::min(PAGE, longest - start), columns = up_to(count, PANEL);
    const bf16* page = shape.pages + table[start / PAGE] * PAGE * width;
    pack_all<P, true>(page, width, up_to(count, LANES), width, keys.get());  // a page can be read to its end
    for (int64_t i = 0; i < all; i += CHUNK)
      rows_times_panels<P>(queries + i * width, width, std::min(CHUNK, all - i), width, keys.get(), units<P>(width), columns,
                           scores.get() + i * PAGE, PAGE, false, left.get());
    for (int64_t i = 0; i < all; i++) {
      float* score = scores.get() + i * PAGE;
      const int64_t seen = std::min(lengths[i / shape.heads] - start, count);
      if (seen <= 0) {  // the page begins after this row
        std::memset(shares.get() + i * PAGE, 0, columns * sizeof(bf16));
        continue;
      }
      for (int64_t s = seen; s < columns; s++) score[s] = -std::numeric_limits<float>::infinity();
      floats most = every(largest[i]);
      for (int64_t s = 0; s < columns; s += LANES) {
        const floats logits = load(score + s) * shape.scale;
        store(score + s, logits);
        most = logits > most ? logits : most;
      }
      const float now = ::largest(most), kept = exponential(largest[i] - now);
      floats total = every(0.0f);
      for (int64_t s = 0; s < columns; s += LANES) {
        const floats logits = load(score + s) - now;
        const floats share = logits < -87.0f ? every(0.0f) : exponential(logits);
        store(shares.get() + i * PAGE + s, share);
        total += share;
      }
      sums[i] = sums[i] * kept + sum(total);
      largest[i] = now;
      if (kept != 1.0f)
        for (int64_t c = 0; c < padded_latent; c += LANES) {
          float* at = mixed.get() + i * padded_latent + c;
          store(at, load(at) * kept);
        }
    }
    pack_all<P, false>(page, width, latent, count, values.get());
    for (int64_t i = 0; i < all; i += CHUNK)
      rows_times_panels<P>(shares.get() + i * PAGE, PAGE, std::min(CHUNK, all - i), count, values.get(), units<P>(count),
                           latent, mixed.get() + i * padded_latent, padded_latent, true, left.get());
  }
  for (int64_t i = 0; i < all; i++) {
    float* row = mixed.get() + i * padded_latent;
    for (int64_t c = 0; c < padded_latent; c += LANES) store(row + c, load(row + c) / sums[i]);
    narrow_row(row, out + i * latent, latent);
  }
}
