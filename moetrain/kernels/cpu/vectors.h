// Float vectors by the portable vector extensions of GCC and Clang, conversion from and to bfloat16, and exp.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, TILE_ROWS = 8;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8, TILE_ROWS = 6;
#else
constexpr int64_t LANES = 4, TILE_ROWS = 6;
#endif

using bf16 = uint16_t;
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float floats_anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef uint16_t halves_anywhere __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float widen(bf16 x) { return bits<float>(uint32_t(x) << 16); }
inline floats widen(halves x) {
#if defined(__AVX512F__)
  return bits<floats>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits<__m256i>(x)), 16));
#else
  return bits<floats>(__builtin_convertvector(x, words) << 16);
#endif
}

// Rounds to nearest even; NaN stays NaN.
inline bf16 narrow(float x) {
  const uint32_t u = bits<uint32_t>(x);
  return x != x ? bf16(0x7fc0) : bf16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline halves narrow(floats x) {
#if defined(__AVX512BF16__)
  return bits<halves>(_mm512_cvtneps_pbh(bits<__m512>(x)));
#else
  const words u = bits<words>(x), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const words nan = bits<words>(x != x);
  return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), halves);
#endif
}

inline floats load(const float* from) { return *reinterpret_cast<const floats_anywhere*>(from); }
inline floats load(const bf16* from) { return widen(halves(*reinterpret_cast<const halves_anywhere*>(from))); }
inline void store(float* to, floats x) { *reinterpret_cast<floats_anywhere*>(to) = x; }
inline void store(float* to, float x) { *to = x; }
inline void store(bf16* to, float x) { *to = narrow(x); }
inline void store(bf16* to, floats x) { *reinterpret_cast<halves_anywhere*>(to) = narrow(x); }
inline float get(const float* from) { return *from; }
inline float get(const bf16* from) { return widen(*from); }

// x rounded to bfloat16, as the products read it.
inline bf16 as_bf16(const float* from) { return narrow(*from); }
inline bf16 as_bf16(const bf16* from) { return *from; }
inline halves as_halves(const float* from) { return narrow(load(from)); }
inline halves as_halves(const bf16* from) { return *reinterpret_cast<const halves_anywhere*>(from); }

// A word with two bfloat16 numbers, the first in the lower half.
inline floats pairs(halves first, halves second) {
  return bits<floats>(__builtin_convertvector(first, words) | __builtin_convertvector(second, words) << 16);
}
inline words load_pairs(const bf16* from) {
  words both;
  std::memcpy(&both, from, sizeof(both));
  return both;
}
inline floats firsts(const bf16* from) { return bits<floats>(load_pairs(from) << 16); }
inline floats seconds(const bf16* from) { return bits<floats>(load_pairs(from) & 0xffff0000u); }
inline void store_pairs(bf16* to, floats first, floats second) {
  const floats both = pairs(narrow(first), narrow(second));
  std::memcpy(to, &both, sizeof(both));
}
inline void store_pairs(bf16* to, float first, float second) {
  to[0] = narrow(first);
  to[1] = narrow(second);
}

// Reduces all lanes with `op`: first the two halves of the vector, then the halves of the result..
template <int64_t SIZE = LANES / 2, class Op>
inline float fold(floats x, Op op) {
  ints other;
  for (int64_t l = 0; l < LANES; l++) other[l] = l ^ SIZE;
  x = op(x, __builtin_shuffle(x, other));
  if constexpr (SIZE > 1) return fold<SIZE / 2>(x, op);
  else return x[0];
}
inline float sum(floats x) {
  return fold(x, [](floats a, floats b) { return a + b; });
}
inline float largest(floats x) {
  return fold(x, [](floats a, floats b) { return a > b ? a : b; });
}
inline floats every(float x) { return x - floats{}; }  // no operation: x may be any 32 bits

// exp within 2 ulp on [-87.3, 88]; arguments outside are clamped; NaN stays NaN.
inline floats exponential(floats x) {
  constexpr float LOWEST = -87.3f, HIGHEST = 88.0f, MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
  x = x < LOWEST ? every(LOWEST) : x;
  x = x > HIGHEST ? every(HIGHEST) : x;
  const floats shifted = x * 1.44269504088896341f + MAGIC, n = shifted - MAGIC;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // x - n log 2
  floats p = every(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * bits<floats>((bits<words>(shifted) << 23) + (127u << 23));  // the lowest bits contain the integer
}
inline float exponential(float x) { return exponential(every(x))[0]; }

template <class V>
V sigmoid(V x) { return 1.0f / (1.0f + exponential(-x)); }

constexpr int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Has AddressSanitizer check an access of the instructions that the compiler does not instrument: masked ones and those of
// tiles.
inline void check_access([[maybe_unused]] const void* at, [[maybe_unused]] int64_t size) {
#if defined(__SANITIZE_ADDRESS__)
  void* bad = size > 0 ? __asan_region_is_poisoned(const_cast<void*>(at), size) : nullptr;
  if (bad != nullptr) (void)*static_cast<volatile uint8_t*>(bad);  // is reported
#endif
}

// Memory with vector alignment, freed at the end of the scope. It has no elements beyond `size`, so a sanitizer sees each
// access behind them.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    void* memory;
    if (posix_memalign(&memory, 64, std::max<size_t>(size * sizeof(T), 1)) != 0) std::abort();
    data_ = static_cast<T*>(memory);
  }
  ~Scratch() { std::free(data_); }
  Scratch(Scratch&& other) : data_(other.data_) { other.data_ = nullptr; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};
