// How a bfloat16 weight W [out, in] lies packed: as tiles of 16 columns of y = W x and 32 values of x, in the order in
// which they are read: for each block of two tiles' columns, for each step of 32 values, one tile after the other. A tile
// holds for each pair of values the 16 columns' pairs: 64 bytes, a vector. AMX reads it as it is; AVX-512 multiplies a
// line by one token's pair; anything else does the same in float32. Ends that fill no tile are zeros.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace loraplex {

using Half = c10::BFloat16;

constexpr int64_t kTileColumns = 16, kTileDepth = 32, kTileTokens = 16;
constexpr int64_t kTileValues = kTileColumns * kTileDepth;
constexpr int64_t kBlockColumns = 2 * kTileColumns, kBlockTokens = 2 * kTileTokens;

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

}  // namespace loraplex
