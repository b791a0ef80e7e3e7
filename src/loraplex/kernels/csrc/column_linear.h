// The base product for few tokens with a weight that lies input by input (GPT-2's Conv1D): y[t] = x[t] W + bias. The
// weights are read once for a group of tokens; sums are float32, over a token's values in their order.
#pragma once

#include "linear.h"

namespace loraplex {

template <typename T>
struct ColumnLinear {
  const T* weight;  // [in, out]
  const T* bias;    // [out] or null
  const T* x;       // [tokens, in]
  T* y;             // [tokens, out]
  int64_t in, out, num_tokens;

  static constexpr int64_t kWide = 4;    // vectors of columns that a token's sums take
  static constexpr int64_t kAhead = 16;  // rows of the weight that are asked for: 4 kB of a tile's columns

  int64_t num_turns(int64_t begin, int64_t end) const {
    return (end - begin) / (kWide * kLanes) * std::max<int64_t>(1, num_tokens / 4);
  }

  // The output columns [begin, end) of all tokens. Each tile asks for `portions` of what lies ahead.
  void columns(int64_t begin, int64_t end, Ahead& ahead, int64_t portions) const {
    int64_t c = begin;
    for (; c + kWide * kLanes <= end; c += kWide * kLanes) all_tokens<kWide>(c, ahead, portions);
    for (; c + kLanes <= end; c += kLanes) all_tokens<1>(c, ahead, 0);
    for (; c < end; ++c) {
      for (int64_t t = 0; t < num_tokens; ++t) {
        float total = bias == nullptr ? 0 : float(bias[c]);
        for (int64_t i = 0; i < in; ++i) total = fused(float(weight[i * out + c]), float(x[t * in + i]), total);
        y[t * out + c] = static_cast<T>(total);
      }
    }
  }

 private:
  template <int wide>
  void all_tokens(int64_t column, Ahead& ahead, int64_t portions) const {
    int64_t token = 0;
    for (; token + 4 <= num_tokens; token += 4) {
      tile<4, wide>(token, column);
      ahead.ask(portions);
    }
    for (; token < num_tokens; ++token) tile<1, wide>(token, column);
  }

  template <int N, int wide>
  void tile(int64_t token, int64_t column) const {
    Floats acc[N * wide];
    each<N * wide>([&](auto j) { acc[j] = bias == nullptr ? Floats{} : load(bias + column + j % wide * kLanes); });
    const T* w = weight + column;
    for (int64_t i = 0; i < in; ++i, w += out) {
      if (token == 0 && i + kAhead < in) ask_for(w + kAhead * out);
      Floats rows[wide];
      each<wide>([&](auto v) { rows[v] = load(w + v * kLanes); });
      each<N>([&](auto t) {
        const float value = float(x[(token + t) * in + i]);
        each<wide>([&](auto v) { acc[t * wide + v] += rows[v] * value; });
      });
    }
    each<N * wide>([&](auto j) { store(y + (token + j / wide) * out + column + j % wide * kLanes, acc[j]); });
  }
};

}  // namespace loraplex
