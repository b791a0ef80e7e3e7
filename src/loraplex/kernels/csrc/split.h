// The split of independent values over threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

namespace loraplex {

// run(first, last) on the shares of [0, count) that threads take.
template <typename F>
void split_values(int64_t count, int64_t values, const F& run) {
  constexpr int64_t kValues = 1 << 14;  // below which one thread does it all
  if (values < kValues || count == 0) return run(0, count);
  at::parallel_for(0, count, std::max<int64_t>(1, kValues * count / values), run);
}

}  // namespace loraplex
