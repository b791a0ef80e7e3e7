// Attention of single tokens over keys and values in blocks: each token its own track, its own length.
//
//   out[t, h] = softmax over p of cap(scale * q[t, h] . k[p]) v[p],   first(t) <= p <= position(t)
//
// Heads that share keys and values (grouped queries) are run together, so these are read once. Sums are float32; a
// token's result never depends on its neighbours.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear.h"

namespace loraplex {

// exp of 16 floats: 2^n * e^r with r in [-ln2/2, ln2/2], e^r by a polynomial (Cephes); 2 units in the last place.
inline Floats exponential(Floats x) {
  const Floats low = x * 0 - 87.0f;
  x = x < low ? low : x;
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
  return p * reinterpret_cast<Floats>(power);
}

template <typename T>
struct PagedAttention {
  const T* query;  // [tokens, heads, key_dim]
  T* out;          // [tokens, heads, value_dim]
  const T* keys;   // [blocks, kv_heads, block_tokens, key_dim]
  const T* values;
  const int32_t* table;  // [rows, row_blocks]
  const int64_t* rows;
  const int64_t* positions;
  int64_t heads, kv_heads, key_dim, value_dim, block_tokens, row_blocks;
  float scale, softcap;  // 0: none
  int64_t window;        // 0: none

  int64_t first(int64_t token) const { return window > 0 ? std::max<int64_t>(0, positions[token] + 1 - window) : 0; }

  int64_t length(int64_t token) const { return positions[token] + 1 - first(token); }

  // The place of track position p of a token's row, in heads of one block row: [block, kv_head, p in block].
  int64_t place(int64_t token, int64_t kv_head, int64_t p) const {
    const int64_t block = table[rows[token] * row_blocks + p / block_tokens];
    return (block * kv_heads + kv_head) * block_tokens + p % block_tokens;
  }

  void head_group(int64_t token, int64_t kv_head, std::vector<float>& buffer) const {
    const int64_t group = heads / kv_heads, begin = first(token), count = length(token);
    const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
    if (static_cast<int64_t>(buffer.size()) < group * padded) buffer.resize(group * padded);
    const T* q = query + (token * heads + kv_head * group) * key_dim;
    for (int64_t i = 0; i < count;) {  // runs of keys that lie in one block
      const int64_t run = std::min(count - i, block_tokens - (begin + i) % block_tokens);
      const T* k = keys + place(token, kv_head, begin + i) * key_dim;
      for (int64_t g = 0; g < group; ++g) logits(k, q + g * key_dim, run, buffer.data() + g * padded + i);
      i += run;
    }
    for (int64_t g = 0; g < group; ++g) {
      float* weights = buffer.data() + g * padded;
      softmax(weights, count, padded);
      sum_values(token, kv_head, begin, count, weights, out + (token * heads + kv_head * group + g) * value_dim);
    }
  }

  void logits(const T* k, const T* q, int64_t run, float* result) const {
    float values[kLanes];
    int64_t i = 0;
    for (; i + 16 <= run; i += 16) {
      store(values, dots<16, 1>(k + i * key_dim, q, key_dim));
      std::memcpy(result + i, values, 16 * sizeof(float));
    }
    for (; i + 4 <= run; i += 4) {
      store(values, dots<4, 1>(k + i * key_dim, q, key_dim));
      std::memcpy(result + i, values, 4 * sizeof(float));
    }
    for (; i < run; ++i) result[i] = dots<1, 1>(k + i * key_dim, q, key_dim)[0];
    for (i = 0; i < run; ++i) result[i] = softcap > 0 ? softcap * std::tanh(result[i] * scale / softcap) : result[i] * scale;
  }

  static void softmax(float* weights, int64_t count, int64_t padded) {
    const float most = *std::max_element(weights, weights + count);
    std::fill(weights + count, weights + padded, -INFINITY);
    Floats total = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      Floats w = exponential(load(weights + i) - most);
      if (i + kLanes > count) {
        for (int64_t j = count - i; j < kLanes; ++j) w[j] = 0;
      }
      total += w;
      store(weights + i, w);
    }
    const float factor = 1.0f / sum(total);
    for (int64_t i = 0; i < padded; i += kLanes) store(weights + i, load(weights + i) * factor);
  }

  template <int vectors>
  void sum_columns(int64_t token, int64_t kv_head, int64_t begin, int64_t count, const float* weights, int64_t column,
                   T* result) const {
    Floats acc[vectors] = {};
    for (int64_t i = 0; i < count;) {
      const int64_t run = std::min(count - i, block_tokens - (begin + i) % block_tokens);
      const T* v = values + place(token, kv_head, begin + i) * value_dim + column;
      for (int64_t j = 0; j < run; ++j, v += value_dim) {
        for (int n = 0; n < vectors; ++n) acc[n] += weights[i + j] * load(v + n * kLanes);
      }
      i += run;
    }
    for (int n = 0; n < vectors; ++n) store(result + column + n * kLanes, acc[n]);
  }

  void sum_values(int64_t token, int64_t kv_head, int64_t begin, int64_t count, const float* weights, T* result) const {
    int64_t column = 0;
    for (; column + 8 * kLanes <= value_dim; column += 8 * kLanes)
      sum_columns<8>(token, kv_head, begin, count, weights, column, result);
    for (; column + 4 * kLanes <= value_dim; column += 4 * kLanes)
      sum_columns<4>(token, kv_head, begin, count, weights, column, result);
    for (; column + kLanes <= value_dim; column += kLanes)
      sum_columns<1>(token, kv_head, begin, count, weights, column, result);
    for (; column < value_dim; ++column) {
      float total = 0;
      for (int64_t i = 0; i < count; ++i)
        total += weights[i] * float(values[place(token, kv_head, begin + i) * value_dim + column]);
      result[column] = static_cast<T>(total);
    }
  }
};

}  // namespace loraplex
