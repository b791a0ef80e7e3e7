// What a token's row asks of one attention layer besides attending, as engine/worker/asked_rows.py writes it: steering,
// a constant vector, and a link of residuals. Addresses and whole numbers; floats lie in their lower 32 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace loraplex {

inline float float_of(int64_t bits) {
  const int32_t low = static_cast<int32_t>(bits);
  float value;
  std::memcpy(&value, &low, sizeof(value));
  return value;
}

template <typename V>
const V* address_of(int64_t number) {
  return reinterpret_cast<const V*>(number);
}

// Some keys of a row are to get at least a share of the attention in some heads (SpotLight, arXiv 2505.12025, but the
// share is met exactly): weights there are multiplied so that they sum to it, the others so that all sum to 1. Keys that
// get next to nothing (residual/steering.py) stay as they are: no float32 could make a share of it.
struct ShareRecord {
  const int64_t* ints;

  static constexpr float kLeastPaid = 1e-30f;

  const uint8_t* keys() const { return address_of<uint8_t>(ints[0]); }  // [num_keys]  whether one is meant
  const uint8_t* heads() const { return address_of<uint8_t>(ints[1]); }  // [heads], or null: all
  int64_t num_keys() const { return ints[2]; }
  float share() const { return float_of(ints[3]); }

  static constexpr int64_t kInts = 4;

  // weights [count] of the keys from `begin` on.
  void raise(int64_t head, int64_t begin, int64_t count, float* weights) const {
    if (heads() != nullptr && heads()[head] == 0) return;
    const int64_t stop = std::min(count, num_keys() - begin);
    float meant = 0;
    for (int64_t i = 0; i < stop; ++i) meant += keys()[begin + i] != 0 ? weights[i] : 0.0f;
    if (!(meant >= kLeastPaid) || meant >= share()) return;
    const float factor = share() / meant, rest = (1.0f - share()) / (1.0f - meant);
    for (int64_t i = 0; i < count; ++i) weights[i] *= i < stop && keys()[begin + i] != 0 ? factor : rest;
  }
};

// [log strengths [heads or 1, num_keys] or 0, values between two heads, num_keys, number of shares, shares ...]
struct SteeringRecord {
  const int64_t* ints;

  bool exists() const { return ints != nullptr; }
  int64_t num_keys() const { return ints[2]; }
  int64_t num_shares() const { return ints[3]; }
  ShareRecord share(int64_t i) const { return {ints + 4 + i * ShareRecord::kInts}; }

  const float* strengths(int64_t head) const {  // of keys; added to logits
    return ints[0] == 0 ? nullptr : address_of<float>(ints[0]) + head * ints[1];
  }

  // logits [count] of the keys from `begin` on.
  void add(int64_t head, int64_t begin, int64_t count, float* logits) const {
    const float* own = strengths(head);
    if (own == nullptr) return;
    for (int64_t i = 0; i < std::min(count, num_keys() - begin); ++i) logits[i] += own[begin + i];
  }

  void raise(int64_t head, int64_t begin, int64_t count, float* weights) const {
    for (int64_t i = 0; i < num_shares(); ++i) share(i).raise(head, begin, count, weights);
  }
};

// One linked residual of a link. `mix` is the softmax of its head logits; `before` is what A makes of the residuals
// before it in the link, `constant` of the vectors before it.
struct LevelRecord {
  const int64_t* ints;

  int64_t rank() const { return ints[0]; }
  const float* a() const { return address_of<float>(ints[1]); }         // [rank, hidden]
  const float* b() const { return address_of<float>(ints[2]); }         // [rank, hidden]
  const float* mix() const { return address_of<float>(ints[3]); }       // [heads, rank]
  const float* before() const { return address_of<float>(ints[4]); }    // [rank, ranks before], or null
  const float* constant() const { return address_of<float>(ints[5]); }  // [rank], or null
  float scale() const { return float_of(ints[7]); }                     // weight * alpha/r

  // u of a token at a place of the pool [blocks * block_tokens], its columns 8 k to 8 k + 7.
  float* u(int64_t place, int64_t k) const {
    return reinterpret_cast<float*>(address_of<int64_t>(ints[6])[k]) + place * 8;
  }

  static constexpr int64_t kInts = 8;
};

// [number of levels, sum of ranks, levels ...]
struct LinkRecord {
  const int64_t* ints;

  bool exists() const { return ints != nullptr; }
  int64_t num_levels() const { return ints[0]; }
  int64_t sum_of_ranks() const { return ints[1]; }
  LevelRecord level(int64_t i) const { return {ints + 2 + i * LevelRecord::kInts}; }
};

// By token, what its row asks of one layer.
struct AskedLayer {
  const int64_t* table = nullptr;   // [groups, stride], null: nothing is asked; steering, vector, link
  int64_t stride = 0;
  const int64_t* groups = nullptr;  // [tokens]  -1: none

  const int64_t* of(int64_t token) const {
    return table == nullptr || groups[token] < 0 ? nullptr : table + groups[token] * stride;
  }
  SteeringRecord steering(int64_t token) const {
    const int64_t* own = of(token);
    return {own == nullptr ? nullptr : address_of<int64_t>(own[0])};
  }
  const float* vector(int64_t token) const {  // [hidden]
    const int64_t* own = of(token);
    return own == nullptr ? nullptr : address_of<float>(own[1]);
  }
  LinkRecord link(int64_t token) const {
    const int64_t* own = of(token);
    return {own == nullptr ? nullptr : address_of<int64_t>(own[2])};
  }

  static constexpr int64_t kInts = 3;
};

}  // namespace loraplex
