// Norms of single vectors, each in one pass over its values instead of five or ten.
#pragma once

#include <cmath>

#include "vectors.h"

namespace loraplex {

// out[t] = weight * round(x[t] / sqrt(mean(x[t]^2) + eps)); Gemma's: (1 + weight), rounded once.
template <typename T>
void rms_norm(const T* x, const T* weight, T* out, int64_t size, float eps, bool plus_one) {
  Floats squares = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats v = load(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < size; ++i) total = fused(float(x[i]), float(x[i]), total);
  const float factor = 1.0f / std::sqrt(total / size + eps);
  for (i = 0; i + kLanes <= size; i += kLanes) {
    Floats v = load(x + i) * factor;
    if (plus_one) {
      v = v * (load(weight + i) + 1.0f);
    } else {
      T rounded[kLanes];
      store(rounded, v);
      v = load(rounded) * load(weight + i);
    }
    store(out + i, v);
  }
  for (; i < size; ++i) {
    const float v = float(x[i]) * factor;
    out[i] = static_cast<T>(plus_one ? v * (1.0f + float(weight[i])) : float(static_cast<T>(v)) * float(weight[i]));
  }
}

// A root mean square norm, or one that takes the mean off before (LayerNorm). Vectors of several groups are normed group
// by group (a query's heads).
template <typename T>
struct Norm {
  const T* weight = nullptr;  // [size], or null: 1
  const T* bias = nullptr;    // [size], or null
  int64_t size = 0;           // values that are normed together; 0: there is no norm
  int64_t step = 0;           // from a group's weights to the next one's; 0: they have the same
  float eps = 0;
  bool centered = false, plus_one = false;  // plus_one: multiplies by 1 + weight

  bool exists() const { return size > 0; }

  void run(const T* x, T* out, int64_t group = 0) const {
    if (weight != nullptr && bias == nullptr && !centered) {
      return rms_norm(x, weight + group * step, out, size, eps, plus_one);
    }
    const float mean = centered ? total(x, 0, false) / size : 0;
    const float factor = 1.0f / std::sqrt(total(x, mean, true) / size + eps);
    const T *w = weight == nullptr ? nullptr : weight + group * step, *b = bias == nullptr ? nullptr : bias + group * step;
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      Floats v = (load(x + i) - mean) * factor;
      if (w != nullptr) v = v * weights(w + i);
      if (b != nullptr) v = v + load(b + i);
      store(out + i, v);
    }
    for (; i < size; ++i) {
      float v = (float(x[i]) - mean) * factor;
      if (w != nullptr) v = v * (plus_one ? float(static_cast<T>(float(w[i]) + 1.0f)) : float(w[i]));
      if (b != nullptr) v = v + float(b[i]);
      out[i] = static_cast<T>(v);
    }
  }

 private:
  Floats weights(const T* w) const {
    if (!plus_one) return load(w);
    T rounded[kLanes];  // as Nemotron does; Gemma's norms are not centered
    store(rounded, load(w) + 1.0f);
    return load(rounded);
  }

  // The sum of x - mean, or of its squares.
  float total(const T* x, float mean, bool squared) const {
    Floats sums = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
      const Floats v = load(x + i) - mean;
      sums += squared ? v * v : v;
    }
    float all = sum(sums);
    for (; i < size; ++i) {
      const float v = float(x[i]) - mean;
      all = squared ? fused(v, v, all) : all + v;
    }
    return all;
  }
};

}  // namespace loraplex
