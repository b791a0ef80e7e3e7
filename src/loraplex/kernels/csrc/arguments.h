// What the operators have in common: checks of their arguments, dtypes, and the adapters of one module.
#pragma once

#include <ATen/core/Tensor.h>

#include "adapters.h"

namespace loraplex {

constexpr int64_t kSmallWork = 8192;  // multiply-adds below which one thread does it all

inline void check_input(const at::Tensor& x, const at::Tensor& other) {
  TORCH_CHECK(x.is_contiguous() && other.is_contiguous(), "x, the weight and y must be contiguous");
  TORCH_CHECK(x.scalar_type() == other.scalar_type(), "x, the weight and y must have one dtype");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "dtype ", x.scalar_type(),
              " is not supported; use float32 or bfloat16");
}

// y may keep float32 sums of what is bfloat16 otherwise.
inline void check_output(const at::Tensor& x, const at::Tensor& y) {
  if (y.scalar_type() != at::kFloat) return check_input(x, y);
  check_input(x, x);
  TORCH_CHECK(y.is_contiguous(), "y must be contiguous");
}

// table [slots, modules, 3]: addresses of lora_a and lora_b, and the rank (0: this module is not adapted).
// scalings [slots, modules]. segments [n, 4]: start, stop, slot, first gate. gates: float32.
inline Adapters read_adapters(const at::Tensor& table, const at::Tensor& scalings, int64_t module,
                       const at::Tensor& segments, const float* gates, int64_t num_tokens) {
  const int64_t modules = table.size(1);
  const int64_t* entries = table.const_data_ptr<int64_t>();
  const int64_t* rows = segments.const_data_ptr<int64_t>();
  Adapters adapters;
  adapters.segments.reserve(segments.size(0));
  for (int64_t i = 0; i < segments.size(0); ++i, rows += 4) {
    TORCH_CHECK(rows[0] >= 0 && rows[1] <= num_tokens && rows[2] >= 0 && rows[2] < table.size(0), "segment ", i,
                " lies outside the batch or the table");
    const int64_t cell = rows[2] * modules + module;
    const int64_t rank = entries[cell * 3 + 2];
    if (rank == 0 || rows[0] >= rows[1]) continue;
    adapters.add({rows[0], rows[1], reinterpret_cast<const void*>(entries[cell * 3]),
                  reinterpret_cast<const void*>(entries[cell * 3 + 1]), rank,
                  scalings.const_data_ptr<float>()[cell], gates + rows[3], 0, 0, 0});
  }
  return adapters;
}

}  // namespace loraplex

#define LORAPLEX_DISPATCH(TENSOR, ...)              \
  if (TENSOR.scalar_type() == at::kFloat) {         \
    using scalar = float;                           \
    __VA_ARGS__;                                    \
  } else {                                          \
    using scalar = c10::BFloat16;                   \
    __VA_ARGS__;                                    \
  }
