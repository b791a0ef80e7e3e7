// The base product for few tokens: y[t] = W x[t] + bias. The weights are read once for all tokens; sums are float32, in
// an order that depends on a token's own values only, so its result has the same bits in any batch.
#pragma once

#include <algorithm>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace loraplex {

// Lane t * R + r of the result is dot(w[r], x[t]) for R rows of W and T tokens; R * T <= 16 sums stay in registers.
template <int R, int T>
inline Floats dots(const float* w, const float* x, int64_t in) {
  Floats acc[16] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    Floats xv[T];
    for (int t = 0; t < T; ++t) xv[t] = load(x + t * in + i);
    for (int r = 0; r < R; ++r) {
      const Floats wv = load(w + r * in + i);
      for (int t = 0; t < T; ++t) acc[t * R + r] += wv * xv[t];
    }
  }
  Floats totals = sums(acc);
  for (; i < in; ++i) {
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) totals[t * R + r] += w[r * in + i] * x[t * in + i];
    }
  }
  return totals;
}

template <int R, int T>
inline Floats dots(const c10::BFloat16* w, const c10::BFloat16* x, int64_t in) {
  Floats acc[16] = {};
  int64_t i = 0;
#ifdef __AVX512BF16__  // multiplies pairs of bfloat16 and adds them in float32
  __m512 pairs[16];
  for (int j = 0; j < 16; ++j) pairs[j] = _mm512_setzero_ps();
  for (; i + 2 * kLanes <= in; i += 2 * kLanes) {
    __m512bh xv[T];
    for (int t = 0; t < T; ++t) xv[t] = (__m512bh)_mm512_loadu_si512(x + t * in + i);
    for (int r = 0; r < R; ++r) {
      const __m512bh wv = (__m512bh)_mm512_loadu_si512(w + r * in + i);
      for (int t = 0; t < T; ++t) pairs[t * R + r] = _mm512_dpbf16_ps(pairs[t * R + r], wv, xv[t]);
    }
  }
  for (int j = 0; j < 16; ++j) std::memcpy(&acc[j], &pairs[j], sizeof(Floats));
#endif
  for (; i + kLanes <= in; i += kLanes) {
    for (int r = 0; r < R; ++r) {
      const Floats wv = load(w + r * in + i);
      for (int t = 0; t < T; ++t) acc[t * R + r] += wv * load(x + t * in + i);
    }
  }
  Floats totals = sums(acc);
  for (; i < in; ++i) {
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) totals[t * R + r] += float(w[r * in + i]) * float(x[t * in + i]);
    }
  }
  return totals;
}

template <typename T>
struct Linear {
  const T* weight;  // [out, in]
  const T* bias;    // [out] or null
  const T* x;       // [tokens, in]
  T* y;             // [tokens, out]
  int64_t in, out, num_tokens;

  template <int R, int N>
  void tile(int64_t row, int64_t token) const {
    Floats values = dots<R, N>(weight + row * in, x + token * in, in);
    if (bias != nullptr) {
      for (int t = 0; t < N; ++t) {
        for (int r = 0; r < R; ++r) values[t * R + r] += float(bias[row + r]);
      }
    }
    T rounded[kLanes];
    store(rounded, values);
    for (int t = 0; t < N; ++t) std::memcpy(y + (token + t) * out + row, rounded + t * R, R * sizeof(T));
  }

  template <int R, int N>
  void tiles(int64_t begin, int64_t end, int64_t token) const {
    int64_t row = begin;
    for (; row + R <= end; row += R) tile<R, N>(row, token);
    for (; row < end; ++row) tile<1, N>(row, token);
  }

  // The output columns [begin, end) of all tokens, in blocks of weight rows that stay in the cache.
  void columns(int64_t begin, int64_t end) const {
    constexpr int64_t kBlock = 16;
    for (int64_t row = begin; row < end; row += kBlock) {
      const int64_t stop = std::min(row + kBlock, end);
      int64_t token = 0;
      for (; token + 4 <= num_tokens; token += 4) tiles<4, 4>(row, stop, token);
      for (; token + 2 <= num_tokens; token += 2) tiles<8, 2>(row, stop, token);
      if (token < num_tokens) tiles<16, 1>(row, stop, token);
    }
  }
};

}  // namespace loraplex
