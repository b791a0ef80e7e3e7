// The base product for few tokens: y[t] = W x[t] + bias. The weights are read once for all tokens; sums are float32, in
// an order that depends on a token's own values only, so its result has the same bits in any batch.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "ahead.h"

namespace loraplex {

// In bytes: what is read of a row at once, and of a row before the next tokens get their turn, so that the weights and
// tokens of one turn stay in the first cache; the same for every machine, since it decides the order of sums.
constexpr int64_t kStepBytes = 64, kDepthBytes = 2048;

template <typename T>
constexpr int64_t kStep = kStepBytes / sizeof(T);

// A vector in a register: where it is used more than once, the compiler would rather read it again each time.
inline Floats kept(Floats v) {
#ifdef __AVX512F__
  asm("" : "+v"(v));
#endif
  return v;
}

// acc[t * R + r] += w[r][i] * x[t][i] for one step of i, lane by lane.
template <int R, int T, typename S, typename W, typename X>
[[gnu::always_inline]] inline void multiply_step(Floats* acc, const W& w, const X& x) {
#ifdef __AVX512BF16__  // multiplies pairs of bfloat16 and adds them in float32
  if constexpr (std::is_same_v<S, c10::BFloat16>) {
    Floats wv[R];
    each<R>([&](auto r) { wv[r] = kept(load(reinterpret_cast<const float*>(w(r)))); });
    each<T>([&](auto t) {
      const __m512bh xv = (__m512bh)kept(load(reinterpret_cast<const float*>(x(t))));
      each<R>([&](auto r) { acc[t * R + r] = (Floats)_mm512_dpbf16_ps((__m512)acc[t * R + r], (__m512bh)wv[r], xv); });
    });
    return;
  }
#endif
  each<kStep<S> / kLanes>([&](auto part) {
    Floats wv[R];
    each<R>([&](auto r) { wv[r] = kept(load(w(r) + part * kLanes)); });
    each<T>([&](auto t) {
      const Floats xv = kept(load(x(t) + part * kLanes));
      each<R>([&](auto r) { acc[t * R + r] += wv[r] * xv; });
    });
  });
}

// Lane t * R + r of the result is dot(w[r], x[t]) for R rows of W, `stride` apart, and T tokens; R * T <= 16 sums, a
// power of two, stay in registers. Packed tokens lie as `packed` leaves them, others follow each other. `ahead` > 0
// asks the memory for the weights that lie so far behind those which are used.
template <int R, int T, bool are_packed, typename S>
[[gnu::flatten]] inline Floats dots(const S* w, int64_t stride, const S* x, int64_t in, int64_t ahead = 0) {
  constexpr int64_t step = kStep<S>;
  Floats acc[R * T];
  each<R * T>([&](auto j) { acc[j] = Floats{}; });
  int64_t i = 0;
  for (; i + step <= in; i += step) {
    if (ahead > 0) each<R>([&](auto r) { ask_for(w + r * stride + i + ahead); });
    multiply_step<R, T, S>(
        acc, [&](auto r) { return w + r * stride + i; },
        [&](auto t) { return are_packed ? x + i * T + t * step : x + t * in + i; });
  }
  Floats totals = sums<R * T>(acc);
  const S* rest = are_packed ? x + i * T : x + i;
  const int64_t rest_stride = are_packed ? in - i : in;
  for (int64_t j = i; j < in; ++j) {
    for (int t = 0; t < T; ++t) {
      const float value = float(rest[t * rest_stride + j - i]);
      for (int r = 0; r < R; ++r) totals[t * R + r] = fused(float(w[r * stride + j]), value, totals[t * R + r]);
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
constexpr int kTogether = sizeof(T) == 4 ? 8 : 4;  // tokens that share what is read of the weights

// Splits tokens into groups of kTogether, and at the end of 4, 2 and 1: run(first token, its number as a constant).
template <typename T, typename F>
[[gnu::always_inline]] inline void each_group(int64_t num_tokens, const F& run) {
  int64_t token = 0;
  for (; token + kTogether<T> <= num_tokens; token += kTogether<T>) run(token, std::integral_constant<int, kTogether<T>>{});
  if (kTogether<T> > 4 && token + 4 <= num_tokens) {
    run(token, std::integral_constant<int, 4>{});
    token += 4;
  }
  if (token + 2 <= num_tokens) {
    run(token, std::integral_constant<int, 2>{});
    token += 2;
  }
  if (token < num_tokens) run(token, std::integral_constant<int, 1>{});
}

// x [tokens, in] with each group's tokens side by side, a step of every one in turn: they are read as one stream, whose
// parts never fall onto the same few places of the cache as rows of 4096 bytes do. Valid until the thread packs again.
template <typename T>
const T* packed(const T* x, int64_t in, int64_t num_tokens) {
  if (num_tokens == 1) return x;
  thread_local std::vector<T> buffer;
  if (static_cast<int64_t>(buffer.size()) < in * num_tokens) buffer.resize(in * num_tokens);
  each_group<T>(num_tokens, [&](int64_t token, auto count) {
    T* target = buffer.data() + token * in;
    const T* source = x + token * in;
    int64_t i = 0;
    for (; i + kStep<T> <= in; i += kStep<T>) {
      for (int t = 0; t < count; ++t, target += kStep<T>) std::memcpy(target, source + t * in + i, kStepBytes);
    }
    for (int t = 0; t < count; ++t, target += in - i) std::memcpy(target, source + t * in + i, (in - i) * sizeof(T));
  });
  return buffer.data();
}

template <typename T, typename O = T>  // O float: the sums as they are, not rounded to T
struct Linear {
  const T* weight;  // [out, in]
  const T* bias;    // [out] or null
  const T* x;       // [tokens, in]
  O* y;             // [tokens, out]
  int64_t in, out, num_tokens;

  static constexpr int64_t kBlock = 16;  // weight rows that stay in the cache
  static constexpr int64_t kDepth = kDepthBytes / sizeof(T);

  // A part of every row, and where the sums of its tiles are kept until the next part.
  struct Part {
    const T* x;  // packed
    int64_t first, count;
    float* sums;
    int64_t token_sums;  // floats that a token's sums take
    bool begins, ends;
    int64_t portions;  // that each tile asks for
  };

  template <int R, int N>
  void tile(const Part& part, int64_t row, int64_t token, float* sums, int64_t ahead) const {
    const T* together = part.x + token * in + part.first * N;
    Floats values = dots<R, N, true>(weight + row * in + part.first, in, together, part.count, ahead);
    if (!part.begins) values += load(sums);
    if (!part.ends) return store(sums, values);
    if (bias != nullptr) {
      for (int t = 0; t < N; ++t) {
        for (int r = 0; r < R; ++r) values[t * R + r] += float(bias[row + r]);
      }
    }
    O rounded[kLanes];
    store(rounded, values);
    for (int t = 0; t < N; ++t) std::memcpy(y + (token + t) * out + row, rounded + t * R, R * sizeof(O));
  }

  // The passes of all groups over a block share the work of asking for the next one, so that memory is busy during all
  // of them; what remains of the tokens asks only if there is no whole group.
  template <int N>
  void tiles(const Part& part, int64_t begin, int64_t end, int64_t token, Ahead& ahead) const {
    constexpr int R = kLanes / N;
    const int64_t num_shares = std::max<int64_t>(1, num_tokens / kTogether<T>), share = token / kTogether<T>;
    const bool asks = share < num_shares && token % kTogether<T> == 0;
    float* sums = part.sums + token * part.token_sums;
    int64_t row = begin, i = 0;
    for (; row + R <= end; row += R, ++i, sums += kLanes) {
      tile<R, N>(part, row, token, sums, asks && i % num_shares == share ? kBlock * in : 0);
      ahead.ask(part.portions);
    }
    for (; row < end; ++row, sums += kLanes) tile<1, N>(part, row, token, sums, 0);
  }

  int64_t num_parts() const { return std::max<int64_t>(1, (in + kDepth - 1) / kDepth); }

  // That ask for what lies ahead, over the columns [begin, end): N tokens take N tiles of a block, whatever N is.
  int64_t num_turns(int64_t begin, int64_t end) const { return (end - begin) / kBlock * num_parts() * num_tokens; }

  // The output columns [begin, end) of all tokens, while `ahead` is asked for.
  void product(int64_t begin, int64_t end, Ahead& ahead) const {
    columns(begin, end, ahead, ahead.share(num_turns(begin, end)));
  }

  // The output columns [begin, end) of all tokens. Each tile asks for `portions` of what lies ahead.
  void columns(int64_t begin, int64_t end, Ahead& ahead, int64_t portions) const {
    const T* packed_x = packed(x, in, num_tokens);
    thread_local std::vector<float> buffer;
    const int64_t num_parts = this->num_parts();
    const int64_t depth = ((in + num_parts - 1) / num_parts + kStep<T> - 1) / kStep<T> * kStep<T>;
    for (int64_t row = begin; row < end; row += kBlock) {
      const int64_t stop = std::min(row + kBlock, end);
      const int64_t token_sums = stop - row == kBlock ? kBlock : kBlock * kLanes;  // then there are tiles of one row
      if (static_cast<int64_t>(buffer.size()) < num_tokens * token_sums) buffer.resize(num_tokens * token_sums);
      int64_t first = 0;
      do {
        const int64_t count = std::min(depth, in - first);
        const Part part{packed_x, first, count, buffer.data(), token_sums, first == 0, first + count == in, portions};
        each_group<T>(num_tokens, [&](int64_t token, auto size) { tiles<size>(part, row, stop, token, ahead); });
        first += count;
      } while (first < in);
    }
  }
};

}  // namespace loraplex
