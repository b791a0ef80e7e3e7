// What stands between the linear modules of a block, each in one pass over its tokens instead of five or ten.
#pragma once

#include <cmath>

#include "attention.h"

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

// Rotary positions, in place: x[h] = x[h] * cos + (-x[h, half:], x[h, :half]) * sin, for `heads` heads of one token.
template <typename T>
void rotate(T* x, const T* cos, const T* sin, int64_t heads, int64_t size) {
  const int64_t half = size / 2;
  for (int64_t h = 0; h < heads; ++h, x += size) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
      const Floats low = load(x + i), high = load(x + half + i);
      store(x + i, low * load(cos + i) - high * load(sin + i));
      store(x + half + i, high * load(cos + half + i) + low * load(sin + half + i));
    }
    for (; i < half; ++i) {
      const float low = float(x[i]), high = float(x[half + i]);
      x[i] = static_cast<T>(low * float(cos[i]) - high * float(sin[i]));
      x[half + i] = static_cast<T>(high * float(cos[half + i]) + low * float(sin[half + i]));
    }
  }
}

// gate = silu(gate) * up, in place; silu(x) = x / (1 + e^-x), rounded before the product as torch does.
template <typename T>
void gated_silu(T* gate, const T* up, int64_t size) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats g = load(gate + i);
    const Floats negated = -g;
    T rounded[kLanes];
    store(rounded, g / (1.0f + exponential(negated > 87.0f ? negated * 0 + 87.0f : negated)));
    store(gate + i, load(rounded) * load(up + i));
  }
  for (; i < size; ++i) {
    const float g = float(gate[i]);
    gate[i] = static_cast<T>(float(static_cast<T>(g / (1.0f + std::exp(-g)))) * float(up[i]));
  }
}

}  // namespace loraplex
