// Attention of many tokens of one sequence, a part of its prompt, over keys and values in blocks (attention.h): two
// products of tiles for 32 tokens and up to 512 keys at a time, and a softmax that goes along (Milakov and Gimelshein,
// arXiv 1805.02867).
//
//   out[t, h] = softmax over p of cap(scale * q[t, h] . k[p]) v[p],   first(t) <= p <= start + t
//
// Keys [keys, key_dim] are packed as the weight of the first product, values, transposed, as that of the second
// (tile_layout.h): once for all heads that share them. Sums and weights are float32; the second product takes weights
// rounded to bfloat16, as torch's does.
#pragma once

#include <limits>

#include "attention.h"
#include "tiles.h"

namespace loraplex {

// Whole vectors of 16 pairs of bfloat16 values: line i of the result has pair i of every line.
inline void transpose_pairs(Words* lines) {
  each<4>([&](auto power) {
    constexpr int step = 1 << power;
    Ints low{}, high{};
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = (lane & step) == 0 ? lane : kLanes + lane - step;
      high[lane] = (lane & step) == 0 ? lane + step : kLanes + lane;
    }
    each<kLanes>([&](auto i) {
      if constexpr ((i & step) == 0) {
        const Floats a = reinterpret_cast<Floats>(lines[i]), b = reinterpret_cast<Floats>(lines[i + step]);
        lines[i] = reinterpret_cast<Words>(shuffle(a, b, low));
        lines[i + step] = reinterpret_cast<Words>(shuffle(a, b, high));
      }
    });
  });
}

struct PromptAttention {
  const Half* query;  // [count, heads, key_dim]
  Half* out;          // [count, heads, value_dim]
  Pages<Half> keys, values;
  int64_t heads, kv_heads;
  float scale, softcap;  // 0: none
  int64_t window;        // 0: none
  int64_t chunk;         // 0: none; else a token sees those of its own chunk
  const float* sinks;    // [heads] or null
  int64_t token;         // the first one's place in the pass, by which Pages know its row
  int64_t start, count;  // its position in the sequence, and how many they are
  Tiling tiling;
  SteeringRecord steering{};  // of the row, without shares

  static constexpr int64_t kSlab = 16;  // blocks of 32 keys whose weights are computed together
  static constexpr float kLog2E = 1.44269504f;
  static constexpr int64_t kBlockSums = kBlockTokens * kBlockColumns;

  int64_t key_steps() const { return tiles_of(keys.dim, kTileDepth); }
  int64_t value_tiles() const { return tiles_of(values.dim, kTileColumns); }
  int64_t first_block() const { return first_seen(start) / kBlockColumns; }
  int64_t num_blocks() const { return tiles_of(start + count, kBlockColumns) - first_block(); }
  int64_t packed_keys() const { return num_blocks() * 2 * key_steps() * kTileValues; }
  int64_t packed_values() const { return num_blocks() * value_tiles() * kTileValues; }

  int64_t first_seen(int64_t position) const {
    const int64_t begin = window > 0 ? std::max<int64_t>(0, position + 1 - window) : 0;
    return chunk > 0 ? std::max(begin, position / chunk * chunk) : begin;
  }

  // Called by all threads of a team, each with its number; `packed` has room for packed_keys() and packed_values().
  void run(int64_t i, int64_t n, Half* packed) const {
    Half* packed_v = packed + packed_keys();
    const int64_t group = heads / kv_heads, num_units = group * tiles_of(count, kBlockTokens);
    for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
      for (int64_t b = num_blocks() * i / n; b < num_blocks() * (i + 1) / n; ++b) pack(kv_head, b, packed, packed_v);
#pragma omp barrier
      // In turn, and the last tokens, which see most, first.
      for (int64_t unit = i; unit < num_units; unit += n) {
        const int64_t block = tiles_of(count, kBlockTokens) - 1 - unit / group;
        attend(kv_head * group + unit % group, block * kBlockTokens, packed, packed_v);
      }
#pragma omp barrier
    }
    release(tiling);
  }

 private:
  struct Rows {  // of 32 tokens
    float most[kBlockTokens], total[kBlockTokens];
  };

  void pack(int64_t kv_head, int64_t block, Half* packed_k, Half* packed_v) const {
    const int64_t first = (first_block() + block) * kBlockColumns, stop = start + count;
    for (int64_t tile = 0; tile < 2; ++tile) {
      const int64_t position = first + tile * kTileColumns;
      const Half* rows[kTileColumns];
      for (int64_t c = 0; c < kTileColumns; ++c) {
        rows[c] = position + c < stop ? keys.at(token, kv_head, position + c) : nullptr;
      }
      for (int64_t step = 0; step < key_steps(); ++step) {
        Words lines[kTileColumns];
        const int64_t depth = std::min(kTileDepth, keys.dim - step * kTileDepth);
        for (int64_t c = 0; c < kTileColumns; ++c) {
          lines[c] = Words{};
          if (rows[c] != nullptr) std::memcpy(&lines[c], rows[c] + step * kTileDepth, depth * sizeof(Half));
        }
        transpose_pairs(lines);
        std::memcpy(packed_k + ((block * key_steps() + step) * 2 + tile) * kTileValues, lines, sizeof(lines));
      }
    }
    for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      const int64_t position = first + 2 * pair;
      const Half* one = position < stop ? values.at(token, kv_head, position) : nullptr;
      const Half* other = position + 1 < stop ? values.at(token, kv_head, position + 1) : nullptr;
      for (int64_t tile = 0; tile < value_tiles(); ++tile) {
        const Words line = column_words(one, tile) | column_words(other, tile) << 16;
        std::memcpy(packed_v + tile_place(tile, block, value_tiles(), num_blocks()) + pair * kTileDepth, &line,
                    sizeof(line));
      }
    }
  }

  // 16 values of a row, or zeros.
  Words column_words(const Half* row, int64_t tile) const {
    Halves halves{};
    const int64_t columns = std::min(kTileColumns, values.dim - tile * kTileColumns);
    if (row != nullptr) std::memcpy(&halves, row + tile * kTileColumns, columns * sizeof(Half));
    return __builtin_convertvector(halves, Words);
  }

  // One head of up to 32 tokens from `first` on.
  void attend(int64_t head, int64_t first, const Half* packed_k, const Half* packed_v) const {
    const int num = static_cast<int>(std::min(kBlockTokens, count - first));
    const int64_t steps = key_steps(), column_blocks = tiles_of(value_tiles(), 2);
    thread_local std::vector<Half> halves;  // the queries, and the weights of a slab, as tiles
    thread_local std::vector<float> floats;  // logits, and sums
    halves.resize((2 * steps + 2 * kSlab) * kTileValues);
    floats.resize((kSlab + column_blocks) * kBlockSums);
    Half *q = halves.data(), *weights = q + 2 * steps * kTileValues;
    float *logits = floats.data(), *sums = logits + kSlab * kBlockSums;
    pack_queries(head, first, num, q);
    std::fill(sums, sums + column_blocks * kBlockSums, 0.0f);
    Rows rows;
    for (int t = 0; t < num; ++t) {
      rows.most[t] = sinks == nullptr ? -INFINITY : sinks[head] * kLog2E;
      rows.total[t] = sinks == nullptr ? 0.0f : 1.0f;
    }
    configure(tiling, num);
    const int64_t begin = first_seen(start + first) / kBlockColumns - first_block();
    const int64_t stop = (start + first + num - 1) / kBlockColumns + 1 - first_block();
    for (int64_t slab = begin; slab < stop; slab += kSlab) {
      const int64_t blocks = std::min(kSlab, stop - slab);
      for (int64_t b = 0; b < blocks; ++b) {
        multiply({q, steps * kTileValues, packed_k + (slab + b) * 2 * steps * kTileValues, 2, steps, num,
                  logits + b * kBlockSums, true, false},
                 tiling);
      }
      for (int t = 0; t < num; ++t) {
        const float factor = weigh(head, t, start + first + t, slab, blocks, logits, weights, rows);
        if (factor != 1.0f) shrink_sums(t, column_blocks, factor, sums);
      }
      for (int64_t c = 0; c < column_blocks; ++c) {
        const int width = static_cast<int>(std::min<int64_t>(2, value_tiles() - 2 * c));
        multiply({weights, kSlab * kTileValues,
                  packed_v + tile_place(2 * c, slab, value_tiles(), num_blocks()), width, blocks, num,
                  sums + c * kBlockSums, false, false},
                 tiling);
      }
    }
    for (int t = 0; t < num; ++t) put(head, first + t, t, rows.total[t], sums);
  }

  void pack_queries(int64_t head, int64_t first, int num, Half* q) const {
    const int64_t steps = key_steps();
    for (int t = 0; t < num; ++t) {
      const Half* source = query + ((first + t) * heads + head) * keys.dim;
      Half* target = q + (t / kTileTokens * steps * kTileTokens + t % kTileTokens) * kTileDepth;
      for (int64_t step = 0; step < steps; ++step, source += kTileDepth, target += kTileValues) {
        const int64_t depth = std::min(kTileDepth, keys.dim - step * kTileDepth);
        std::memcpy(target, source, depth * sizeof(Half));
        std::memset(static_cast<void*>(target + depth), 0, (kTileDepth - depth) * sizeof(Half));
      }
    }
  }

  static float* place(float* sums, int64_t t, int64_t tile) {  // of a token's 16 columns in a block's sums
    return sums + ((t / kTileTokens * 2 + tile) * kTileTokens + t % kTileTokens) * kTileColumns;
  }

  // Weights of one token for the keys of a slab, not yet divided by their sum; returns by what former sums shrink.
  // Logits are counted in powers of two.
  float weigh(int64_t head, int64_t t, int64_t position, int64_t slab, int64_t blocks, float* logits, Half* weights,
              Rows& rows) const {
    const int64_t first_key = (first_block() + slab) * kBlockColumns, seen = first_seen(position);
    const auto is_edge = [&](int64_t key) { return key < seen || key + kTileColumns > position + 1; };
    const float* strengths = steering.exists() ? steering.strengths(head) : nullptr;
    const int64_t stop_steering = strengths == nullptr ? 0 : steering.num_keys();
    const Floats nothing = Floats{} - INFINITY;
    const float unit = is_capped() ? kLog2E : scale * kLog2E;
    Floats top = nothing;
    for (int64_t tile = 0; tile < 2 * blocks; ++tile) {
      float* at = place(logits + tile / 2 * kBlockSums, t, tile % 2);
      const int64_t key = first_key + tile * kTileColumns;
      Floats value = load(at);
      if (is_capped() || is_edge(key) || key < stop_steering) {
        value = is_capped() ? capped(value) : value;
        if (key < stop_steering) value = steered(value, strengths + key, stop_steering - key);
        value = is_seen(key, seen, position) ? value : nothing;
        store(at, value);
      }
      top = value > top ? value : top;
    }
    float most = top[0];
    for (int lane = 1; lane < kLanes; ++lane) most = std::max(most, top[lane]);
    most = std::max(rows.most[t], most * unit);
    const float base = most == -INFINITY ? 0.0f : most;
    Floats total{};
    for (int64_t tile = 0; tile < 2 * blocks; ++tile) {
      const Floats value = load(place(logits + tile / 2 * kBlockSums, t, tile % 2));
      Floats weight = power_of_two(value * unit - base);
      const int64_t key = first_key + tile * kTileColumns;
      if (is_edge(key) || key < stop_steering) weight = value == nothing ? Floats{} : weight;
      total += weight;
      store_weights(weights + ((t / kTileTokens * kSlab + tile / 2) * kTileTokens + t % kTileTokens) * kTileDepth +
                        tile % 2 * kTileColumns,
                    weight);
    }
    const float factor = rows.most[t] == most ? 1.0f : std::exp2(rows.most[t] - base);
    rows.total[t] = rows.total[t] * factor + sum(total);
    rows.most[t] = most;
    return factor;
  }

  bool is_capped() const { return softcap > 0 || scale <= 0; }

  Floats capped(Floats value) const {
    value *= scale;
    if (softcap <= 0) return value;
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = softcap * std::tanh(value[lane] / softcap);
    return value;
  }

  // Logits with the log strengths of the first `count` keys.
  Floats steered(Floats value, const float* strengths, int64_t count) const {
    const float factor = is_capped() ? 1.0f : 1.0f / scale;
    for (int lane = 0; lane < std::min<int64_t>(kLanes, count); ++lane) value[lane] += strengths[lane] * factor;
    return value;
  }

  static Ints is_seen(int64_t key, int64_t first, int64_t last) {
    constexpr Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Ints low = Ints{} + static_cast<int>(std::clamp<int64_t>(first - key, 0, kLanes));
    const Ints high = Ints{} + static_cast<int>(std::clamp<int64_t>(last - key, -1, kLanes));
    return (lanes >= low) & (lanes <= high);
  }

  // 2^x of 16 floats below 1, to 4e-5 of it, a fiftieth of what is lost by rounding to bfloat16; 2^-126 for less.
  static Floats power_of_two(Floats x) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: the last bits of x + magic are the nearest whole number
    const Floats low = Floats{} - 126.0f;
    x = x > low ? x : low;
    const Floats shifted = x + magic, r = x - (shifted - magic);
    const Floats p = (((r * 9.6181291e-3f + 5.5504109e-2f) * r + 2.4022651e-1f) * r + 6.9314718e-1f) * r + 1.0f;
    return reinterpret_cast<Floats>(reinterpret_cast<Ints>(p) + (reinterpret_cast<Ints>(shifted) << 23));
  }

  static void store_weights(Half* to, Floats weights) {
#ifdef __AVX512BF16__
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)weights);
    std::memcpy(static_cast<void*>(to), &halves, sizeof(halves));
#else
    store(to, weights);
#endif
  }

  static void shrink_sums(int64_t t, int64_t column_blocks, float factor, float* sums) {
    for (int64_t tile = 0; tile < 2 * column_blocks; ++tile) {
      float* at = place(sums + tile / 2 * kBlockSums, t, tile % 2);
      store(at, load(at) * factor);
    }
  }

  void put(int64_t head, int64_t row, int64_t t, float total, float* sums) const {
    Half* target = out + (row * heads + head) * values.dim;
    for (int64_t tile = 0; tile < value_tiles(); ++tile, target += kTileColumns) {
      const Floats value = load(place(sums + tile / 2 * kBlockSums, t, tile % 2)) / (total == 0 ? 1.0f : total);
      Half rounded[kTileColumns];
      store(rounded, value);
      std::memcpy(target, rounded, std::min(kTileColumns, values.dim - tile * kTileColumns) * sizeof(Half));
    }
  }
};

}  // namespace loraplex
