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

#include "vectors.h"

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

constexpr int kRows = 4;  // rank rows that share one pass over x
constexpr int64_t kSmallWork = 8192;  // multiply-adds below which one thread does it all

template <typename T, int rows>
inline void dot_rows(const T* a, const T* x, int64_t in, float* out) {
  Floats acc[rows] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    Floats xv = load(x + i);
    for (int r = 0; r < rows; ++r) acc[r] += load(a + r * in + i) * xv;
  }
  for (int r = 0; r < rows; ++r) {
    float tail = 0;
    for (int64_t j = i; j < in; ++j) tail += float(a[r * in + j]) * float(x[j]);
    out[r] = sum(acc[r]) + tail;
  }
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
    float dots[kRows];
    if (rows == kRows) {
      dot_rows<T, kRows>(a, x + t * in, in, dots);
    } else {
      for (int64_t r = 0; r < rows; ++r) dot_rows<T, 1>(a + r * in, x + t * in, in, dots + r);
    }
    for (int64_t r = 0; r < rows; ++r) h[r] = gate * dots[r];
  }
}

template <typename T, int vectors>
inline void expand_vectors(const Segment& s, const float* h, int64_t column, T* y, int64_t out) {
  Floats acc[vectors];
  for (int v = 0; v < vectors; ++v) acc[v] = load(y + column + v * kLanes);
  const T* b = static_cast<const T*>(s.lora_b) + column;
  for (int64_t r = 0; r < s.rank; ++r, b += out) {
    for (int v = 0; v < vectors; ++v) acc[v] += h[r] * load(b + v * kLanes);
  }
  for (int v = 0; v < vectors; ++v) store(y + column + v * kLanes, acc[v]);
}

// y[t, begin .. end) of every token of one segment
template <typename T>
void expand_columns(const Segment& s, int64_t begin, int64_t end, const float* hidden, T* y_all, int64_t out) {
  constexpr int kWide = 8;
  for (int64_t t = s.start; t < s.stop; ++t) {
    if (s.gates[t - s.start] * s.scaling == 0) continue;
    const float* h = hidden + s.first_hidden + (t - s.start) * s.rank;
    T* y = y_all + t * out;
    int64_t c = begin;
    for (; c + kWide * kLanes <= end; c += kWide * kLanes) expand_vectors<T, kWide>(s, h, c, y, out);
    for (; c + kLanes <= end; c += kLanes) expand_vectors<T, 1>(s, h, c, y, out);
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
