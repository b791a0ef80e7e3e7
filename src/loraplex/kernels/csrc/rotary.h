// Rotary positions (arXiv 2104.09864): pairs of a head's values are turned by an angle that depends on the position.
#pragma once

#include "vectors.h"

namespace loraplex {

// In place: x[h] = x[h] * cos + (-x[h, half:], x[h, :half]) * sin, for `heads` heads of one token.
template <typename T, typename C>
void rotate(T* x, const C* cos, const C* sin, int64_t heads, int64_t size) {
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

// Which values are a pair, and where its cosine lies: values of both halves, with a cosine for each value (Llama);
// neighbours, with a cosine for each value (Cohere); neighbours, with the cosines of all pairs in the first half of the
// table (GLM); values of both halves, with a cosine for each pair and no others (gpt-oss).
enum class Rotary { kNone, kHalves, kPairs, kPairsOfHalf, kNarrowHalves };

// The same with a cosine for each pair: cos, sin [half].
template <typename T, typename C>
void rotate_narrow(T* x, const C* cos, const C* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float low = float(x[i]), high = float(x[half + i]), c = float(cos[i]), s = float(sin[i]);
    x[i] = static_cast<T>(fused(low, c, -high * s));
    x[half + i] = static_cast<T>(fused(high, c, low * s));
  }
}

// The same for neighbours that are a pair. Cosine i / step is that of value i.
template <typename T, typename C>
void rotate_pairs(T* x, const C* cos, const C* sin, int64_t size, int64_t step) {
  for (int64_t i = 0; i < size; i += 2) {
    const float first = float(x[i]), second = float(x[i + 1]);
    const int64_t a = i / step, b = (i + 1) / step;
    x[i] = static_cast<T>(fused(first, float(cos[a]), -second * float(sin[a])));
    x[i + 1] = static_cast<T>(fused(second, float(cos[b]), first * float(sin[b])));
  }
}

// The first values of one head, by a token's cosines and sines [size].
template <typename T, typename C>
void rotate_head(Rotary rotary, T* x, const C* cos, const C* sin, int64_t size) {
  switch (rotary) {
    case Rotary::kNone: return;
    case Rotary::kHalves: return rotate(x, cos, sin, 1, size);
    case Rotary::kPairs: return rotate_pairs(x, cos, sin, size, 1);
    case Rotary::kPairsOfHalf: return rotate_pairs(x, cos, sin, size, 2);
    case Rotary::kNarrowHalves: return rotate_narrow(x, cos, sin, size);
  }
}

}  // namespace loraplex
