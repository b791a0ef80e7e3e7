// A linear module's weight in any of the forms in which it may lie, and the product that takes it.
#pragma once

#include "column_linear.h"
#include "int8_tiles.h"
#include "tiles.h"

namespace loraplex {

// How a weight's values lie: [out, in], [in, out], or packed as tiles.h or, with 8 bits a value, int8_layout.h says.
enum class WeightForm { kRows, kColumns, kTiles, kInt8 };

template <typename T>
struct LinearModule {
  const T* weight;  // or null: the layer has no such module
  const T* bias;    // or null
  WeightForm form;
  int64_t in, out;
  int64_t group;  // of 8-bit values that share a scale

  bool exists() const { return weight != nullptr; }

  // Of the weight, as it lies; not of one with 8 bits a value.
  int64_t num_values() const {
    return form == WeightForm::kTiles ? tiled_size(out, in) : in * out;
  }

  // use(product) for the product that the weight's form takes, of x [tokens, in] to y [tokens, out].
  template <typename F>
  auto with_product(const T* x, T* y, int64_t num_tokens, Tiling tiling, const F& use) const {
    if constexpr (std::is_same_v<T, Half>) {
      if (form == WeightForm::kInt8) {
        return use(Int8Linear<>{reinterpret_cast<const uint8_t*>(weight), bias, x, y, in, out, num_tokens, group,
                                best_int8_tiling()});
      }
      if (form == WeightForm::kTiles) return use(TiledLinear<>{weight, bias, x, y, in, out, num_tokens, tiling});
    }
    if (form == WeightForm::kColumns) return use(ColumnLinear<T>{weight, bias, x, y, in, out, num_tokens});
    return use(Linear<T>{weight, bias, x, y, in, out, num_tokens});
  }
};

}  // namespace loraplex
