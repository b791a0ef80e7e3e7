// Tokens as 16-bit integers, for products with 8-bit weights.
//
// A token's values are multiplied by a power of two with which the largest of them just fits into 16 bits, and rounded:
// a bfloat16 value of at least 1/128 of the largest stays what it is. Each integer is two digits, 256 * high + low; then
// the sum of products with a weight is 256 times a sum of int8 products plus one of unsigned ones, both exact.
#pragma once

#include "int8_layout.h"

namespace loraplex {

typedef int8_t Bytes __attribute__((vector_size(kLanes)));

// The tokens of one pass, in tiles [tokens / 16][steps][digit][16, depth]; a tile's lines have 64 bytes, and where they
// are longer than its depth (32), both digits are in one.
template <int depth>
struct Int8Tokens {
  static constexpr int64_t kStepBytes = 2 * kTileTokens * depth;
  static constexpr int64_t kLowDigit = depth == 64 ? kTileTokens * 64 : 32;  // from a high digit
  static constexpr int64_t kLine = 64;

  std::vector<uint8_t> tiles;
  std::vector<int32_t> high_sums;  // [tokens / 16 * 16][steps] of the high digits
  std::vector<float> scales;       // [tokens]
  int64_t num_steps = 0;

  // The powers of two of x [tokens, in]; not a number where a value isn't finite.
  void measure(const Half* x, int64_t in, int64_t num_tokens) {
    if (static_cast<int64_t>(scales.size()) < num_tokens) scales.resize(num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) scales[t] = scale_of(x + t * in, in);
  }

  // The values [first, first + depth * steps) of x.
  void pack(const Half* x, int64_t in, int64_t num_tokens, int64_t first, int64_t steps) {
    num_steps = steps;
    const int64_t padded = tiles_of(num_tokens, kTileTokens) * kTileTokens;
    if (static_cast<int64_t>(tiles.size()) < padded / kTileTokens * steps * kStepBytes) {
      tiles.resize(padded / kTileTokens * steps * kStepBytes);
    }
    if (static_cast<int64_t>(high_sums.size()) < padded * steps) high_sums.resize(padded * steps);
    for (int64_t t = 0; t < num_tokens; ++t) {
      const float factor = std::isfinite(scales[t]) ? 1.0f / scales[t] : 0.0f;
      const Half* source = x + t * in + first;
      for (int64_t step = 0; step < steps; ++step) {
        const int64_t count = std::min<int64_t>(depth, in - first - step * depth);
        high_sums[t * steps + step] =
            pack_line(source + step * depth, count, factor,
                      tiles.data() + (t / kTileTokens * steps + step) * kStepBytes + t % kTileTokens * kLine);
      }
    }
  }

  const uint8_t* block(int64_t token, int64_t step) const {
    return tiles.data() + (token / kTileTokens * num_steps + step) * kStepBytes;
  }

 private:
  static float scale_of(const Half* x, int64_t in) {
    constexpr int kBits = 14, kBias = 127, kLeast = 30;  // the smallest exponent whose powers are normal numbers
    typedef uint16_t Line __attribute__((vector_size(64)));
    Line most = {};
    int64_t k = 0;
    for (; k + 32 <= in; k += 32) {
      Line values;
      std::memcpy(&values, x + k, sizeof(values));
      values &= 0x7fff;
      most = values > most ? values : most;
    }
    uint16_t largest = 0;
    for (int i = 0; i < 32; ++i) largest = std::max<uint16_t>(largest, most[i]);
    for (; k < in; ++k) largest = std::max<uint16_t>(largest, x[k].x & 0x7fff);
    const int exponent = largest >> 7;
    if (exponent == 255) return std::numeric_limits<float>::quiet_NaN();
    const uint32_t bits = static_cast<uint32_t>(std::max(exponent, kLeast) - kBits) << 23;
    static_assert(kBias > 0);
    float scale;
    std::memcpy(&scale, &bits, sizeof(scale));
    return scale;
  }

  // Returns the sum of the high digits. `count` values, then zeros.
  static int32_t pack_line(const Half* x, int64_t count, float factor, uint8_t* line) {
    Ints total = {};
    for (int64_t k = 0; k < depth; k += kLanes) {
      Half rest[kLanes] = {};
      const Half* from = x + k;
      if (k + kLanes > count) {
        if (k < count) std::memcpy(rest, from, (count - k) * sizeof(Half));
        from = rest;
      }
      const Ints whole = nearest(load(from) * factor);
      const Ints high = whole >> 8;
      total += high;
      const Bytes high_bytes = __builtin_convertvector(high, Bytes);
      const Bytes low_bytes = __builtin_convertvector(whole, Bytes);
      std::memcpy(line + k, &high_bytes, sizeof(Bytes));
      std::memcpy(line + kLowDigit + k, &low_bytes, sizeof(Bytes));
    }
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += total[i];
    return sum;
  }

  // Rounded to nearest even, for magnitudes below 2^22: the sum with 1.5 * 2^23 has no room for fractions. Not a number
  // becomes 0.
  static Ints nearest(Floats v) {
    v = v == v ? v : Floats{};
    return reinterpret_cast<Ints>(v + 12582912.0f) - 0x4b400000;
  }
};

}  // namespace loraplex
