// The base product with a bfloat16 weight that was packed once (tile_layout.h), for any number of tokens:
// y[t] = W x[t] + bias.
//
// Sums are float32, over the values in their order, whatever stands beside a token: its result has the same bits in any
// batch. The ways of computing round differently; a process uses one of them.
#pragma once

#include <c10/util/Exception.h>

#include "ahead.h"
#include "tile_unit.h"

namespace loraplex {

constexpr int64_t kPanel = 256;        // tokens that pass all columns together: the weights are read once for them

// Steps of depth that a panel takes together, so that `bytes` of each stay in the second cache beside what streams by.
inline int64_t slice_steps_of(int64_t bytes) { return std::max<int64_t>(1, second_cache() * 5 / 8 / bytes); }

// Steps of a block of columns, so that their weights stay in the first cache while a panel passes.
inline int64_t part_steps_of(int64_t bytes) { return std::max<int64_t>(1, first_cache() * 2 / 3 / bytes); }

// Plain vectors, AVX-512's products of bfloat16 pairs, tiles (AMX), and tiles in plain C++, for tests.
enum class Tiling { kPlain, kVectors, kTiles, kEmulated };

// The fastest way that this machine has.
inline Tiling best_tiling() {
#ifdef LORAPLEX_AMX
  if (may_use_tiles()) return Tiling::kTiles;
#endif
#ifdef __AVX512BF16__
  return Tiling::kVectors;
#else
  return Tiling::kPlain;
#endif
}

// The way of a number: -1 is the fastest.
inline Tiling tiling_of(int64_t number) {
  TORCH_CHECK(number >= -1 && (number <= static_cast<int64_t>(best_tiling()) ||
                               number == static_cast<int64_t>(Tiling::kEmulated)),
              "this machine has no way ", number);
  return number < 0 ? best_tiling() : static_cast<Tiling>(number);
}

// What one turn multiplies: up to 32 tokens by up to 32 columns, over `steps` of the depth.
struct Turn {
  const Half* x;     // the first token tile's part of the first step
  int64_t x_stride;  // values from one token tile to the next
  const Half* w;     // the block's part of the first step: `width` tiles a step
  int width;
  int64_t steps;
  int num_tokens;
  float* sums;  // [2 token tiles][2 column tiles][16][16]
  bool begins;  // else sums go on from what is there
  bool asks;    // for the weights that follow
};

// What memory delivers to a core within some 400 ns, which is longer than any waits for a line; a second cache is 16 times
// as large at least.
constexpr int64_t kAheadBytes = 16384;

template <int T, int C, bool use_vectors>
inline void multiply_tokens(const Turn& turn, int token) {
  const Half* x = turn.x + token / kTileTokens * turn.x_stride + token % kTileTokens * kTileDepth;
  float* sums = turn.sums + (token / kTileTokens * 2 * kTileTokens + token % kTileTokens) * kTileColumns;
  constexpr int64_t column_sums = kTileTokens * kTileColumns;
  Floats acc[T * C];
  each<T>([&](auto t) {
    each<C>([&](auto c) { acc[t * C + c] = turn.begins ? Floats{} : load(sums + c * column_sums + t * kTileColumns); });
  });
  const Half* w = turn.w;
  for (int64_t step = 0; step < turn.steps; ++step, x += kTileValues, w += C * kTileValues) {
    for (int64_t pair = 0; pair < kTileDepth / 2; ++pair) {
      Words wv[C];
      each<C>([&](auto c) {
        const Half* line = w + c * kTileValues + pair * kTileDepth;
        std::memcpy(&wv[c], line, sizeof(Words));
        if (turn.asks && token == 0) ask_for(reinterpret_cast<const char*>(line) + kAheadBytes);
      });
      each<T>([&](auto t) {
        uint32_t xt;
        std::memcpy(&xt, x + t * kTileDepth + 2 * pair, sizeof(xt));
#ifdef __AVX512BF16__
        if constexpr (use_vectors) {
          const __m512bh xv = (__m512bh)_mm512_set1_epi32(static_cast<int>(xt));
          each<C>([&](auto c) {
            acc[t * C + c] = (Floats)_mm512_dpbf16_ps((__m512)acc[t * C + c], (__m512bh)wv[c], xv);
          });
          return;
        }
#endif
        float first, second;
        const uint32_t low = xt << 16, high = xt & 0xffff0000;
        std::memcpy(&first, &low, sizeof(first));
        std::memcpy(&second, &high, sizeof(second));
        each<C>([&](auto c) {
          acc[t * C + c] += reinterpret_cast<Floats>(wv[c] << 16) * first;
          acc[t * C + c] += reinterpret_cast<Floats>(wv[c] & 0xffff0000) * second;
        });
      });
    }
  }
  each<T>([&](auto t) {
    each<C>([&](auto c) { store(sums + c * column_sums + t * kTileColumns, acc[t * C + c]); });
  });
}

template <bool use_vectors, int C>
inline void multiply_vectors(const Turn& turn) {
  constexpr int T = use_vectors ? 8 : 4;
  int token = 0;
  for (; token + T <= turn.num_tokens; token += T) multiply_tokens<T, C, use_vectors>(turn, token);
  if (T > 4 && token + 4 <= turn.num_tokens) {
    multiply_tokens<4, C, use_vectors>(turn, token);
    token += 4;
  }
  for (; token < turn.num_tokens; ++token) multiply_tokens<1, C, use_vectors>(turn, token);
}

template <typename Unit, bool two_tokens, bool two_columns>
inline void multiply_tiles(const Turn& turn) {
  constexpr int64_t sums = kTileTokens * kTileColumns;
  Unit::written();
  if (turn.begins) {
    Unit::template zero<0>();
    if (two_columns) Unit::template zero<1>();
    if (two_tokens) Unit::template zero<2>();
    if (two_tokens && two_columns) Unit::template zero<3>();
  } else {
    Unit::template load<0>(turn.sums);
    if (two_columns) Unit::template load<1>(turn.sums + sums);
    if (two_tokens) Unit::template load<2>(turn.sums + 2 * sums);
    if (two_tokens && two_columns) Unit::template load<3>(turn.sums + 3 * sums);
  }
  const Half *x = turn.x, *w = turn.w;
  constexpr int64_t width = two_columns ? 2 : 1;
  for (int64_t step = 0; step < turn.steps; ++step, x += kTileValues, w += width * kTileValues) {
    Unit::template load<6>(w);
    if (two_columns) Unit::template load<7>(w + kTileValues);
    if (turn.asks) {
      const char* ahead = reinterpret_cast<const char*>(w) + kAheadBytes;
      each<width * 16>([&](auto line) { ask_for(ahead + line * 64); });
    }
    Unit::template load<4>(x);
    Unit::template multiply<0, 4, 6>();
    if (two_columns) Unit::template multiply<1, 4, 7>();
    if (two_tokens) {
      Unit::template load<5>(x + turn.x_stride);
      Unit::template multiply<2, 5, 6>();
      if (two_columns) Unit::template multiply<3, 5, 7>();
    }
  }
  Unit::template store<0>(turn.sums);
  if (two_columns) Unit::template store<1>(turn.sums + sums);
  if (two_tokens) Unit::template store<2>(turn.sums + 2 * sums);
  if (two_tokens && two_columns) Unit::template store<3>(turn.sums + 3 * sums);
}

template <typename Unit>
inline void multiply_tiles(const Turn& turn) {
  const bool two_columns = turn.width == 2;
  if (turn.num_tokens > kTileTokens) {
    return two_columns ? multiply_tiles<Unit, true, true>(turn) : multiply_tiles<Unit, true, false>(turn);
  }
  return two_columns ? multiply_tiles<Unit, false, true>(turn) : multiply_tiles<Unit, false, false>(turn);
}

inline void multiply(const Turn& turn, Tiling tiling) {
  switch (tiling) {
    case Tiling::kEmulated:
      return multiply_tiles<EmulatedTiles>(turn);
#ifdef LORAPLEX_AMX
    case Tiling::kTiles:
      return multiply_tiles<ProcessorTiles>(turn);
#endif
#ifdef __AVX512BF16__
    case Tiling::kVectors:
      return turn.width == 2 ? multiply_vectors<true, 2>(turn) : multiply_vectors<true, 1>(turn);
#endif
    default:
      return turn.width == 2 ? multiply_vectors<false, 2>(turn) : multiply_vectors<false, 1>(turn);
  }
}

inline void configure(Tiling tiling, int num_tokens) {
  if (tiling == Tiling::kEmulated) EmulatedTiles::configure(tile_config(num_tokens));
#ifdef LORAPLEX_AMX
  if (tiling == Tiling::kTiles) ProcessorTiles::configure(tile_config(num_tokens));
#endif
}

inline bool uses_tiles(Tiling tiling) { return tiling == Tiling::kTiles || tiling == Tiling::kEmulated; }

inline void release(Tiling tiling) {
#ifdef LORAPLEX_AMX
  if (tiling == Tiling::kTiles) ProcessorTiles::release();
#endif
}

template <typename O = Half>  // float: the sums as they are
struct TiledLinear {
  const Half* weight;  // packed
  const Half* bias;    // [out] or null
  const Half* x;       // [tokens, in]
  O* y;                // [tokens, out]
  int64_t in, out, num_tokens;
  Tiling tiling;

  void product(int64_t begin, int64_t end, Ahead& ahead) const {
    columns(begin, end, ahead, ahead.share(num_turns(begin, end)));
  }

  // In which something is asked for. Tiles of few tokens wait for their own weights, and take longer with every line
  // that is asked for beside them.
  int64_t num_turns(int64_t begin, int64_t end) const {
    if (uses_tiles(tiling)) return 0;
    return tiles_of(end - begin, kBlockColumns) * tiles_of(num_tokens, kBlockTokens) *
           (num_tokens <= kBlockTokens ? 1 : tiles_of(tiles_of(in, kTileDepth), part_steps()));
  }

  // The columns [begin, end) of y, where begin is a multiple of a block's. Each turn asks for `portions` of what lies
  // ahead.
  void columns(int64_t begin, int64_t end, Ahead& ahead, int64_t portions) const {
    for (int64_t token = 0; token < num_tokens; token += kPanel) {
      panel(begin, end, token, std::min(kPanel, num_tokens - token), ahead, portions);
    }
    release(tiling);
  }

 private:
  static int64_t part_steps() { return part_steps_of(kBlockColumns * kTileDepth * sizeof(Half)); }

  void panel(int64_t begin, int64_t end, int64_t first, int64_t count, Ahead& ahead, int64_t portions) const {
    const int64_t num_steps = tiles_of(in, kTileDepth), num_blocks = tiles_of(count, kBlockTokens);
    // Few tokens go through the whole depth at once: nothing is read twice.
    const bool are_few = count <= kBlockTokens;
    const int64_t num_slices = are_few ? 1 : tiles_of(num_steps, slice_steps_of(kPanel * kTileDepth * sizeof(Half)));
    const int64_t slice_steps = tiles_of(num_steps, num_slices);
    const int64_t column_sums = num_blocks * 4 * kTileTokens * kTileColumns;
    const int64_t kept = num_slices == 1 ? 0 : column_sums;  // from a block of columns to the next
    thread_local std::vector<float> buffer;
    const int64_t size = column_sums + kept * tiles_of(end - begin, kBlockColumns);
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    int configured = 0;
    for (int64_t slice = 0; slice < num_steps; slice += slice_steps) {
      const int64_t steps = std::min(slice_steps, num_steps - slice);
      const Half* tokens = packed_tokens(x + first * in, in, count, slice * kTileDepth, steps);
      float* sums = buffer.data();
      for (int64_t column = begin; column < end; column += kBlockColumns, sums += kept) {
        const int64_t tile = column / kTileColumns, num_tiles = tiles_of(out, kTileColumns);
        const int width = static_cast<int>(std::min<int64_t>(2, num_tiles - tile));
        const Half* w = weight + tile_place(tile, slice, num_tiles, num_steps);
        const int64_t part = are_few ? steps : part_steps();
        for (int64_t step = 0; step < steps; step += part) {
          for (int64_t t = 0; t < count; t += kBlockTokens) {
            const int block = static_cast<int>(std::min(kBlockTokens, count - t));
            if (block != configured) configure(tiling, configured = block);
            multiply({tokens + t * steps * kTileDepth + step * kTileValues, steps * kTileValues,
                      w + step * width * kTileValues, width, std::min(part, steps - step), block,
                      sums + t / kBlockTokens * 4 * kTileTokens * kTileColumns, slice + step == 0, t == 0},
                     tiling);
            if (!uses_tiles(tiling)) ahead.ask(portions);
          }
        }
        if (slice + steps < num_steps) continue;
        for (int64_t t = 0; t < count; ++t) {
          put(sums + t / kBlockTokens * 4 * kTileTokens * kTileColumns, t % kBlockTokens, first + t, column);
        }
      }
    }
  }

  void put(const float* sums, int64_t row, int64_t token, int64_t column) const {
    const float* from = sums + (row / kTileTokens * 2 * kTileTokens + row % kTileTokens) * kTileColumns;
    for (int64_t c = column; c < std::min(column + kBlockColumns, out); c += kTileColumns) {
      Floats values = load(from);
      from += kTileTokens * kTileColumns;
      O* target = y + token * out + c;
      const int64_t count = std::min(kTileColumns, out - c);
      if (count == kTileColumns) {
        if (bias != nullptr) values += load(bias + c);
        store(target, values);
        continue;
      }
      for (int64_t i = 0; i < count; ++i) {
        target[i] = static_cast<O>(values[i] + (bias == nullptr ? 0.0f : float(bias[c + i])));
      }
    }
  }
};

}  // namespace loraplex
