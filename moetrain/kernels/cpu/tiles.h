// Products by the tile registers of AMX, which hold up to 16 rows of 32 bfloat16 numbers.
//
// A sum has parts of TILE_INPUTS inputs. In a part the products of the even inputs are added in their order, those of the
// odd inputs likewise, and then both to each other; the parts are added in their order. Numbers too small for a normal
// float32 count as zero. The instruction defines this order, and it does not depend on the rows of a tile.
#pragma once

#include "vectors.h"

constexpr int64_t TILE = 16, TILE_INPUTS = 32;          // rows of a tile, and inputs of a row
constexpr int64_t TILE_PAIRS = TILE_INPUTS / 2;
constexpr int64_t TILE_BYTES = TILE * TILE_INPUTS * 2;  // of a full tile

#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

// Whether the process may use tiles; the kernel grants it once for all threads.
inline bool request_tiles() {
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

#if defined(__SANITIZE_ADDRESS__)
// Checks the rows of memory that a tile register is loaded from or stored to, by the shape that is set.
inline void check_tile(int tile, const void* base, int64_t stride) {
  struct {
    uint8_t head[16];
    uint16_t bytes[16];
    uint8_t rows[16];
  } shape;
  asm volatile("sttilecfg %0" : "=m"(shape));
  for (int64_t r = 0; r < shape.rows[tile]; r++) check_access(static_cast<const uint8_t*>(base) + r * stride, shape.bytes[tile]);
}
#undef _tile_loadd
#undef _tile_stored
#define _tile_loadd(tile, base, stride) \
  do { \
    check_tile(tile, base, stride); \
    _tile_loadd_internal(tile, base, stride); \
  } while (0)
#define _tile_stored(tile, base, stride) \
  do { \
    check_tile(tile, base, stride); \
    _tile_stored_internal(tile, base, stride); \
  } while (0)
#endif

// The compiler does not know that tile instructions access memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Loads and multiplies as inline assembly: the register is a template argument, which the intrinsics do not accept. The
// load tells the compiler that it reads memory.
template <int TO>
inline void load_tile(const void* base, int64_t stride) {
#if defined(__SANITIZE_ADDRESS__)
  check_tile(TO, base, stride);
#endif
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(stride), "i"(TO) : "memory");
}
template <int SUMS, int LEFT, int RIGHT>
inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

// The shape of the tile registers of a thread, zero if none is set.
inline thread_local int64_t tile_shape = 0;

// Sets rows and bytes of the tile registers, unless they have the shape `key` already. Setting them clears the tiles.
inline void set_tiles(int64_t key, const int64_t (&rows)[8], const int64_t (&bytes)[8]) {
  if (tile_shape == key) return;
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int64_t i = 0; i < 8; i++) {
    if (rows[i] == 0 || bytes[i] == 0) continue;  // is not used
    shape.rows[i] = rows[i];
    shape.bytes[i] = bytes[i];
  }
  asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  tile_shape = key;
}

// Sets tiles 0 to 3 to the sums of up to 2 TILE rows, 4 and 5 to the rows, 6 and 7 to two right operands.
inline void set_row_tiles(int64_t rows) {
  const int64_t first = std::min(rows, TILE), second = rows - first;
  set_tiles(1 + rows, {first, first, second, second, first, second, TILE, TILE}, {64, 64, 64, 64, 64, 64, 64, 64});
}

// Frees the tile registers of the thread at the end of its work.
struct TileWork {
  TileWork() { tile_shape = 0; }
  ~TileWork() {
    if (tile_shape != 0) _tile_release();
    tile_shape = 0;
  }
};

// sums[rows][2 TILE] = x times a panel of tiles [k / TILE_INPUTS][2], each [pairs of inputs][TILE columns]. MORE: there are
// more than TILE rows, of which those of the second tile begin at x + TILE * ldx.
template <bool MORE>
void tiles_times_panel(const bf16* x, int64_t ldx, int64_t k, const uint8_t* panel, float* sums) {
  constexpr int64_t AHEAD = 8 * TILE_BYTES;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (MORE) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += TILE_INPUTS, panel += 2 * TILE_BYTES) {
    for (int64_t at = 0; at < 2 * TILE_BYTES; at += 64) _mm_prefetch(panel + AHEAD + at, _MM_HINT_T0);
    _tile_loadd(4, x + i, ldx * 2);
    _tile_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + TILE_BYTES, 64);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (MORE) {
      _tile_loadd(5, x + TILE * ldx + i, ldx * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 2 * TILE * 4);
  _tile_stored(1, sums + TILE, 2 * TILE * 4);
  if constexpr (MORE) {
    _tile_stored(2, sums + 2 * TILE * TILE, 2 * TILE * 4);
    _tile_stored(3, sums + 2 * TILE * TILE + TILE, 2 * TILE * 4);
  }
}

// The same for rows <= 2 TILE.
inline void few_tiles_times_panel(const bf16* x, int64_t ldx, int64_t rows, int64_t k, const uint8_t* panel, float* sums) {
  set_row_tiles(rows);
  memory_barrier();
  if (rows > TILE) tiles_times_panel<true>(x, ldx, k, panel, sums);
  else tiles_times_panel<false>(x, ldx, k, panel, sums);
  memory_barrier();
}
#else
inline bool request_tiles() { return false; }
struct TileWork {
  TileWork() {}
};
#endif
