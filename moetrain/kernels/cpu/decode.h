// One call of generation: new tokens of any sequences through all layers, with a paged cache. All threads work on one
// layer at a time and share its panels, rows or heads; no result depends on how. A row is a token; rows of one sequence
// follow each other in the order of their positions.
//
// Widths that products sum over are padded to GROUP with zeros, in the packed matrices and in the rows here.
#pragma once

#include "decode_attention.h"
#include "decompressed_attention.h"
#include "packed.h"
#include "router.h"
#include "rows.h"
#include "tiled_attention.h"
#include "tiled_experts.h"

struct DecodeShape {
  int64_t layers, hidden, heads, plain, rotary, value, latent, query_rank;  // query_rank 0: queries are not compressed
  int64_t experts, chosen, groups, best_groups, function, normalize;
  int64_t decompressed;  // whether the cache holds the keys and values of each head instead of latents
  float eps, latent_eps, scale, factor;
};

// Pointers of one block. Matrices are packed by `pack_dense`; up_k and up_v hold one matrix per head. A block without
// experts has no router. A decompressed cache needs kv_b, one of latents up_k and up_v. int4: whether expert_gate_up and
// expert_down are from `pack_int4`.
struct DecodeLayer {
  const float *input_norm, *post_norm, *query_norm, *latent_norm, *router, *bias;
  const uint8_t *q_a, *q_b, *kv_a, *kv_b, *up_k, *up_v, *out, *gate, *up, *down, *expert_gate_up, *expert_down;
  int64_t width, expert_width, int4;
};

struct DecodeRows {
  int64_t rows;
  const int32_t *sequences, *positions;  // [rows]
  const int32_t* tables;                 // [sequences][table_width]: the pages of each
  int64_t table_width;
  const float *cosine, *sine;  // [positions][R / 2]
  bf16* pages;                 // [layers][num_pages][PAGE][C + R], or [layers][num_pages] of `HeadPages`
  int64_t num_pages;
};

constexpr int64_t ROWS_TOGETHER = 8, QUERIES_TOGETHER = 64;  // rows of a sequence that share the reading of a page

template <class P>
class Decode {
 public:
  Decode(const DecodeShape& shape, const DecodeRows& in, const DecodeLayer* layers, bf16* x)
      : s(shape),
        in(in),
        layers(layers),
        x(x),
        wide(up_to(s.hidden, GROUP)),
        rank(up_to(s.query_rank, GROUP)),
        head(s.plain + s.rotary),
        latent_width(s.latent + s.rotary),
        plain(up_to(s.plain, GROUP)),
        mixed_width(up_to(s.latent, GROUP)),
        out_width(up_to(s.heads * s.value, GROUP)),
        normed(zeros(in.rows * wide)),
        compressed(zeros(in.rows * rank)),
        latents(in.rows * latent_width),
        queries(in.rows * s.heads * head),
        plain_queries(zeros(in.rows * s.heads * plain)),
        absorbed(in.rows * s.heads * latent_width),
        mixed(zeros(in.rows * s.heads * mixed_width)),
        values(zeros(in.rows * out_width)),
        added(in.rows * s.hidden),
        ids(in.rows * std::max<int64_t>(s.chosen, 1)),
        places(in.rows * std::max<int64_t>(s.chosen, 1)),
        tokens(in.rows * std::max<int64_t>(s.chosen, 1)),
        weights(in.rows * std::max<int64_t>(s.chosen, 1)),
        ends(std::max<int64_t>(s.experts, 1)),
        groups(in.rows + 1),
        shared_inner(in.rows * up_to(widest(&DecodeLayer::width), GROUP)),
        inner(zeros(in.rows * s.chosen * up_to(widest(&DecodeLayer::expert_width), GROUP))),
        sorted(in.rows * s.chosen * wide),
        routed(in.rows * s.chosen * s.hidden),
        kept(zeros(s.decompressed ? in.rows * up_to(s.latent, GROUP) : 0)),
        expanded(s.decompressed ? in.rows * s.heads * (s.plain + s.value) : 0),
        rotated(zeros(s.decompressed ? in.rows * s.heads * up_to(head, GROUP) : 0)),
        partial(partial_size()) {
    num_groups = 0;
    for (int64_t r = 0; r < in.rows; r++) {
      const bool joins = r > 0 && in.sequences[r] == in.sequences[r - 1] && r - groups[num_groups - 1] < together();
      if (!joins) groups[num_groups++] = r;
    }
    groups[num_groups] = in.rows;
  }

  // Threads that are worth their waiting: they wait for each other some fifteen times per block, so each must have enough
  // products in between. The number changes no result.
  int threads() const {
    constexpr int64_t PRODUCTS = 400'000;  // of a thread and block: some ten microseconds
    const DecodeLayer& last = layers[s.layers - 1];
    const int64_t from = s.query_rank > 0 ? s.query_rank : s.hidden;
    const int64_t of_heads = s.heads * (from * head + (s.plain + s.value) * s.latent + s.value * s.hidden);
    const int64_t of_rows = s.hidden * (s.query_rank + latent_width + 3 * (last.width + s.chosen * last.expert_width));
    int64_t positions = 0;
    for (int64_t r = 0; r < in.rows; r++) positions += in.positions[r] + 1;
    const int64_t products = in.rows * (of_heads + of_rows) + positions * s.heads * (latent_width + s.latent);
    return int(std::clamp<int64_t>(products / PRODUCTS, 1, omp_get_max_threads()));
  }

  // All blocks, and the last norm. Called by all threads of a team.
  void operator()(const float* last_norm) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; r++) norm_row(r, layers[0].input_norm);
    for (int64_t i = 0; i < s.layers; i++) {
      attention(layers[i], in.pages + i * in.num_pages * page_size());
      feed_forward(layers[i], i + 1 < s.layers ? layers[i + 1].input_norm : last_norm);
    }
  }

 private:
  const DecodeShape& s;
  const DecodeRows& in;
  const DecodeLayer* layers;
  bf16* x;
  const int64_t wide, rank, head, latent_width, plain, mixed_width, out_width;
  Scratch<bf16> normed, compressed, latents, queries, plain_queries, absorbed, mixed, values, added;
  Scratch<int64_t> ids, places, tokens;
  Scratch<float> weights;
  Scratch<int64_t> ends, groups;
  Scratch<bf16> shared_inner, inner, sorted, routed;
  Scratch<bf16> kept, expanded, rotated;  // with a decompressed cache
  Scratch<float> partial;
  int64_t num_groups;

  using OfAttention = std::conditional_t<std::is_same_v<P, Tiled>, Paired, P>;

  // Room for the partial results of the largest group, where threads may share its positions.
  int64_t partial_size() const {
#if defined(__AMX_BF16__)
    if (tiles_attend() && in.rows < omp_get_max_threads() * together()) {
      const TileQueries largest{{s.heads, s.latent, s.rotary, s.scale, nullptr}, nullptr, in.positions, nullptr, in.rows};
      return largest.spans() * up_to(std::min(in.rows, together()) * s.heads, TILE) * (largest.width() + 2);
    }
#endif
    return 0;
  }

  static Scratch<bf16> zeros(int64_t size) {
    Scratch<bf16> memory(size);
    std::memset(memory.get(), 0, size * sizeof(bf16));
    return memory;
  }

  int64_t together() const {
    if (s.decompressed) return MOST_ROWS;
    if (tiles_attend()) return std::max<int64_t>(1, QUERIES_TOGETHER / s.heads);
    return std::max<int64_t>(1, std::min(ROWS_TOGETHER, CHUNK / s.heads));
  }

  bool tiles_attend() const { return std::is_same_v<P, Tiled> && latent_width % 2 == 0 && !s.decompressed; }
  HeadPages head_pages(bf16* pages) const { return {s.heads, head, s.value, pages}; }
  int64_t page_size() const { return s.decompressed ? s.heads * head_pages(nullptr).size() : PAGE * latent_width; }

  // The largest of a size of all blocks.
  int64_t widest(int64_t DecodeLayer::*size) const {
    int64_t most = 0;
    for (int64_t i = 0; i < s.layers; i++) most = std::max(most, layers[i].*size);
    return most;
  }

  void norm_row(int64_t r, const float* weight) const {
    rms_norm_row(x + r * s.hidden, weight, s.hidden, s.eps, normed.get() + r * wide);
  }

  // Adds the output of attention or of the feed-forward layer to the residual stream of a row.
  void add_row(int64_t r) const {
    bf16* to = x + r * s.hidden;
    const bf16* from = added.get() + r * s.hidden;
    int64_t i = 0;
    for (; i + LANES <= s.hidden; i += LANES) store(to + i, load(to + i) + load(from + i));
    for (; i < s.hidden; i++) to[i] = narrow(widen(to[i]) + widen(from[i]));
  }

  void attention(const DecodeLayer& layer, bf16* pages) {
    team_product<P, DensePanel, false>(normed.get(), wide, in.rows, wide, layer.kv_a, latent_width, latents.get(),
                                       latent_width);
    if (s.query_rank > 0) {
      team_product<P, DensePanel>(normed.get(), wide, in.rows, wide, layer.q_a, s.query_rank, compressed.get(), rank);
#pragma omp for schedule(static)
      for (int64_t r = 0; r < in.rows; r++) {
        bf16* row = compressed.get() + r * rank;
        rms_norm_row(row, layer.query_norm, s.query_rank, s.latent_eps, row);
      }
      team_product<P, DensePanel>(compressed.get(), rank, in.rows, rank, layer.q_b, s.heads * head, queries.get(),
                                  s.heads * head);
    } else {
      team_product<P, DensePanel>(normed.get(), wide, in.rows, wide, layer.q_b, s.heads * head, queries.get(),
                                  s.heads * head);
    }
    if (s.decompressed) attention_decompressed(layer, head_pages(pages));
    else attention_absorbed(layer, pages);
    team_product<P, DensePanel>(values.get(), out_width, in.rows, out_width, layer.out, s.hidden, added.get(), s.hidden);
  }

  // Attends with the sums of training.
  void attention_decompressed(const DecodeLayer& layer, const HeadPages& cache) {
    const int64_t ld_latent = up_to(s.latent, GROUP), ld_kv = s.heads * (s.plain + s.value), inputs = cache.inputs();
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; r++)
      rms_norm_row(latents.get() + r * latent_width, layer.latent_norm, s.latent, s.latent_eps, kept.get() + r * ld_latent);
    team_product<P, DensePanel>(kept.get(), ld_latent, in.rows, ld_latent, layer.kv_b, ld_kv, expanded.get(), ld_kv);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; r++) {
      const int64_t position = in.positions[r];
      const int64_t page = in.tables[in.sequences[r] * in.table_width + position / PAGE];
      const float *cosine = in.cosine + position * s.rotary / 2, *sine = in.sine + position * s.rotary / 2;
      Scratch<bf16> key(head);
      rotate(latents.get() + r * latent_width + s.latent, cosine, sine, s.rotary, key.get() + s.plain);
      for (int64_t h = 0; h < s.heads; h++) {
        const bf16* from = expanded.get() + r * ld_kv + h * (s.plain + s.value);
        const bf16* query = queries.get() + (r * s.heads + h) * head;
        std::memcpy(key.get(), from, s.plain * sizeof(bf16));
        cache.write(page, h, position % PAGE, key.get(), from + s.plain);
        bf16* to = rotated.get() + (r * s.heads + h) * inputs;
        std::memcpy(to, query, s.plain * sizeof(bf16));
        rotate(query + s.plain, cosine, sine, s.rotary, to + s.plain);
      }
    }
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_groups * s.heads; task++) {
      const int64_t first = groups[task / s.heads], rows = groups[task / s.heads + 1] - first, h = task % s.heads;
      attend_decompressed<P>(cache, h, rotated.get() + (first * s.heads + h) * inputs, s.heads * inputs,
                             in.positions + first, rows, in.tables + in.sequences[first] * in.table_width, s.scale,
                             values.get() + first * out_width + h * s.value, out_width);
    }
  }

  // Attends to latents, with the key and value projections absorbed into queries and outputs.
  void attention_absorbed(const DecodeLayer& layer, bf16* pages) {
    rotate_rows(layer, pages);
    const int64_t up_k = plain / GROUP * DensePanel::BYTES * (up_to(s.latent, PANEL) / PANEL);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.heads * (up_to(s.latent, PANEL) / PANEL); task++) {
      const int64_t panels = up_to(s.latent, PANEL) / PANEL, h = task / panels, j = task % panels * PANEL;
      panel_product<P>(plain_queries.get() + h * plain, s.heads * plain, in.rows, plain,
                       DensePanel{layer.up_k + h * up_k + j / PANEL * (plain / GROUP) * DensePanel::BYTES},
                       absorbed.get() + h * latent_width + j, s.heads * latent_width, std::min(PANEL, s.latent - j));
    }
    mix(pages);
    const int64_t panels = up_to(s.value, PANEL) / PANEL, size = mixed_width / GROUP * DensePanel::BYTES;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < s.heads * panels; task++) {
      const int64_t h = task / panels, j = task % panels * PANEL;
      panel_product<P>(mixed.get() + h * mixed_width, s.heads * mixed_width, in.rows, mixed_width,
                       DensePanel{layer.up_v + (h * panels + j / PANEL) * size}, values.get() + h * s.value + j, out_width,
                       std::min(PANEL, s.value - j));
    }
  }

  // Writes the latents and rotated keys of the rows to their pages, and splits and rotates the queries.
  void rotate_rows(const DecodeLayer& layer, bf16* pages) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; r++) {
      const int64_t position = in.positions[r];
      const int64_t page = in.tables[in.sequences[r] * in.table_width + position / PAGE];
      const float *cosine = in.cosine + position * s.rotary / 2, *sine = in.sine + position * s.rotary / 2;
      bf16* to = pages + (page * PAGE + position % PAGE) * latent_width;
      rms_norm_row(latents.get() + r * latent_width, layer.latent_norm, s.latent, s.latent_eps, to);
      rotate(latents.get() + r * latent_width + s.latent, cosine, sine, s.rotary, to + s.latent);
      for (int64_t h = 0; h < s.heads; h++) {
        const bf16* query = queries.get() + (r * s.heads + h) * head;
        std::memcpy(plain_queries.get() + (r * s.heads + h) * plain, query, s.plain * sizeof(bf16));
        rotate(query + s.plain, cosine, sine, s.rotary, absorbed.get() + (r * s.heads + h) * latent_width + s.latent);
      }
    }
  }

  void mix(const bf16* pages) {
#if defined(__AMX_BF16__)
    if (tiles_attend()) return mix_by_tiles({s.heads, s.latent, s.rotary, s.scale, pages});
#endif
    mix_by_vectors(pages);
  }

#if defined(__AMX_BF16__)
  // Tasks are groups of rows of a sequence; the positions of few groups are divided.
  void mix_by_tiles(const DecodeAttention& attention) {
    const auto queries_of = [&](int64_t g) {
      return TileQueries{attention, absorbed.get() + groups[g] * s.heads * latent_width, in.positions + groups[g],
                         in.tables + in.sequences[groups[g]] * in.table_width, groups[g + 1] - groups[g]};
    };
    const auto out_of = [&](int64_t g) { return mixed.get() + groups[g] * s.heads * mixed_width; };
    if (num_groups >= omp_get_num_threads()) {
#pragma omp for schedule(dynamic)
      for (int64_t g = 0; g < num_groups; g++) attend_by_tiles(queries_of(g), out_of(g), mixed_width);
      return;
    }
    for (int64_t g = 0; g < num_groups; g++)
      team_attend_by_tiles(queries_of(g), partial.get(), out_of(g), mixed_width);
  }
#endif

  // Tasks are groups of rows of a sequence; a lone row's heads are divided.
  void mix_by_vectors(const bf16* pages) {
    const int64_t parts = num_groups >= omp_get_num_threads() ? 1 : std::min<int64_t>(omp_get_num_threads(), s.heads);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < num_groups * parts; task++) {
      const int64_t first = groups[task / parts], rows = groups[task / parts + 1] - first, part = task % parts;
      const int64_t from = s.heads * part / parts, heads = s.heads * (part + 1) / parts - from;
      Scratch<bf16> gathered(rows * heads * latent_width), out(rows * heads * s.latent);
      Scratch<int32_t> lengths(rows);
      for (int64_t r = 0; r < rows; r++) {
        lengths[r] = in.positions[first + r] + 1;
        std::memcpy(gathered.get() + r * heads * latent_width,
                    absorbed.get() + ((first + r) * s.heads + from) * latent_width, heads * latent_width * sizeof(bf16));
      }
      attend<OfAttention>({heads, s.latent, s.rotary, s.scale, pages}, gathered.get(), lengths.get(), rows,
                          in.tables + in.sequences[first] * in.table_width, out.get());
      for (int64_t r = 0; r < rows; r++)
        for (int64_t h = 0; h < heads; h++)
          std::memcpy(mixed.get() + ((first + r) * s.heads + from + h) * mixed_width, out.get() + (r * heads + h) * s.latent,
                      s.latent * sizeof(bf16));
    }
  }

  // Adds attention to the residual stream, then the feed-forward layer, and norms it for the next block.
  void feed_forward(const DecodeLayer& layer, const float* next_norm) {
    const int64_t width = up_to(layer.width, GROUP), size = wide / GROUP * DensePanel::BYTES;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; r++) {
      add_row(r);
      norm_row(r, layer.post_norm);
      if (layer.router != nullptr) choose(layer, r);
    }
#pragma omp for schedule(static) nowait
    for (int64_t j = 0; j < layer.width; j += PANEL) {
      swiglu_panel<P>(normed.get(), wide, in.rows, wide, DensePanel{layer.gate + j / PANEL * size},
                      DensePanel{layer.up + j / PANEL * size}, std::min(PANEL, layer.width - j), shared_inner.get() + j, width);
      if (j + PANEL >= layer.width)
        for (int64_t r = 0; r < in.rows; r++)
          std::fill(shared_inner.get() + r * width + layer.width, shared_inner.get() + (r + 1) * width, bf16(0));
    }
    if (layer.router != nullptr) {
#pragma omp single
      sort_rows();
      if (layer.int4) int4_experts(layer);
      else experts<DensePanel>(layer);
    } else {
#pragma omp barrier
    }
    team_product<P, DensePanel>(shared_inner.get(), width, in.rows, width, layer.down, s.hidden, added.get(), s.hidden);
#pragma omp for schedule(static)
    for (int64_t r = 0; r < in.rows; r++) {
      if (layer.router != nullptr) combine(r);
      add_row(r);
      norm_row(r, next_norm);
    }
  }

  void int4_experts(const DecodeLayer& layer) {
#if defined(__AMX_BF16__)
    if constexpr (std::is_same_v<P, Tiled>) {
      team_tiled_experts(normed.get(), tokens.get(), ends.get(),
                         {layer.expert_gate_up, layer.expert_down, s.experts, wide, s.hidden, layer.expert_width},
                         sorted.get(), inner.get(), routed.get());
      return;
    }
#endif
    experts<Int4Panel>(layer);
  }

  template <class Panel>
  void experts(const DecodeLayer& layer) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < in.rows * s.chosen; i++)
      std::memcpy(sorted.get() + i * wide, normed.get() + tokens[i] * wide, wide * sizeof(bf16));
    team_experts<P, Panel>(
        sorted.get(), ends.get(),
        {layer.expert_gate_up, layer.expert_down, s.experts, wide, s.hidden, layer.expert_width}, inner.get(), routed.get());
  }

  void choose(const DecodeLayer& layer, int64_t r) {
    const Router router{layer.router, layer.bias, s.hidden, s.experts, s.chosen, s.groups, s.best_groups, s.function,
                        s.normalize, s.factor};
    route(router, normed.get() + r * wide, ids.get() + r * s.chosen, weights.get() + r * s.chosen);
  }

  // Sorts the chosen rows by expert.
  void sort_rows() {
    std::fill_n(ends.get(), s.experts, int64_t(0));
    for (int64_t i = 0; i < in.rows * s.chosen; i++) ends[ids[i]]++;
    int64_t total = 0;
    for (int64_t e = 0; e < s.experts; e++) {
      const int64_t count = ends[e];
      ends[e] = total;  // the first place for now
      total += count;
    }
    for (int64_t i = 0; i < in.rows * s.chosen; i++) {
      places[i] = ends[ids[i]]++;
      tokens[places[i]] = i / s.chosen;
    }
  }

  // added += sum over k of weight * output, in float32 and in the order of k.
  void combine(int64_t r) const {
    const auto sum_of = [&](int64_t i, auto sum) {
      for (int64_t k = 0; k < s.chosen; k++)
        sum += get_as<decltype(sum)>(routed.get() + places[r * s.chosen + k] * s.hidden + i) * weights[r * s.chosen + k];
      return sum;
    };
    bf16* to = added.get() + r * s.hidden;
    int64_t i = 0;
    for (; i + LANES <= s.hidden; i += LANES) store(to + i, load(to + i) + widen(narrow(sum_of(i, every(0.0f)))));
    for (; i < s.hidden; i++) to[i] = narrow(widen(to[i]) + widen(narrow(sum_of(i, 0.0f))));
  }

  template <class T>
  static T get_as(const bf16* from) {
    if constexpr (std::is_same_v<T, float>) return widen(*from);
    else return load(from);
  }

 public:
  const bf16* rows() const { return normed.get(); }
  int64_t row_width() const { return wide; }
};
