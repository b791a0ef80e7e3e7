// The base product for few tokens: y[t] = W x[t] + bias. The weights are read once for all tokens; sums are float32, in
// an order that depends on a token's own values only, so its result has the same bits in any batch.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace loraplex {

// Lane t * R + r of the result is dot(w[r], x[t]) for R rows of W and T tokens; R * T <= 16 sums, a power of two, stay
// in registers. `ahead` > 0 asks the memory for the values that lie so far behind those which are used.
template <int R, int T, typename S>
[[gnu::flatten]] inline Floats dots(const S* w, const S* x, int64_t in, int64_t ahead = 0) {
  Floats acc[R * T];
  each<R * T>([&](auto j) { acc[j] = Floats{}; });
  int64_t i = 0;
#ifdef __AVX512BF16__  // multiplies pairs of bfloat16 and adds them in float32
  if constexpr (std::is_same_v<S, c10::BFloat16>) {
    for (; i + 2 * kLanes <= in; i += 2 * kLanes) {
      __m512bh wv[R];
      each<R>([&](auto r) {
        if (ahead > 0) __builtin_prefetch(w + r * in + i + ahead, 0, 2);
        wv[r] = (__m512bh)_mm512_loadu_si512(w + r * in + i);
      });
      each<T>([&](auto t) {
        const __m512bh xv = (__m512bh)_mm512_loadu_si512(x + t * in + i);
        each<R>([&](auto r) { acc[t * R + r] = (Floats)_mm512_dpbf16_ps((__m512)acc[t * R + r], wv[r], xv); });
      });
    }
  }
#endif
  for (; i + kLanes <= in; i += kLanes) {
    Floats wv[R];
    each<R>([&](auto r) {
      if (ahead > 0) __builtin_prefetch(w + r * in + i + ahead, 0, 2);
      wv[r] = load(w + r * in + i);
    });
    each<T>([&](auto t) {
      const Floats xv = load(x + t * in + i);
      each<R>([&](auto r) { acc[t * R + r] += wv[r] * xv; });
    });
  }
  Floats totals = sums<R * T>(acc);
  for (; i < in; ++i) {
    for (int t = 0; t < T; ++t) {
      for (int r = 0; r < R; ++r) totals[t * R + r] += float(w[r * in + i]) * float(x[t * in + i]);
    }
  }
  return totals;
}

// The share of `thread` in `total` columns, in whole pairs of vectors.
inline int64_t share(int64_t total, int64_t thread, int64_t num_threads) {
  const int64_t pairs = (total + kPair - 1) / kPair;
  return std::min(total, pairs * thread / num_threads * kPair);
}

template <typename T>
struct Linear {
  const T* weight;  // [out, in]
  const T* bias;    // [out] or null
  const T* x;       // [tokens, in]
  T* y;             // [tokens, out]
  int64_t in, out, num_tokens;

  template <int R, int N>
  void tile(int64_t row, int64_t token, int64_t ahead) const {
    Floats values = dots<R, N>(weight + row * in, x + token * in, in, ahead);
    if (bias != nullptr) {
      for (int t = 0; t < N; ++t) {
        for (int r = 0; r < R; ++r) values[t * R + r] += float(bias[row + r]);
      }
    }
    T rounded[kLanes];
    store(rounded, values);
    for (int t = 0; t < N; ++t) std::memcpy(y + (token + t) * out + row, rounded + t * R, R * sizeof(T));
  }

  // The passes of kTokens over a block share the work of asking for the next one, so that memory is busy during all of
  // them; what remains of the tokens asks only if there is no such pass.
  template <int R, int N>
  void tiles(int64_t begin, int64_t end, int64_t token) const {
    const int64_t num_shares = std::max<int64_t>(1, num_tokens / kTokens), share = token / kTokens;
    const bool asks = share < num_shares && token % kTokens == 0;
    int64_t row = begin, i = 0;
    for (; row + R <= end; row += R, ++i) tile<R, N>(row, token, asks && i % num_shares == share ? kBlock * in : 0);
    for (; row < end; ++row) tile<1, N>(row, token, 0);
  }

  static constexpr int64_t kBlock = 16;  // weight rows that stay in the cache
  static constexpr int64_t kTokens = 8;  // tokens that share one pass over them

  // The output columns [begin, end) of all tokens.
  void columns(int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; row += kBlock) {
      const int64_t stop = std::min(row + kBlock, end);
      int64_t token = 0;
      for (; token + kTokens <= num_tokens; token += kTokens) tiles<2, kTokens>(row, stop, token);
      for (; token + 4 <= num_tokens; token += 4) tiles<4, 4>(row, stop, token);
      for (; token + 2 <= num_tokens; token += 2) tiles<8, 2>(row, stop, token);
      if (token < num_tokens) tiles<16, 1>(row, stop, token);
    }
  }
};

}  // namespace loraplex
