// The gated multi-adapter sum for few tokens a segment (decoding):
//
//   y[t] += lora_b[slot]^T (gate[t] * scaling[slot] * lora_a[slot] x[t])
//
// Adapters keep their own ranks: a table holds a pointer to each slot's factors, so nothing is padded, stacked or
// copied, and each active adapter's bytes are read once. Two phases, each split over threads:
//   shrink  h = gate * scaling * lora_a x      over (segment, block of rank rows)
//   expand  y += h lora_b                      over output columns, so that no two threads write one value
// Sums are float32 whatever the weights are; a token's result never depends on its neighbours.
#pragma once

#include <algorithm>
#include <vector>

#include "linear.h"

namespace loraplex {

struct Segment {  // one adapter on the tokens [start, stop)
  int64_t start, stop;
  const void* lora_a;  // [rank, in]
  const void* lora_b;  // [rank, out]
  int64_t rank;
  float scaling;
  const float* gates;  // [stop - start]
  int64_t first_block;  // of rank rows, counted over all segments
  int64_t first_hidden;  // offset of this segment's h
};

constexpr int kRows = 8;  // rank rows that share one pass over x

// out[r] = dot(a[r], x) for up to kRows rows
template <typename T>
inline void dot_rows(const T* a, const T* x, int64_t in, int64_t rows, float* out) {
  float values[kLanes];
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) {
    store(values, dots<8, 1>(a + r * in, x, in));
    std::memcpy(out + r, values, 8 * sizeof(float));
  }
  for (; r + 4 <= rows; r += 4) {
    store(values, dots<4, 1>(a + r * in, x, in));
    std::memcpy(out + r, values, 4 * sizeof(float));
  }
  for (; r < rows; ++r) out[r] = dots<1, 1>(a + r * in, x, in)[0];
}

// h[t, row .. row+kRows) of one segment
template <typename T>
void shrink_block(const Segment& s, int64_t row, const T* x, int64_t in, float* hidden) {
  const int64_t rows = std::min<int64_t>(kRows, s.rank - row);
  const T* a = static_cast<const T*>(s.lora_a) + row * in;
  for (int64_t t = s.start; t < s.stop; ++t) {
    const float gate = s.gates[t - s.start] * s.scaling;
    float* h = hidden + s.first_hidden + (t - s.start) * s.rank + row;
    if (gate == 0) {  // a closed gate leaves the token as it is, whatever its activations are
      std::fill(h, h + rows, 0.0f);
      continue;
    }
    float values[kRows];
    dot_rows<T>(a, x + t * in, in, rows, values);
    for (int64_t r = 0; r < rows; ++r) h[r] = gate * values[r];
  }
}

template <typename T, int pairs>
inline void expand_pairs(const Segment& s, const float* h, int64_t column, T* y, int64_t out) {
  Pair<T> acc[pairs];
  for (int v = 0; v < pairs; ++v) acc[v] = load_pair(y + column + v * kPair);
  const T* b = static_cast<const T*>(s.lora_b) + column;
  for (int64_t r = 0; r < s.rank; ++r, b += out) {
    for (int v = 0; v < pairs; ++v) {
      const Pair<T> bv = load_pair(b + v * kPair);
      acc[v].first += h[r] * bv.first;
      acc[v].second += h[r] * bv.second;
    }
  }
  for (int v = 0; v < pairs; ++v) store(y + column + v * kPair, acc[v]);
}

// y[t, begin .. end) of every token of one segment
template <typename T>
void expand_columns(const Segment& s, int64_t begin, int64_t end, const float* hidden, T* y_all, int64_t out) {
  constexpr int kWide = 6;
  for (int64_t t = s.start; t < s.stop; ++t) {
    if (s.gates[t - s.start] * s.scaling == 0) continue;
    const float* h = hidden + s.first_hidden + (t - s.start) * s.rank;
    T* y = y_all + t * out;
    int64_t c = begin;
    for (; c + kWide * kPair <= end; c += kWide * kPair) expand_pairs<T, kWide>(s, h, c, y, out);
    for (; c + kPair <= end; c += kPair) expand_pairs<T, 1>(s, h, c, y, out);
    for (; c < end; ++c) {
      float value = float(y[c]);
      for (int64_t r = 0; r < s.rank; ++r) value += h[r] * float(static_cast<const T*>(s.lora_b)[r * out + c]);
      y[c] = static_cast<T>(value);
    }
  }
}

// What one module's adapters have to do for one batch.
struct Adapters {
  std::vector<Segment> segments;
  int64_t num_blocks = 0;  // of rank rows
  int64_t num_hidden = 0;  // floats of h

  void add(Segment segment) {
    segment.first_block = num_blocks;
    segment.first_hidden = num_hidden;
    num_blocks += (segment.rank + kRows - 1) / kRows;
    num_hidden += segment.rank * (segment.stop - segment.start);
    segments.push_back(segment);
  }

  template <typename T>
  void shrink(int64_t begin, int64_t end, const T* x, int64_t in, float* hidden) const {
    size_t i = 0;
    for (int64_t block = begin; block < end; ++block) {
      while (i + 1 < segments.size() && segments[i + 1].first_block <= block) ++i;
      const size_t next = i + 1 < segments.size() && segments[i + 1].first_block == block + 1 ? i + 1 : i;
      const int64_t next_row = next == i ? (block + 1 - segments[i].first_block) * kRows : 0;
      const int64_t rows = std::min<int64_t>(kRows, segments[next].rank - next_row);
      prefetch_rows(static_cast<const T*>(segments[next].lora_a) + next_row * in, 1, rows * in * sizeof(T), 0);
      shrink_block<T>(segments[i], (block - segments[i].first_block) * kRows, x, in, hidden);
    }
  }

  template <typename T>
  void expand(int64_t begin, int64_t end, const float* hidden, T* y, int64_t out) const {
    for (size_t i = 0; i < segments.size(); ++i) {
      if (i + 1 < segments.size()) {
        const Segment& next = segments[i + 1];
        prefetch_rows(static_cast<const T*>(next.lora_b) + begin, next.rank, (end - begin) * sizeof(T),
                      out * sizeof(T));
      }
      expand_columns<T>(segments[i], begin, end, hidden, y, out);
    }
  }
};

}  // namespace loraplex
