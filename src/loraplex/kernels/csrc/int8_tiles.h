// The base product with an 8-bit weight (int8_layout.h), for any number of tokens: y[t] = scale * (W x[t]) + bias.
//
// Tokens are 16-bit integers (int8_tokens.h), and all sums of products are whole numbers, so every way of computing them
// gives the same bits, whatever stands beside a token. With scales of groups, a group's sum is multiplied by its scale
// and added in float32, in the groups' order.
#pragma once

#include "ahead.h"
#include "int8_tokens.h"
#include "tiles.h"

namespace loraplex {

constexpr int64_t kMaxInt8Depth = 65536;  // of a sum in 32 bits
constexpr int64_t kMaxInt8Group = 256;    // of one of both digits together

// What one turn multiplies: up to 32 tokens by up to 32 columns, over `steps` of the depth.
struct Int8Turn {
  const uint8_t* x;          // the first step of the first token tile
  int64_t x_stride;          // to the second token tile
  const int32_t* high_sums;  // of the first token's first step
  int64_t high_stride;       // to the next token's
  const uint8_t* w;          // the block's part of the first step: `width` tiles a step
  int width;
  int64_t steps;
  int num_tokens;
  int32_t* sums;  // [2 token tiles][2 digits][2 column tiles][16][16]
  bool begins;    // else sums go on from what is there
  bool asks;      // for the weights that follow
};

constexpr int64_t kTileSums = kTileTokens * kTileColumns, kDigitSums = 2 * kTileSums, kTokenSums = 2 * kDigitSums;

// Where the sums of a block's token `token` begin.
inline int64_t sums_of(int64_t token) {
  return token / kTileTokens * kTokenSums + token % kTileTokens * kTileColumns;
}

template <typename Unit, int depth, bool two_columns>
inline void multiply_int8_tiles(const Int8Turn& turn) {
  constexpr int64_t tile = kTileColumns * depth, width = two_columns ? 2 : 1;
  Unit::written();
  if (turn.begins) {
    Unit::template zero<0>();
    Unit::template zero<2>();
    if (two_columns) Unit::template zero<1>();
    if (two_columns) Unit::template zero<3>();
  } else {
    Unit::template load<0>(turn.sums);
    Unit::template load<2>(turn.sums + kDigitSums);
    if (two_columns) Unit::template load<1>(turn.sums + kTileSums);
    if (two_columns) Unit::template load<3>(turn.sums + kDigitSums + kTileSums);
  }
  const uint8_t *x = turn.x, *w = turn.w;
  for (int64_t step = 0; step < turn.steps; ++step, x += Int8Tokens<depth>::kStepBytes, w += width * tile) {
    Unit::template load<6>(w);
    if (two_columns) Unit::template load<7>(w + tile);
    if (turn.asks) each<width * tile / 64>([&](auto line) { ask_for(w + kAheadBytes + line * 64); });
    Unit::template load<4>(x);
    Unit::template multiply_bytes<0, 4, 6, int8_t>();
    if (two_columns) Unit::template multiply_bytes<1, 4, 7, int8_t>();
    Unit::template load<5>(x + Int8Tokens<depth>::kLowDigit);
    Unit::template multiply_bytes<2, 5, 6, uint8_t>();
    if (two_columns) Unit::template multiply_bytes<3, 5, 7, uint8_t>();
  }
  Unit::template store<0>(turn.sums);
  Unit::template store<2>(turn.sums + kDigitSums);
  if (two_columns) Unit::template store<1>(turn.sums + kTileSums);
  if (two_columns) Unit::template store<3>(turn.sums + kDigitSums + kTileSums);
}

// More than 16 tokens: one column tile after the other, each read once for both token tiles.
template <typename Unit, int depth>
inline void multiply_int8_two_tiles(const Int8Turn& turn) {
  constexpr int64_t tile = kTileColumns * depth, low = Int8Tokens<depth>::kLowDigit;
  Unit::written();
  for (int column = 0; column < turn.width; ++column) {
    int32_t* sums = turn.sums + column * kTileSums;
    if (turn.begins) {
      each<4>([&](auto i) { Unit::template zero<i>(); });
    } else {
      each<4>([&](auto i) { Unit::template load<i>(sums + i * kDigitSums); });
    }
    const uint8_t *x = turn.x, *w = turn.w + column * tile;
    for (int64_t step = 0; step < turn.steps; ++step, x += Int8Tokens<depth>::kStepBytes, w += turn.width * tile) {
      Unit::template load<6>(w);
      if (turn.asks) each<tile / 64>([&](auto line) { ask_for(w + kAheadBytes + line * 64); });
      Unit::template load<4>(x);
      Unit::template multiply_bytes<0, 4, 6, int8_t>();
      Unit::template load<5>(x + turn.x_stride);
      Unit::template multiply_bytes<2, 5, 6, int8_t>();
      Unit::template load<7>(x + low);
      Unit::template multiply_bytes<1, 7, 6, uint8_t>();
      Unit::template load<5>(x + turn.x_stride + low);
      Unit::template multiply_bytes<3, 5, 6, uint8_t>();
    }
    each<4>([&](auto i) { Unit::template store<i>(sums + i * kDigitSums); });
  }
}

template <typename Unit, int depth>
inline void multiply_int8_tiles(const Int8Turn& turn) {
  if (turn.num_tokens > kTileTokens) return multiply_int8_two_tiles<Unit, depth>(turn);
  return turn.width == 2 ? multiply_int8_tiles<Unit, depth, true>(turn) : multiply_int8_tiles<Unit, depth, false>(turn);
}

// Four values of each of 16 columns: a line of column tile `tile`.
template <int depth>
inline Words int8_line(const uint8_t* w, int64_t tile, int64_t quad) {
  Words line;
  std::memcpy(&line, w + tile * kTileColumns * depth + quad * sizeof(Words), sizeof(line));
  return line;
}

// acc[digit] += x's digit times w, for one step of T tokens and C column tiles.

struct PlainQuads {
  // In float32, which holds the sums of one step exactly.
  template <int T, int C, int depth>
  static void step(const uint8_t* x, const uint8_t* w, Ints (&acc)[2][T * C]) {
    Floats sums[2][T * C] = {};
    for (int64_t quad = 0; quad < depth / kQuad; ++quad) {
      each<kQuad>([&](auto i) {
        Floats weights[C];
        each<C>([&](auto c) {
          const Words line = int8_line<depth>(w, c, quad);
          weights[c] = __builtin_convertvector(reinterpret_cast<Ints>(line << (24 - 8 * i)) >> 24, Floats);
        });
        each<T>([&](auto t) {
          const uint8_t* place = x + t * Int8Tokens<depth>::kLine + quad * kQuad + i;
          const float high = static_cast<int8_t>(*place), low = place[Int8Tokens<depth>::kLowDigit];
          each<C>([&](auto c) {
            sums[0][t * C + c] += weights[c] * high;
            sums[1][t * C + c] += weights[c] * low;
          });
        });
      });
    }
    each<2 * T * C>([&](auto i) { acc[i / (T * C)][i % (T * C)] += __builtin_convertvector(sums[i / (T * C)][i % (T * C)], Ints); });
  }
  static constexpr bool kOffset = false;
};

#ifdef __AVX512VNNI__
// AVX-512's products of unsigned and signed bytes. A weight plus 128 is unsigned for the high digit, which is signed;
// what that adds to a sum is 128 times the sum of the high digits.
struct VectorQuads {
  template <int T, int C, int depth>
  static void step(const uint8_t* x, const uint8_t* w, Ints (&acc)[2][T * C]) {
    for (int64_t quad = 0; quad < depth / kQuad; ++quad) {
      __m512i lines[C], raised[C];
      each<C>([&](auto c) {
        lines[c] = (__m512i)int8_line<depth>(w, c, quad);
        raised[c] = _mm512_xor_si512(lines[c], _mm512_set1_epi8(-128));
      });
      each<T>([&](auto t) {
        int32_t high, low;
        const uint8_t* place = x + t * Int8Tokens<depth>::kLine + quad * kQuad;
        std::memcpy(&high, place, sizeof(high));
        std::memcpy(&low, place + Int8Tokens<depth>::kLowDigit, sizeof(low));
        each<C>([&](auto c) {
          Ints &first = acc[0][t * C + c], &second = acc[1][t * C + c];
          first = (Ints)_mm512_dpbusd_epi32((__m512i)first, raised[c], _mm512_set1_epi32(high));
          second = (Ints)_mm512_dpbusd_epi32((__m512i)second, _mm512_set1_epi32(low), lines[c]);
        });
      });
    }
  }
  static constexpr bool kOffset = true;
};
#endif

template <typename Quads, int T, int C, int depth>
inline void multiply_int8_tokens(const Int8Turn& turn, int token) {
  int32_t* sums = turn.sums + sums_of(token);
  Ints acc[2][T * C];
  each<2 * T * C>([&](auto i) {
    constexpr int digit = i / (T * C), t = i % (T * C) / C, c = i % C;
    if (turn.begins) {
      acc[digit][t * C + c] = Ints{};
    } else {
      std::memcpy(&acc[digit][t * C + c], sums + digit * kDigitSums + c * kTileSums + t * kTileColumns, sizeof(Ints));
    }
  });
  const uint8_t* x = turn.x + token / kTileTokens * turn.x_stride + token % kTileTokens * Int8Tokens<depth>::kLine;
  const uint8_t* w = turn.w;
  for (int64_t step = 0; step < turn.steps; ++step, x += Int8Tokens<depth>::kStepBytes, w += C * kTileColumns * depth) {
    if (turn.asks && token == 0) {
      each<C * depth / kQuad>([&](auto line) { ask_for(w + kAheadBytes + line * 64); });
    }
    Quads::template step<T, C, depth>(x, w, acc);
    if constexpr (Quads::kOffset) {
      each<T>([&](auto t) {
        const int32_t offset = 128 * turn.high_sums[(token + t) * turn.high_stride + step];
        each<C>([&](auto c) { acc[0][t * C + c] -= offset; });
      });
    }
  }
  each<2 * T * C>([&](auto i) {
    constexpr int digit = i / (T * C), t = i % (T * C) / C, c = i % C;
    std::memcpy(sums + digit * kDigitSums + c * kTileSums + t * kTileColumns, &acc[digit][t * C + c], sizeof(Ints));
  });
}

template <typename Quads, int C, int depth>
inline void multiply_int8_vectors(const Int8Turn& turn) {
  int token = 0;
  for (; token + 4 <= turn.num_tokens; token += 4) multiply_int8_tokens<Quads, 4, C, depth>(turn, token);
  for (; token < turn.num_tokens; ++token) multiply_int8_tokens<Quads, 1, C, depth>(turn, token);
}

template <int depth>
inline void multiply_int8(const Int8Turn& turn, Tiling tiling) {
  const bool two = turn.width == 2;
  switch (tiling) {
    case Tiling::kEmulated:
      return multiply_int8_tiles<EmulatedTiles, depth>(turn);
#ifdef LORAPLEX_AMX
    case Tiling::kTiles:
      return multiply_int8_tiles<ProcessorTiles, depth>(turn);
#endif
#ifdef __AVX512VNNI__
    case Tiling::kVectors:
      return two ? multiply_int8_vectors<VectorQuads, 2, depth>(turn)
                 : multiply_int8_vectors<VectorQuads, 1, depth>(turn);
#endif
    default:
      return two ? multiply_int8_vectors<PlainQuads, 2, depth>(turn)
                 : multiply_int8_vectors<PlainQuads, 1, depth>(turn);
  }
}

inline void configure_int8(Tiling tiling, int num_tokens, int depth) {
  if (tiling == Tiling::kEmulated) EmulatedTiles::configure(byte_tile_config(num_tokens, depth));
#ifdef LORAPLEX_AMX
  if (tiling == Tiling::kTiles) ProcessorTiles::configure(byte_tile_config(num_tokens, depth));
#endif
}

// The fastest way that this machine has.
inline Tiling best_int8_tiling() {
  if (best_tiling() == Tiling::kTiles) return Tiling::kTiles;
#ifdef __AVX512VNNI__
  return Tiling::kVectors;
#else
  return Tiling::kPlain;
#endif
}

template <typename O = Half>  // float: the sums as they are
struct Int8Linear {
  const uint8_t* weight;  // packed, the scales behind it
  const Half* bias;       // [out] or null
  const Half* x;          // [tokens, in]
  O* y;                   // [tokens, out]
  int64_t in, out, num_tokens;
  int64_t group;  // of a scale; 0: a column's
  Tiling tiling;

  void product(int64_t begin, int64_t end, Ahead& ahead) const {
    columns(begin, end, ahead, ahead.share(num_turns(begin, end)));
  }

  int64_t num_turns(int64_t begin, int64_t end) const {
    if (uses_tiles(tiling)) return 0;  // tiles.h says why
    const int64_t parts = group == 0 ? tiles_of(in, kTileDepth * part_steps_of(kBlockColumns * kTileDepth)) : tiles_of(in, group);
    return tiles_of(end - begin, kBlockColumns) * tiles_of(num_tokens, kBlockTokens) *
           (num_tokens <= kBlockTokens && group == 0 ? 1 : parts);
  }

  // The columns [begin, end) of y, where begin is a multiple of a block's. Each turn asks for `portions` of what lies
  // ahead.
  void columns(int64_t begin, int64_t end, Ahead& ahead, int64_t portions) const {
    for (int64_t token = 0; token < num_tokens; token += kPanel) {
      const int64_t count = std::min(kPanel, num_tokens - token);
      if (layout().depth() == 64) {
        panel<64>(begin, end, token, count, ahead, portions);
      } else {
        panel<32>(begin, end, token, count, ahead, portions);
      }
    }
    release(tiling);
  }

 private:
  Int8Layout layout() const { return {out, in, group}; }

  template <int depth>
  void panel(int64_t begin, int64_t end, int64_t first, int64_t count, Ahead& ahead, int64_t portions) const {
    const Int8Layout all = layout();
    const int64_t num_steps = all.num_steps(), group_steps = group / depth;
    const bool are_few = count <= kBlockTokens;  // they go through the whole depth at once
    const int64_t part_steps = group > 0 ? group_steps : are_few ? num_steps : part_steps_of(kBlockColumns * depth);
    const int64_t slice_steps = are_few ? num_steps : tiles_of(slice_steps_of(2 * kPanel * depth), part_steps) * part_steps;
    // A block of columns' sums: float32 ones of groups, or int32 ones, kept from a slice to the next.
    const int64_t num_blocks = tiles_of(count, kBlockTokens), block_sums = 2 * kTokenSums;
    const int64_t column_sums = num_blocks * block_sums, kept = slice_steps < num_steps ? column_sums : 0;
    thread_local std::vector<int32_t> whole;
    thread_local std::vector<float> scaled;
    thread_local Int8Tokens<depth> tokens;
    const int64_t size = column_sums + kept * tiles_of(end - begin, kBlockColumns);
    if (static_cast<int64_t>(whole.size()) < size) whole.resize(size);
    if (group > 0 && static_cast<int64_t>(scaled.size()) < size) scaled.resize(size);
    int configured = 0;
    tokens.measure(x + first * in, in, count);
    for (int64_t slice = 0; slice < num_steps; slice += slice_steps) {
      const int64_t steps = std::min(slice_steps, num_steps - slice);
      tokens.pack(x + first * in, in, count, slice * depth, steps);
      int64_t place = 0;
      for (int64_t column = begin; column < end; column += kBlockColumns, place += kept) {
        const int64_t tile = column / kTileColumns;
        const int width = static_cast<int>(std::min<int64_t>(2, all.num_tiles() - tile));
        const uint8_t* w = weight + all.tile_place(tile, slice);
        for (int64_t step = 0; step < steps; step += part_steps) {
          for (int64_t t = 0; t < count; t += kBlockTokens) {
            const int block = static_cast<int>(std::min(kBlockTokens, count - t));
            if (block != configured) configure_int8(tiling, configured = block, depth);
            const int64_t sums = place + t / kBlockTokens * block_sums;
            multiply_int8<depth>({tokens.block(t, step), steps * Int8Tokens<depth>::kStepBytes, tokens.high_sums.data() + t * steps + step, steps,
                                  w + step * width * kTileColumns * depth, width, std::min(part_steps, steps - step),
                                  block, whole.data() + sums, group > 0 || slice + step == 0, t == 0},
                                 tiling);
            if (group > 0) {
              const int64_t index = (slice + step) / group_steps;
              add_group(whole.data() + sums, group_scales(column, index), block, width, index == 0, scaled.data() + sums);
            }
            if (!uses_tiles(tiling)) ahead.ask(portions);
          }
        }
        if (slice + steps < num_steps) continue;
        for (int64_t t = 0; t < count; ++t) {
          const int64_t row = place + t / kBlockTokens * block_sums + sums_of(t % kBlockTokens);
          put(whole.data() + row, scaled.data() + row, tokens.scales[t], first + t, column);
        }
      }
    }
  }

  const c10::Half* group_scales(int64_t column, int64_t index) const {
    const Int8Layout all = layout();
    return reinterpret_cast<const c10::Half*>(weight + all.value_bytes()) + all.scale_place(column, index);
  }

  // scaled += scale * (256 * high + low), for all tokens of a block.
  static void add_group(const int32_t* sums, const c10::Half* scales, int count, int width, bool begins, float* scaled) {
    for (int c = 0; c < width; ++c) {
      const Floats scale = load(scales + c * kTileColumns);
      for (int t = 0; t < count; ++t) {
        const int64_t place = sums_of(t) + c * kTileSums;
        Ints high, low;
        std::memcpy(&high, sums + place, sizeof(high));
        std::memcpy(&low, sums + kDigitSums + place, sizeof(low));
        const Floats both = __builtin_convertvector(high * 256 + low, Floats);
        store(scaled + place, (begins ? Floats{} : load(scaled + place)) + both * scale);
      }
    }
  }

  // One token's columns of a block.
  void put(const int32_t* sums, const float* scaled, float token_scale, int64_t token, int64_t column) const {
    const Int8Layout all = layout();
    const float* scales = reinterpret_cast<const float*>(weight + all.value_bytes()) + column;
    for (int64_t c = 0; c < 2 && column + c * kTileColumns < out; ++c) {
      const Floats sum = group > 0 ? load(scaled + c * kTileSums)
                                   : together(sums + c * kTileSums) * load(scales + c * kTileColumns);
      put_tile(sum * token_scale, token, column + c * kTileColumns);
    }
  }

  // 256 * high + low, rounded once.
  static Floats together(const int32_t* sums) {
    typedef double Doubles __attribute__((vector_size(8 * kLanes)));
    Ints high, low;
    std::memcpy(&high, sums, sizeof(high));
    std::memcpy(&low, sums + kDigitSums, sizeof(low));
    const Doubles both = __builtin_convertvector(high, Doubles) * 256.0 + __builtin_convertvector(low, Doubles);
    return __builtin_convertvector(both, Floats);
  }

  void put_tile(Floats values, int64_t token, int64_t column) const {
    const int64_t count = std::min(kTileColumns, out - column);
    O* target = y + token * out + column;
    if (bias != nullptr) {
      Half own[kTileColumns] = {};
      std::memcpy(own, bias + column, count * sizeof(Half));
      values += load(own);
    }
    if (count == kTileColumns) return store(target, values);
    O made[kTileColumns];
    store(made, values);
    std::memcpy(target, made, count * sizeof(O));
  }
};

}  // namespace loraplex
