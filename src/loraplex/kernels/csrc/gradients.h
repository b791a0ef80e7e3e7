// Gradients of a layer's parts by their inputs, each in one pass over its values; weights are frozen.
#pragma once

#include "activation.h"
#include "norm.h"

namespace loraplex {

// Of x [size], from grad of out[i] = weight[i] * x[i] / sqrt(mean(x^2) + eps), or (1 + weight[i]) * ...
template <typename T>
void rms_norm_gradient(const T* grad, const T* x, const T* weight, T* out, int64_t size, float eps, bool plus_one) {
  const float one = plus_one ? 1.0f : 0.0f;
  Floats squares = {}, products = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Floats v = load(x + i);
    squares += v * v;
    products += load(grad + i) * (load(weight + i) + one) * v;
  }
  float square = sum(squares), product = sum(products);
  for (; i < size; ++i) {
    const float v = float(x[i]);
    square = fused(v, v, square);
    product = fused(float(grad[i]) * (float(weight[i]) + one), v, product);
  }
  const float factor = 1.0f / std::sqrt(square / size + eps);
  const float back = factor * factor * factor * product / size;
  for (i = 0; i + kLanes <= size; i += kLanes) {
    store(out + i, load(grad + i) * (load(weight + i) + one) * factor - load(x + i) * back);
  }
  for (; i < size; ++i) {
    out[i] = static_cast<T>(float(grad[i]) * (float(weight[i]) + one) * factor - float(x[i]) * back);
  }
}

// The derivative of an activation.
template <Activation kind>
inline Floats slope(Floats x) {
  if constexpr (kind == Activation::kSilu) {
    const Floats s = 1.0f / (1.0f + exponential_of_negative(x));
    return s * (1.0f + x * (1.0f - s));
  }
  if constexpr (kind == Activation::kGelu) {
    const Floats tail = upper_tail(x < 0 ? -x : x);
    const Floats half = x * x * 0.5f, density = exponential_of_negative(half) * 0.39894228040143268f;
    return (x < 0 ? tail : 1.0f - tail) + x * density;
  }
  if constexpr (kind == Activation::kGeluTanh) {
    const Floats u = (x + x * x * x * 0.044715f) * 0.79788456080286536f;
    const Floats s = 1.0f / (1.0f + exponential_of_negative(2.0f * u));
    return s + x * s * (1.0f - s) * (1.0f + x * x * 0.134145f) * 1.59576912160573072f;
  }
  const Floats zero = {}, one = zero + 1.0f;
  return kind == Activation::kSquaredRelu ? (x > zero ? 2.0f * x : zero) : (x > zero ? one : zero);
}

// Of gate and up, from grad of out = act(gate) * up.
template <Activation kind, typename T>
void gated_activation_gradients(const T* grad, const T* gate, const T* up, T* to_gate, T* to_up, int64_t size) {
  const auto run = [](const T* d, const T* g, const T* u, T* of_gate, T* of_up) {
    const Floats x = load(g), own = load(d);
    store(of_gate, own * load(u) * slope<kind>(x));
    store(of_up, own * activated<kind>(x));
  };
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) run(grad + i, gate + i, up + i, to_gate + i, to_up + i);
  if (i == size) return;
  const size_t bytes = (size - i) * sizeof(T);
  T rest[5][kLanes] = {};
  std::memcpy(rest[0], grad + i, bytes);
  std::memcpy(rest[1], gate + i, bytes);
  std::memcpy(rest[2], up + i, bytes);
  run(rest[0], rest[1], rest[2], rest[3], rest[4]);
  std::memcpy(to_gate + i, rest[3], bytes);
  std::memcpy(to_up + i, rest[4], bytes);
}

}  // namespace loraplex
