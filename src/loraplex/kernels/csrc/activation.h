// Activations of feed-forward modules, gated or not, each in one pass over its values.
#pragma once

#include <cmath>
#include <cstring>

#include "attention.h"

namespace loraplex {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu, kSquaredRelu };

// e^-x where that is a float32, and else the largest power that is one.
inline Floats exponential_of_negative(Floats x) {
  const Floats negated = -x;
  return exponential(negated > 87.0f ? negated * 0 + 87.0f : negated);
}

// P(X > z) of a normal X, z >= 0: 7.1.26 of Abramowitz and Stegun, off by less than 1e-7.
inline Floats upper_tail(Floats z) {
  const Floats scaled = z * 0.70710678118654752f;
  const Floats t = 1.0f / (1.0f + scaled * 0.3275911f);
  Floats p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  return p * t * 0.5f * exponential(-scaled * scaled);
}

template <Activation kind>
inline Floats activated(Floats x) {
  if constexpr (kind == Activation::kSilu) return x / (1.0f + exponential_of_negative(x));
  if constexpr (kind == Activation::kGelu) {
    const Floats tail = upper_tail(x < 0 ? -x : x);
    return x * (x < 0 ? tail : 1.0f - tail);
  }
  if constexpr (kind == Activation::kGeluTanh) {  // (1 + tanh(u)) / 2 = 1 / (1 + e^-2u)
    const Floats u = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
    return x / (1.0f + exponential_of_negative(2.0f * u));
  }
  const Floats zero = {}, positive = x > zero ? x : zero;
  return kind == Activation::kSquaredRelu ? positive * positive : positive;
}

// Each vector alike, also what is left over at the end: a value has the same bits wherever it stands.
template <Activation kind, bool is_gated, typename T>
void activate(const T* gate, const T* up, T* out, int64_t size) {
  const auto run = [](const T* g, const T* u, T* o) {
    const Floats v = activated<kind>(load(g));
    if constexpr (!is_gated) return store(o, v);
    T rounded[kLanes];  // before the product, as torch does
    store(rounded, v);
    store(o, load(rounded) * load(u));
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) run(gate + i, is_gated ? up + i : nullptr, out + i);
  if (i == size) return;
  T rest[3][kLanes] = {};
  std::memcpy(rest[0], gate + i, (size - i) * sizeof(T));
  if (is_gated) std::memcpy(rest[1], up + i, (size - i) * sizeof(T));
  run(rest[0], rest[1], rest[2]);
  std::memcpy(out + i, rest[2], (size - i) * sizeof(T));
}

// out = act(gate) * up, or act(gate) where up is null; out may be gate.
template <typename T>
void activate(Activation kind, const T* gate, const T* up, T* out, int64_t size) {
  const auto run = [&](auto known) {
    constexpr Activation activation = static_cast<Activation>(known.value);
    return up == nullptr ? activate<activation, false>(gate, up, out, size)
                         : activate<activation, true>(gate, up, out, size);
  };
  switch (kind) {
    case Activation::kSilu: return run(std::integral_constant<int, 0>{});
    case Activation::kGelu: return run(std::integral_constant<int, 1>{});
    case Activation::kGeluTanh: return run(std::integral_constant<int, 2>{});
    case Activation::kRelu: return run(std::integral_constant<int, 3>{});
    case Activation::kSquaredRelu: return run(std::integral_constant<int, 4>{});
  }
}

}  // namespace loraplex
