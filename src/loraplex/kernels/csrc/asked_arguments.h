// Checks of what tells the rows that ask something of attention (asked.h).
#pragma once

#include <ATen/core/Tensor.h>

#include "asked.h"

namespace loraplex {

// Each token's group or -1 [tokens], for a table int64 [groups, .., 3].
inline const int64_t* read_groups(const at::Tensor& table, const at::Tensor& groups, int64_t num_tokens) {
  TORCH_CHECK(table.is_contiguous() && groups.is_contiguous() && table.scalar_type() == at::kLong &&
                  groups.scalar_type() == at::kLong && table.size(-1) == AskedLayer::kInts &&
                  groups.numel() == num_tokens,
              "what is asked must be int64 [groups, .., 3] and [tokens], contiguous");
  const int64_t* values = groups.const_data_ptr<int64_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    TORCH_CHECK(values[t] >= -1 && values[t] < table.size(0), "token ", t, " is of no group");
  }
  return values;
}

}  // namespace loraplex
