// Attention of single tokens, each over keys and values of its own and over its own length.
//
//   out[t, h] = softmax over p of cap(scale * q[t, h] . k[p]) v[p],   first(t) <= p < stop(t), unless mask[t, p] is false
//
// where a head may have a sink beside its keys: a logit that takes weight and gives nothing.
//
// Heads that share keys and values (grouped queries) are run together, so these are read once. Sums are float32; a
// token's result never depends on its neighbours.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "asked.h"
#include "linear.h"

namespace loraplex {

// exp of 16 floats: 2^n * e^r with r in [-ln2/2, ln2/2], e^r by a polynomial (Cephes); 2 units in the last place.
// 0 below -87, where float32 has no normal numbers left, and for -inf.
inline Floats exponential(Floats x) {
  const Floats zero = {}, low = zero - 87.0f;
  const Ints vanishes = x < low;
  x = vanishes ? low : x;
  const Floats scaled = x * 1.44269504088896341f;
  const Floats half = scaled < 0 ? scaled * 0 - 0.5f : scaled * 0 + 0.5f;
  const Ints n = __builtin_convertvector(scaled + half, Ints);
  const Floats whole = __builtin_convertvector(n, Floats);
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints power = (n + 127) << 23;
  return vanishes ? zero : p * reinterpret_cast<Floats>(power);
}

// Keys or values in blocks [blocks, kv_heads, block_tokens, dim]; a table tells each row's blocks.
template <typename T>
struct Pages {
  const T* data;
  int64_t dim, kv_heads, block_tokens, row_blocks;
  const int32_t* table;  // [rows, row_blocks]
  const int64_t* rows;   // [tokens]

  const T* at(int64_t token, int64_t kv_head, int64_t p) const {
    const int64_t block = table[rows[token] * row_blocks + p / block_tokens];
    return data + ((block * kv_heads + kv_head) * block_tokens + p % block_tokens) * dim;
  }

  int64_t run(int64_t p) const { return block_tokens - p % block_tokens; }  // places that follow each other from p on
};

// Keys or values as transformers keeps them: [rows, kv_heads, places, dim], one row a token, strides in values.
template <typename T>
struct Rows {
  const T* data;
  int64_t dim, row_stride, head_stride, places;

  const T* at(int64_t token, int64_t kv_head, int64_t p) const {
    return data + token * row_stride + kv_head * head_stride + p * dim;
  }

  int64_t run(int64_t p) const { return places - p; }
};

template <typename T, typename Where>
struct Attention {
  const T* query;  // [tokens, heads, key_dim]
  T* out;          // [tokens, heads, value_dim]
  Where keys, values;
  int64_t heads, kv_heads;
  float scale, softcap;      // 0: none
  int64_t window;            // 0: none
  const int64_t* positions;  // [tokens] the last place that each sees; null: all places
  const bool* mask;          // [tokens, places] or null
  int64_t mask_stride;
  int64_t chunk = 0;             // 0: none; else a token sees those of its own chunk
  const float* sinks = nullptr;  // [heads] or null
  AskedLayer asked{};            // whose steering changes weights

  int64_t stop(int64_t token) const { return positions == nullptr ? keys.run(0) : positions[token] + 1; }

  int64_t first(int64_t token) const {
    const int64_t last = stop(token) - 1;
    const int64_t begin = window > 0 ? std::max<int64_t>(0, last + 1 - window) : 0;
    return chunk > 0 ? std::max(begin, last / chunk * chunk) : begin;
  }

  // Where a head's weights begin behind those of the one before it.
  int64_t padded(int64_t token) const { return (stop(token) - first(token) + kLanes - 1) / kLanes * kLanes; }

  // The weights of a group of heads for the keys from first(token) on.
  void weigh(int64_t token, int64_t kv_head, std::vector<float>& buffer) const {
    const int64_t group = heads / kv_heads, begin = first(token), count = stop(token) - begin;
    const int64_t key_dim = keys.dim, stride = padded(token);
    if (static_cast<int64_t>(buffer.size()) < group * stride) buffer.resize(group * stride);
    const T* q = query + (token * heads + kv_head * group) * key_dim;
    for (int64_t i = 0; i < count;) {  // runs of keys that lie in one block
      const int64_t run = std::min(count - i, keys.run(begin + i));
      const T* k = keys.at(token, kv_head, begin + i);
      for (int64_t g = 0; g < group; ++g) logits(k, q + g * key_dim, run, buffer.data() + g * stride + i);
      i += run;
    }
    const SteeringRecord steering = asked.steering(token);
    for (int64_t g = 0; g < group; ++g) {
      float* weights = buffer.data() + g * stride;
      const int64_t head = kv_head * group + g;
      if (mask != nullptr) hide(mask + token * mask_stride + begin, count, weights);
      if (steering.exists()) steering.add(head, begin, count, weights);
      softmax(weights, count, stride, sinks == nullptr ? -INFINITY : sinks[head]);
      if (steering.exists()) steering.raise(head, begin, count, weights);
    }
  }

  void head_group(int64_t token, int64_t kv_head, std::vector<float>& buffer) const {
    weigh(token, kv_head, buffer);
    const int64_t group = heads / kv_heads, begin = first(token), count = stop(token) - begin;
    const int64_t value_dim = values.dim, padded = this->padded(token);
    const float* weights = buffer.data();
    T* result = out + (token * heads + kv_head * group) * value_dim;
    int64_t g = 0;
    for (; g + 3 <= group; g += 3)
      sum_values<3>(token, kv_head, begin, count, weights + g * padded, padded, result + g * value_dim);
    for (; g < group; ++g)
      sum_values<1>(token, kv_head, begin, count, weights + g * padded, padded, result + g * value_dim);
  }

  static void hide(const bool* seen, int64_t count, float* weights) {
    for (int64_t i = 0; i < count; ++i) weights[i] = seen[i] ? weights[i] : -INFINITY;
  }

  void logits(const T* k, const T* q, int64_t run, float* result) const {
    const int64_t key_dim = keys.dim;
    float values[kLanes];
    int64_t i = 0;
    for (; i + 16 <= run; i += 16) {
      store(values, dots<16, 1, false>(k + i * key_dim, key_dim, q, key_dim));
      std::memcpy(result + i, values, 16 * sizeof(float));
    }
    for (; i + 4 <= run; i += 4) {
      store(values, dots<4, 1, false>(k + i * key_dim, key_dim, q, key_dim));
      std::memcpy(result + i, values, 4 * sizeof(float));
    }
    for (; i < run; ++i) result[i] = dots<1, 1, false>(k + i * key_dim, key_dim, q, key_dim)[0];
    for (i = 0; i < run; ++i) result[i] = softcap > 0 ? softcap * std::tanh(result[i] * scale / softcap) : result[i] * scale;
  }

  static void softmax(float* weights, int64_t count, int64_t padded, float sink) {
    const float most = std::max(sink, *std::max_element(weights, weights + count));
    if (most == -INFINITY) return std::fill(weights, weights + padded, 0.0f);  // nothing is seen
    std::fill(weights + count, weights + padded, -INFINITY);
    Floats total = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Floats w = exponential(load(weights + i) - most);
      total += w;
      store(weights + i, w);
    }
    const float factor = 1.0f / (sum(total) + (sink == -INFINITY ? 0.0f : std::exp(sink - most)));
    for (int64_t i = 0; i < padded; i += kLanes) store(weights + i, load(weights + i) * factor);
  }

  // `vectors` of values for `num` heads that share them, whose weights lie `padded` apart: each is read once for all.
  template <int num, int vectors>
  void sum_columns(int64_t token, int64_t kv_head, int64_t begin, int64_t count, const float* weights, int64_t padded,
                   int64_t column, T* result) const {
    Floats acc[num * vectors];
    each<num * vectors>([&](auto j) { acc[j] = Floats{}; });
    for (int64_t i = 0; i < count;) {
      const int64_t run = std::min(count - i, values.run(begin + i));
      const T* v = values.at(token, kv_head, begin + i) + column;
      for (int64_t j = 0; j < run; ++j, v += values.dim) {
        each<vectors>([&](auto n) {
          const Floats value = load(v + n * kLanes);
          each<num>([&](auto g) { acc[g * vectors + n] += weights[g * padded + i + j] * value; });
        });
      }
      i += run;
    }
    each<num * vectors>([&](auto j) {
      store(result + j / vectors * values.dim + column + j % vectors * kLanes, acc[j]);
    });
  }

  // The outputs of `num` heads that follow each other.
  template <int num>
  void sum_values(int64_t token, int64_t kv_head, int64_t begin, int64_t count, const float* weights, int64_t padded,
                  T* result) const {
    const int64_t value_dim = values.dim;
    int64_t column = 0;
    for (; column + 4 * kLanes <= value_dim; column += 4 * kLanes)
      sum_columns<num, 4>(token, kv_head, begin, count, weights, padded, column, result);
    for (; column + kLanes <= value_dim; column += kLanes)
      sum_columns<num, 1>(token, kv_head, begin, count, weights, padded, column, result);
    for (; column < value_dim; ++column) {
      for (int g = 0; g < num; ++g) {
        float total = 0;
        for (int64_t i = 0; i < count; ++i)
          total = fused(weights[g * padded + i], float(values.at(token, kv_head, begin + i)[column]), total);
        result[g * value_dim + column] = static_cast<T>(total);
      }
    }
  }
};

}  // namespace loraplex
