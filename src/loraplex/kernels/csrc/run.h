// A base product and the adapters behind it, split over threads.
#pragma once

#include <ATen/Parallel.h>
#include <omp.h>

#include "adapters.h"
#include "arguments.h"

namespace loraplex {

// The base product (unless base.weight is null: then y holds it already) and the adapters. Threads are woken once for
// everything: waking them costs as much as a small adapter's arithmetic.
template <typename T, typename Base>
void run(const Base& base, const Adapters& adapters) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < adapters.num_hidden) buffer.resize(adapters.num_hidden);
  float* hidden = buffer.data();
  auto first_phase = [&](int64_t i, int64_t n, Ahead& ahead) {
    const int64_t first = adapters.first_unit(i, n), last = adapters.first_unit(i + 1, n);
    const int64_t begin = share(base.out, i, n), end = share(base.out, i + 1, n);
    ahead.clear();
    adapters.add_shrink_to<T>(ahead, first, last, base.in);
    adapters.add_expand_to<T>(ahead, i, n, base.out);
    if (base.weight != nullptr) base.product(begin, end, ahead);
    adapters.shrink<T>(first, last, base.x, base.in, hidden, ahead);
  };
  const auto route = [&](int64_t i, int64_t n) { adapters.route<T>(i, n, base.x, base.in, hidden); };
  auto second_phase = [&](int64_t i, int64_t n, Ahead& ahead) {
    adapters.expand<T>(i, n, hidden, base.y, base.out, ahead);
  };
  const int64_t work = adapters.num_hidden * base.in + (base.weight == nullptr ? 0 : base.out * base.in);
  const int num_threads = work < kSmallWork ? 1 : at::get_num_threads();
  if (num_threads == 1) {
    thread_local Ahead ahead;
    first_phase(0, 1, ahead);
    route(0, 1);
    second_phase(0, 1, ahead);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    thread_local Ahead ahead;
    first_phase(i, n, ahead);
    if (!adapters.segments.empty()) {
#pragma omp barrier
      if (!adapters.routes.empty()) {
        route(i, n);
#pragma omp barrier
      }
      second_phase(i, n, ahead);
    }
  }
}

}  // namespace loraplex
