// Vectors of 16 floats in GCC's and Clang's portable notation; bfloat16 is read and written as float32's upper half.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#ifdef __AVX512F__  // whoever asks for more of AVX-512 has this
#include <immintrin.h>
#endif

namespace loraplex {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Floats load(const c10::BFloat16* p) {  // a bfloat16 is the upper half of a float32
  Halves h;
  std::memcpy(&h, p, sizeof(h));
  Words w = __builtin_convertvector(h, Words) << 16;
  Floats v;
  std::memcpy(&v, &w, sizeof(v));
  return v;
}

// a * b + c for single values, rounded once where the processor can. The compiler would choose anew in each copy of a
// template, and so a token's bits would depend on how many others are beside it.
inline float fused(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof(v)); }

// bfloat16 in the lower halves: rounded to nearest even, as torch does; NaN stays NaN.
inline Words rounded(Floats v) {
  const Words w = reinterpret_cast<Words>(v);
  const Words nearest = (w + (0x7fff + ((w >> 16) & 1))) >> 16;
  const Words quiet = (w >> 16) | 0x40;
  const Words is_nan = reinterpret_cast<Words>(v != v);
  return (nearest & ~is_nan) | (quiet & is_nan);
}

inline void store(c10::BFloat16* p, Floats v) {
  const Halves h = __builtin_convertvector(rounded(v), Halves);
  std::memcpy(p, &h, sizeof(h));
}

constexpr int64_t kPair = 2 * kLanes;

// kPair values as two vectors, in whatever order reads fastest: `store` knows it.
template <typename T>
struct Pair {
  Floats first, second;
};

inline Pair<float> load_pair(const float* p) { return {load(p), load(p + kLanes)}; }

inline Pair<c10::BFloat16> load_pair(const c10::BFloat16* p) {  // even values, odd values: no lane moves
  Words w;
  std::memcpy(&w, p, sizeof(w));
  return {reinterpret_cast<Floats>(w << 16), reinterpret_cast<Floats>(w & 0xffff0000)};
}

inline void store(float* p, Pair<float> v) {
  store(p, v.first);
  store(p + kLanes, v.second);
}

inline void store(c10::BFloat16* p, Pair<c10::BFloat16> v) {
  const Words w = rounded(v.first) | (rounded(v.second) << 16);
  std::memcpy(p, &w, sizeof(w));
}

// Lane i of the result is lane order[i] of a and b side by side.
inline Floats shuffle(Floats a, Floats b, Ints order) {
#if defined(__clang__)
  Floats result;
  for (int i = 0; i < kLanes; ++i) result[i] = order[i] < kLanes ? a[order[i]] : b[order[i] - kLanes];
  return result;
#else
  return __builtin_shuffle(a, b, order);
#endif
}

// kPair values at p in the order in which load_pair(const T*) leaves its own: they can be added lane by lane.
template <typename T>
Pair<T> load_pair_like(const T* p) {
  return load_pair(p);
}

template <typename T>
  requires std::is_same_v<T, c10::BFloat16>
inline Pair<T> load_pair_like(const float* p) {
  constexpr Ints even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  constexpr Ints odd = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const Floats low = load(p), high = load(p + kLanes);
  return {shuffle(low, high, even), shuffle(low, high, odd)};
}

inline void store(float* p, Pair<c10::BFloat16> v) {
  constexpr Ints low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  constexpr Ints high = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  store(p, shuffle(v.first, v.second, low));
  store(p + kLanes, shuffle(v.first, v.second, high));
}

// Calls f with the constants 0 .. N - 1: indices that the compiler knows keep an array of vectors in registers.
template <int N, typename F>
[[gnu::always_inline]] inline void each(const F& f) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (f(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// Lane i of the result is the sum of the 16 lanes of v[i], for the first `count` vectors, a power of two up to 16; v is
// used up. Every vector is summed in the same order, whatever `count` is.
template <int count>
[[gnu::always_inline]] inline Floats sums(Floats* v) {
  constexpr Ints even1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
  constexpr Ints odd1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
  constexpr Ints even2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
  constexpr Ints odd2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
  constexpr Ints even4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
  constexpr Ints odd4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
  constexpr Ints low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
  constexpr Ints high = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
  constexpr auto other = [](int i, int step) { return i + step < count ? i + step : i; };
  each<(count + 1) / 2>([&](auto j) {
    const Floats a = v[2 * j], b = v[other(2 * j, 1)];
    v[2 * j] = shuffle(a, b, even1) + shuffle(a, b, odd1);
  });
  each<(count + 3) / 4>([&](auto j) {
    const Floats a = v[4 * j], b = v[other(4 * j, 2)];
    v[4 * j] = shuffle(a, b, even2) + shuffle(a, b, odd2);
  });
  each<(count + 7) / 8>([&](auto j) {
    const Floats a = v[8 * j], b = v[other(8 * j, 4)];
    v[8 * j] = shuffle(a, b, even4) + shuffle(a, b, odd4);
  });
  const Floats a = v[0], b = v[other(0, 8)];
  return shuffle(a, b, low) + shuffle(a, b, high);
}

// Asks the memory for what will be read soon. A function that does only this has no effect in the compiler's eyes, which
// then leaves its calls out: the empty statement is one.
inline void ask_for(const void* p) {
  __builtin_prefetch(p, 0, 2);
  asm volatile("");
}

// Adapters are many short, scattered rows: the hardware sees no stream in them, so each step asks for the next
// step's rows. [rows, bytes] with a stride, all in bytes.
inline void ask_for_rows(const void* first, int64_t rows, int64_t bytes, int64_t stride) {
  const char* p = static_cast<const char*>(first);
  for (int64_t r = 0; r < rows; ++r, p += stride) {
    for (int64_t i = 0; i < bytes; i += 64) ask_for(p + i);
  }
}

}  // namespace loraplex
