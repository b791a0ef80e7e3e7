// The base product with bfloat16 weights that were packed once, for any number of tokens: y[t] = W x[t] + bias.
//
// W [out, in] lies as tiles of 16 columns of y and 32 values of x, in the order in which they are read: for each block
// of two tiles' columns, for each step of 32 values, one tile after the other. A tile holds for each pair of values the
// 16 columns' pairs: 64 bytes, a vector. AMX reads it as it is; AVX-512 multiplies a line by one token's pair; anything
// else does the same in float32. Ends that fill no tile are zeros.
//
// Sums are float32, over the values in their order, whatever stands beside a token: its result has the same bits in any
// batch. The three ways round differently; a process uses one of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ahead.h"

#if defined(__AVX512BF16__) || defined(__AMX_BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__) && defined(__linux__)
#define LORAPLEX_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace loraplex {

using Half = c10::BFloat16;

constexpr int64_t kTileColumns = 16, kTileDepth = 32, kTileTokens = 16;
constexpr int64_t kTileValues = kTileColumns * kTileDepth;
constexpr int64_t kBlockColumns = 2 * kTileColumns, kBlockTokens = 2 * kTileTokens;
constexpr int64_t kPanel = 256;        // tokens that pass all columns together: the weights are read once for them
constexpr int64_t kSliceSteps = 80;    // of depth, together: a panel's values stay in the second cache
constexpr int64_t kPartSteps = 16;     // of depth, of a block: its weights stay in the first cache while a panel passes

constexpr int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

// Values of the packed weight.
constexpr int64_t tiled_size(int64_t out, int64_t in) {
  return tiles_of(out, kTileColumns) * tiles_of(in, kTileDepth) * kTileValues;
}

// Where column tile `tile` has its part for step `step`.
inline int64_t tile_place(int64_t tile, int64_t step, int64_t num_tiles, int64_t num_steps) {
  const int64_t block = tile / 2, width = std::min<int64_t>(2, num_tiles - 2 * block);
  return (2 * block * num_steps + step * width + tile % 2) * kTileValues;
}

// Copies the tiles [begin, end) of W's columns: to their places, or (`back`) from there.
inline void copy_tiles(Half* weight, Half* tiled, int64_t out, int64_t in, int64_t begin, int64_t end, bool back) {
  const int64_t num_tiles = tiles_of(out, kTileColumns), num_steps = tiles_of(in, kTileDepth);
  for (int64_t tile = begin; tile < end; ++tile) {
    for (int64_t step = 0; step < num_steps; ++step) {
      Half* place = tiled + tile_place(tile, step, num_tiles, num_steps);
      if (!back) std::memset(place, 0, kTileValues * sizeof(Half));
      const int64_t depth = std::min(kTileDepth, in - step * kTileDepth);
      const int64_t columns = std::min(kTileColumns, out - tile * kTileColumns);
      for (int64_t c = 0; c < columns; ++c) {
        Half* row = weight + (tile * kTileColumns + c) * in + step * kTileDepth;
        for (int64_t k = 0; k < depth; ++k) {
          Half& packed = place[k / 2 * kTileDepth + 2 * c + k % 2];
          if (back) {
            row[k] = packed;
          } else {
            packed = row[k];
          }
        }
      }
    }
  }
}

// Values [first, first + 32 * steps) of x [tokens, in] as tiles [tokens / 16][steps][16, 32]; ends are zeros. Valid until
// the thread packs again.
inline const Half* packed_tokens(const Half* x, int64_t in, int64_t num_tokens, int64_t first, int64_t num_steps) {
  thread_local std::vector<Half> buffer;
  const int64_t size = tiles_of(num_tokens, kTileTokens) * num_steps * kTileValues;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  const int64_t count = std::min(num_steps * kTileDepth, in - first);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const Half* source = x + t * in + first;
    Half* target = buffer.data() + (t / kTileTokens * num_steps * kTileTokens + t % kTileTokens) * kTileDepth;
    int64_t k = 0;
    for (; k + kTileDepth <= count; k += kTileDepth, target += kTileValues) {
      std::memcpy(target, source + k, kTileDepth * sizeof(Half));
    }
    if (k < count) {
      std::memcpy(target, source + k, (count - k) * sizeof(Half));
      std::memset(target + count - k, 0, (kTileDepth - count + k) * sizeof(Half));
    }
  }
  return buffer.data();
}

enum class Tiling { kPlain, kVectors, kTiles };

#ifdef LORAPLEX_AMX
// Linux gives a process the tile registers when it asks for them.
inline bool may_use_tiles() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}
#endif

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

#ifdef LORAPLEX_AMX

// GCC's intrinsics don't say which memory the instructions read: what was written to it must not stay in registers.
inline void written() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums [token tile][column tile], 4 and 5 tokens, 6 and 7 weights.
inline void configure_tiles(int num_tokens) {
  TileConfig config;
  const int first = std::min<int>(num_tokens, kTileTokens), second = std::max<int>(1, num_tokens - kTileTokens);
  for (int t = 0; t < 8; ++t) {
    config.bytes[t] = 64;
    config.rows[t] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = first;
  config.rows[2] = config.rows[3] = config.rows[5] = second;
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}

template <bool two_tokens, bool two_columns>
inline void multiply_tiles(const Turn& turn) {
  constexpr int64_t sums = kTileTokens * kTileColumns;
  written();
  if (turn.begins) {
    _tile_zero(0);
    if (two_columns) _tile_zero(1);
    if (two_tokens) _tile_zero(2);
    if (two_tokens && two_columns) _tile_zero(3);
  } else {
    _tile_loadd(0, turn.sums, 64);
    if (two_columns) _tile_loadd(1, turn.sums + sums, 64);
    if (two_tokens) _tile_loadd(2, turn.sums + 2 * sums, 64);
    if (two_tokens && two_columns) _tile_loadd(3, turn.sums + 3 * sums, 64);
  }
  const Half *x = turn.x, *w = turn.w;
  constexpr int64_t width = two_columns ? 2 : 1;
  for (int64_t step = 0; step < turn.steps; ++step, x += kTileValues, w += width * kTileValues) {
    _tile_loadd(6, w, 64);
    if (two_columns) _tile_loadd(7, w + kTileValues, 64);
    if (turn.asks) {
      const char* ahead = reinterpret_cast<const char*>(w) + kAheadBytes;
      each<width * 16>([&](auto line) { ask_for(ahead + line * 64); });
    }
    _tile_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (two_columns) _tile_dpbf16ps(1, 4, 7);
    if (two_tokens) {
      _tile_loadd(5, x + turn.x_stride, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (two_columns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, turn.sums, 64);
  if (two_columns) _tile_stored(1, turn.sums + sums, 64);
  if (two_tokens) _tile_stored(2, turn.sums + 2 * sums, 64);
  if (two_tokens && two_columns) _tile_stored(3, turn.sums + 3 * sums, 64);
}

#endif

inline void multiply(const Turn& turn, Tiling tiling) {
  const bool two_columns = turn.width == 2;
#ifdef LORAPLEX_AMX
  if (tiling == Tiling::kTiles) {
    if (turn.num_tokens > kTileTokens) {
      return two_columns ? multiply_tiles<true, true>(turn) : multiply_tiles<true, false>(turn);
    }
    return two_columns ? multiply_tiles<false, true>(turn) : multiply_tiles<false, false>(turn);
  }
#endif
#ifdef __AVX512BF16__
  if (tiling == Tiling::kVectors) {
    return two_columns ? multiply_vectors<true, 2>(turn) : multiply_vectors<true, 1>(turn);
  }
#endif
  return two_columns ? multiply_vectors<false, 2>(turn) : multiply_vectors<false, 1>(turn);
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
    columns(begin, end, ahead, ahead.share(num_tiles(begin, end)));
  }

  int64_t num_tiles(int64_t begin, int64_t end) const {
    return tiles_of(end - begin, kBlockColumns) * tiles_of(num_tokens, kBlockTokens) *
           (num_tokens <= kBlockTokens ? 1 : tiles_of(tiles_of(in, kTileDepth), kPartSteps));
  }

  // The columns [begin, end) of y, where begin is a multiple of a block's. Each turn asks for `portions` of what lies
  // ahead.
  void columns(int64_t begin, int64_t end, Ahead& ahead, int64_t portions) const {
    for (int64_t token = 0; token < num_tokens; token += kPanel) {
      panel(begin, end, token, std::min(kPanel, num_tokens - token), ahead, portions);
    }
#ifdef LORAPLEX_AMX
    if (tiling == Tiling::kTiles) _tile_release();
#endif
  }

 private:
  void panel(int64_t begin, int64_t end, int64_t first, int64_t count, Ahead& ahead, int64_t portions) const {
    const int64_t num_steps = tiles_of(in, kTileDepth), num_blocks = tiles_of(count, kBlockTokens);
    // Few tokens go through the whole depth at once: nothing is read twice.
    const bool are_few = count <= kBlockTokens;
    const int64_t num_slices = are_few ? 1 : tiles_of(num_steps, kSliceSteps);
    const int64_t slice_steps = tiles_of(num_steps, num_slices);
    const int64_t column_sums = num_blocks * 4 * kTileTokens * kTileColumns;
    const int64_t kept = num_slices == 1 ? 0 : column_sums;  // from a block of columns to the next
    thread_local std::vector<float> buffer;
    const int64_t size = column_sums + kept * tiles_of(end - begin, kBlockColumns);
    if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
    [[maybe_unused]] int configured = 0;
    for (int64_t slice = 0; slice < num_steps; slice += slice_steps) {
      const int64_t steps = std::min(slice_steps, num_steps - slice);
      const Half* tokens = packed_tokens(x + first * in, in, count, slice * kTileDepth, steps);
      float* sums = buffer.data();
      for (int64_t column = begin; column < end; column += kBlockColumns, sums += kept) {
        const int64_t tile = column / kTileColumns, num_tiles = tiles_of(out, kTileColumns);
        const int width = static_cast<int>(std::min<int64_t>(2, num_tiles - tile));
        const Half* w = weight + tile_place(tile, slice, num_tiles, num_steps);
        const int64_t part = are_few ? steps : kPartSteps;
        for (int64_t step = 0; step < steps; step += part) {
          for (int64_t t = 0; t < count; t += kBlockTokens) {
            const int block = static_cast<int>(std::min(kBlockTokens, count - t));
#ifdef LORAPLEX_AMX
            if (tiling == Tiling::kTiles && block != configured) configure_tiles(configured = block);
#endif
            multiply({tokens + t * steps * kTileDepth + step * kTileValues, steps * kTileValues,
                      w + step * width * kTileValues, width, std::min(part, steps - step), block,
                      sums + t / kBlockTokens * 4 * kTileTokens * kTileColumns, slice + step == 0, t == 0},
                     tiling);
            ahead.ask(portions);
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
