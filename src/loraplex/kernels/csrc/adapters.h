// The gated multi-adapter sum, for decoding and for prompts:
//
//   y[t] += lora_b[slot]^T (gate[t] * scaling[slot] * lora_a[slot] x[t])
//
// Adapters keep their own ranks: a table holds a pointer to each slot's factors, so nothing is padded, stacked or
// copied, and each active adapter's bytes are read once. Two phases, each split over threads:
//   shrink  h = gate * scaling * lora_a x      over (segment, block of rank rows, chunk of tokens)
//   expand  y += h lora_b                      over output columns, so that no two threads write one value; or over
//                                              segments, where they are many and have no token in common
// Where a mixture's router gates its experts (router.h), a step between them does so, over tokens.
// Sums are float32 whatever the weights are, in an order that depends on a token's own values only: it has the same
// bits whether it runs beside other tokens or alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"
#include "router.h"

namespace loraplex {

struct Segment {  // one adapter on the tokens [start, stop)
  int64_t start, stop;
  const void* lora_a;  // [rank, in]
  const void* lora_b;  // [rank, out]
  int64_t rank;
  float scaling;
  const float* gates;  // [stop - start]
  int64_t first_unit;  // of shrink's work, counted over all segments
  int64_t first_cost;  // of all units before it
  int64_t first_hidden;  // offset of this segment's h
};

constexpr int kRows = 8;     // rank rows that share one pass over x
constexpr int kChunk = 32;   // tokens whose x stays in the cache meanwhile
constexpr int kTokens = 4;   // that share what is read of lora_a or lora_b
constexpr int kReading = 4;  // tokens whose arithmetic takes as long as reading the row of lora_a: threads share by it

inline float gate_of(const Segment& s, int64_t token) { return s.gates[token - s.start] * s.scaling; }

// A closed gate leaves the token as it is, whatever its activations are.
inline bool all_open(const Segment& s, int64_t token, int64_t count) {
  for (int64_t t = token; t < token + count; ++t) {
    if (gate_of(s, t) == 0) return false;
  }
  return true;
}

// out[t * stride + r] = gate[t] * dot(a[r], x[t]) for up to kRows rows and N tokens
template <int N, typename T>
inline void shrink_rows(const Segment& s, int64_t token, const T* a, const T* x, int64_t in, int64_t rows, float* out,
                        int64_t stride) {
  float values[kLanes];
  const auto keep = [&](int64_t r, int count, Floats sums) {
    store(values, sums);
    for (int t = 0; t < N; ++t) {
      const float gate = gate_of(s, token + t);
      for (int i = 0; i < count; ++i) out[t * stride + r + i] = gate * values[t * count + i];
    }
  };
  constexpr int wide = N == 1 ? 8 : 4;
  int64_t r = 0;
  for (; r + wide <= rows; r += wide) keep(r, wide, dots<wide, N, false>(a + r * in, in, x + token * in, in));
  if constexpr (wide == 8) {
    for (; r + 4 <= rows; r += 4) keep(r, 4, dots<4, N, false>(a + r * in, in, x + token * in, in));
  }
  for (; r < rows; ++r) keep(r, 1, dots<1, N, false>(a + r * in, in, x + token * in, in));
}

// h[t, row .. row+kRows) of the tokens [begin, end) of one segment
template <typename T>
void shrink_block(const Segment& s, int64_t row, int64_t begin, int64_t end, const T* x, int64_t in, float* hidden) {
  const int64_t rows = std::min<int64_t>(kRows, s.rank - row);
  const T* a = static_cast<const T*>(s.lora_a) + row * in;
  for (int64_t t = begin; t < end;) {
    float* h = hidden + s.first_hidden + (t - s.start) * s.rank + row;
    if (t + kTokens <= end && all_open(s, t, kTokens)) {
      shrink_rows<kTokens>(s, t, a, x, in, rows, h, s.rank);
      t += kTokens;
      continue;
    }
    if (gate_of(s, t) == 0) {
      std::fill(h, h + rows, 0.0f);
    } else {
      shrink_rows<1>(s, t, a, x, in, rows, h, s.rank);
    }
    ++t;
  }
}

// y[t, column .. + pairs * kPair) of N tokens; h of token t lies at h + t * rank
template <int N, int pairs, typename T, typename O>
inline void expand_pairs(const Segment& s, const float* h, int64_t column, O* y, int64_t out) {
  Pair<T> acc[N][pairs];
  for (int t = 0; t < N; ++t) {
    for (int v = 0; v < pairs; ++v) acc[t][v] = load_pair_like<T>(y + t * out + column + v * kPair);
  }
  const T* b = static_cast<const T*>(s.lora_b) + column;
  for (int64_t r = 0; r < s.rank; ++r, b += out) {
    for (int v = 0; v < pairs; ++v) {
      const Pair<T> bv = load_pair(b + v * kPair);
      for (int t = 0; t < N; ++t) {
        acc[t][v].first += h[t * s.rank + r] * bv.first;
        acc[t][v].second += h[t * s.rank + r] * bv.second;
      }
    }
  }
  for (int t = 0; t < N; ++t) {
    for (int v = 0; v < pairs; ++v) store(y + t * out + column + v * kPair, acc[t][v]);
  }
}

// y[t, begin .. end) of N tokens
template <int N, int wide, typename T, typename O>
void expand_tokens(const Segment& s, int64_t begin, int64_t end, const float* h, O* y, int64_t out) {
  int64_t c = begin;
  for (; c + wide * kPair <= end; c += wide * kPair) expand_pairs<N, wide, T>(s, h, c, y, out);
  for (; c + kPair <= end; c += kPair) expand_pairs<N, 1, T>(s, h, c, y, out);
  for (; c < end; ++c) {
    for (int t = 0; t < N; ++t) {
      float value = float(y[t * out + c]);
      for (int64_t r = 0; r < s.rank; ++r) {
        value = fused(h[t * s.rank + r], float(static_cast<const T*>(s.lora_b)[r * out + c]), value);
      }
      y[t * out + c] = static_cast<O>(value);
    }
  }
}

// y[t, begin .. end) of every token of one segment
template <typename T, typename O>
void expand_columns(const Segment& s, int64_t begin, int64_t end, const float* hidden, O* y, int64_t out) {
  for (int64_t t = s.start; t < s.stop;) {
    const float* h = hidden + s.first_hidden + (t - s.start) * s.rank;
    if (t + kTokens <= s.stop && all_open(s, t, kTokens)) {
      expand_tokens<kTokens, 3, T>(s, begin, end, h, y + t * out, out);
      t += kTokens;
      continue;
    }
    if (gate_of(s, t) != 0) expand_tokens<1, 6, T>(s, begin, end, h, y + t * out, out);
    ++t;
  }
}

// What one module's adapters have to do for one batch.
struct Adapters {
  std::vector<Segment> segments;
  std::vector<RouteGroup> routes;  // of experts among the segments, whose own gates are 1
  int64_t num_units = 0;   // blocks of rank rows for chunks of tokens
  int64_t cost = 0;        // of all units
  int64_t largest_cost = 0;  // of one segment's
  int64_t last_stop = 0;
  bool are_disjoint = true;  // each token is in one segment at most
  int64_t num_hidden = 0;  // floats of h

  static int64_t num_chunks(const Segment& s) { return (s.stop - s.start + kChunk - 1) / kChunk; }

  void add(Segment segment) {
    segment.first_unit = num_units;
    segment.first_cost = cost;
    segment.first_hidden = num_hidden;
    num_units += (segment.rank + kRows - 1) / kRows * num_chunks(segment);
    const int64_t own = segment.rank * (segment.stop - segment.start + kReading);
    cost += own;
    largest_cost = std::max(largest_cost, own);
    are_disjoint = are_disjoint && segment.start >= last_stop;
    last_stop = segment.stop;
    num_hidden += segment.rank * (segment.stop - segment.start);
    segments.push_back(segment);
  }

  // Where thread i of n begins, so that all have as much to do.
  int64_t first_unit(int64_t i, int64_t n) const {
    const int64_t before = cost * i / n;
    for (size_t k = 0; k < segments.size(); ++k) {
      const bool is_last = k + 1 == segments.size();
      const int64_t stop = is_last ? cost : segments[k + 1].first_cost;
      if (before >= stop) continue;
      const Segment& s = segments[k];
      const int64_t units = (is_last ? num_units : segments[k + 1].first_unit) - s.first_unit;
      return s.first_unit + units * (before - s.first_cost) / (stop - s.first_cost);
    }
    return num_units;
  }

  template <typename T>
  void shrink(int64_t begin, int64_t end, const T* x, int64_t in, float* hidden, Ahead& ahead) const {
    size_t i = 0;
    for (int64_t unit = begin; unit < end; ++unit) {
      while (i + 1 < segments.size() && segments[i + 1].first_unit <= unit) ++i;
      const Segment& s = segments[i];
      const int64_t chunks = num_chunks(s), block = (unit - s.first_unit) / chunks, chunk = (unit - s.first_unit) % chunks;
      if (chunk == 0 || unit == begin) ahead.ask_bytes(kRows * in * sizeof(T));
      const int64_t first = s.start + chunk * kChunk;
      shrink_block<T>(s, block * kRows, first, std::min(first + kChunk, s.stop), x, in, hidden);
    }
  }

  // Thread i of n gates its share of the routed tokens; x [tokens, in] is what `shrink` read.
  template <typename T>
  void route(int64_t i, int64_t n, const T* x, int64_t in, float* hidden) const {
    thread_local std::vector<float> gates;
    thread_local std::vector<int> order;
    int64_t total = 0, before = 0;
    for (const RouteGroup& group : routes) total += group.stop - group.start;
    const int64_t begin = total * i / n, end = total * (i + 1) / n;
    for (const RouteGroup& group : routes) {
      const int64_t count = group.stop - group.start;
      for (int64_t t = std::max(begin - before, int64_t{0}); t < std::min(end - before, count); ++t) {
        group.run(group.start + t, x + (group.start + t) * in, in, hidden, gates, order);
      }
      before += count;
    }
  }

  // What `shrink` will read for the same units.
  template <typename T>
  void add_shrink_to(Ahead& ahead, int64_t begin, int64_t end, int64_t in) const {
    for (const Segment& s : segments) {
      const int64_t chunks = num_chunks(s), first = std::max<int64_t>(begin - s.first_unit, 0) / chunks * kRows;
      const int64_t stop = std::min((std::max<int64_t>(end - s.first_unit, 0) + chunks - 1) / chunks * kRows, s.rank);
      const int64_t stride = in * sizeof(T);
      if (first < stop) ahead.add(static_cast<const T*>(s.lora_a) + first * in, stop - first, stride, stride);
    }
  }

  // Whether n threads share out segments in `expand`: then one reads all of a lora_b, which is a stream. Parts of its
  // rows are none, and reading them takes longer.
  bool splits_segments(int64_t n) const { return n > 1 && are_disjoint && 2 * n * largest_cost <= cost; }

  // run(segment, first column, last) for what thread i of n expands of a module with `out` columns.
  template <typename F>
  void each_expanded(int64_t i, int64_t n, int64_t out, const F& run) const {
    const bool splits = splits_segments(n);
    const int64_t begin = splits ? 0 : share(out, i, n), end = splits ? out : share(out, i + 1, n);
    for (const Segment& s : segments) {
      if (!splits || (s.first_cost >= cost * i / n && s.first_cost < cost * (i + 1) / n)) run(s, begin, end);
    }
  }

  // Thread i of n; others may write the same tokens' values, so all wait before those are used.
  template <typename T, typename O>
  void expand(int64_t i, int64_t n, const float* hidden, O* y, int64_t out, Ahead& ahead) const {
    each_expanded(i, n, out, [&](const Segment& s, int64_t begin, int64_t end) {
      ahead.ask_bytes(s.rank * (end - begin) * sizeof(T));
      expand_columns<T>(s, begin, end, hidden, y, out);
    });
  }

  // What `expand` will read for the same thread.
  template <typename T>
  void add_expand_to(Ahead& ahead, int64_t i, int64_t n, int64_t out) const {
    each_expanded(i, n, out, [&](const Segment& s, int64_t begin, int64_t end) {
      ahead.add(static_cast<const T*>(s.lora_b) + begin, s.rank, (end - begin) * sizeof(T), out * sizeof(T));
    });
  }
};

}  // namespace loraplex
