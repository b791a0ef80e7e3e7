// How a weight W [out, in] of 8-bit integers lies packed, with its scales behind it in the same buffer.
//
// The integers are tiles of 16 columns of y = W x and 64 values of x (32 where a scale holds for 32 or 96 of them), in the
// order of tile_layout.h. A tile holds for each four values the 16 columns' four: 64 bytes, a vector. Ends that fill no
// tile are zeros.
//
// A scale holds for a whole column, and is float32; or for `group` values of one, and is float16: [32 columns] of each
// group, one block of columns after the other.
#pragma once

#include <c10/util/Half.h>

#include "tile_layout.h"
#include "vectors.h"

namespace loraplex {

constexpr int64_t kQuad = 4;  // values of a column that lie beside each other

struct Int8Layout {
  int64_t out, in, group;  // 0: a scale for each column

  int64_t depth() const { return group % 64 == 0 ? 64 : 32; }
  int64_t num_steps() const { return tiles_of(in, depth()); }
  int64_t num_tiles() const { return tiles_of(out, kTileColumns); }
  int64_t num_groups() const { return group == 0 ? 1 : tiles_of(in, group); }
  int64_t padded_out() const { return tiles_of(out, kBlockColumns) * kBlockColumns; }
  int64_t value_bytes() const { return num_tiles() * num_steps() * kTileColumns * depth(); }
  int64_t scale_bytes() const { return padded_out() * num_groups() * (group == 0 ? sizeof(float) : sizeof(c10::Half)); }
  int64_t bytes() const { return value_bytes() + scale_bytes(); }

  // Where column tile `tile` has its part for step `step`.
  int64_t tile_place(int64_t tile, int64_t step) const {
    const int64_t block = tile / 2, width = std::min<int64_t>(2, num_tiles() - 2 * block);
    return (2 * block * num_steps() + step * width + tile % 2) * kTileColumns * depth();
  }
  int64_t value_place(int64_t column, int64_t k) const {
    const int64_t inside = k % depth();
    return tile_place(column / kTileColumns, k / depth()) +
           (inside / kQuad * kTileColumns + column % kTileColumns) * kQuad + inside % kQuad;
  }
  // Which of the scales.
  int64_t scale_place(int64_t column, int64_t group_index) const {
    return (column / kBlockColumns * num_groups() + group_index) * kBlockColumns + column % kBlockColumns;
  }
};

// Copies the columns [begin, end) of values [out, in]: to their places, or (`back`) from there.
inline void copy_int8_values(int8_t* values, int8_t* packed, const Int8Layout& layout, int64_t begin, int64_t end,
                             bool back) {
  for (int64_t column = begin; column < end; ++column) {
    int8_t* row = values + column * layout.in;
    for (int64_t k = 0; k < layout.in; k += kQuad) {
      int8_t* place = packed + layout.value_place(column, k);
      const int64_t count = std::min(kQuad, layout.in - k);
      if (back) {
        std::memcpy(row + k, place, count);
      } else {
        std::memcpy(place, row + k, count);
      }
    }
  }
}

inline void copy_int8_scales(float* scales, uint8_t* packed, const Int8Layout& layout, bool back) {
  uint8_t* area = packed + layout.value_bytes();
  const auto copy = [&]<typename S>(S* places) {
    for (int64_t column = 0; column < layout.out; ++column) {
      for (int64_t g = 0; g < layout.num_groups(); ++g) {
        S& place = places[layout.scale_place(column, g)];
        float& scale = scales[column * layout.num_groups() + g];
        if (back) {
          scale = place;
        } else {
          place = scale;
        }
      }
    }
  };
  if (layout.group == 0) return copy(reinterpret_cast<float*>(area));
  copy(reinterpret_cast<c10::Half*>(area));
}

inline Floats load(const c10::Half* p) {
#ifdef __AVX512F__
  typedef _Float16 Quarters __attribute__((vector_size(2 * kLanes)));
  Quarters h;
  std::memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Floats);
#else
  Floats v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

}  // namespace loraplex
