// The operators: checks, dtypes, and the split over threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include "adapters.h"
#include "linear.h"

namespace {

using loraplex::Adapters;
using loraplex::kPair;
using loraplex::Linear;

constexpr int64_t kSmallWork = 8192;  // multiply-adds below which one thread does it all

// The share of `thread` in `total` columns, in whole pairs of vectors.
inline int64_t share(int64_t total, int64_t thread, int64_t num_threads) {
  const int64_t pairs = (total + kPair - 1) / kPair;
  return std::min(total, pairs * thread / num_threads * kPair);
}

// The base product (unless base.weight is null: then y holds it already) and the adapters. Threads are woken once for
// everything: waking them costs as much as a small adapter's arithmetic.
template <typename T>
void run(const Linear<T>& base, const Adapters& adapters) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < adapters.num_hidden) buffer.resize(adapters.num_hidden);
  float* hidden = buffer.data();
  auto first_phase = [&](int64_t i, int64_t n) {
    if (base.weight != nullptr) base.columns(share(base.out, i, n), share(base.out, i + 1, n));
    adapters.shrink<T>(adapters.num_blocks * i / n, adapters.num_blocks * (i + 1) / n, base.x, base.in, hidden);
  };
  auto second_phase = [&](int64_t i, int64_t n) {
    adapters.expand<T>(share(base.out, i, n), share(base.out, i + 1, n), hidden, base.y, base.out);
  };
  const int64_t work = adapters.num_hidden * base.in + (base.weight == nullptr ? 0 : base.out * base.in);
  const int num_threads = work < kSmallWork ? 1 : at::get_num_threads();
  if (num_threads == 1) {
    first_phase(0, 1);
    second_phase(0, 1);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    first_phase(i, n);
    if (!adapters.segments.empty()) {
#pragma omp barrier
      second_phase(i, n);
    }
  }
}

// table [slots, modules, 3]: addresses of lora_a and lora_b, and the rank (0: this module is not adapted).
// scalings [slots, modules]. segments [n, 4]: start, stop, slot, first gate. gates: float32.
Adapters read_adapters(const at::Tensor& table, const at::Tensor& scalings, int64_t module,
                       const at::Tensor& segments, const at::Tensor& gates, int64_t num_tokens) {
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
                  scalings.const_data_ptr<float>()[cell], gates.const_data_ptr<float>() + rows[3], 0, 0});
  }
  return adapters;
}

template <typename T>
void dispatch(const at::Tensor& x, const at::Tensor* weight, const std::optional<at::Tensor>& bias, at::Tensor& y,
              const Adapters& adapters) {
  const int64_t in = x.size(-1), out = y.size(-1);
  run<T>(Linear<T>{weight == nullptr ? nullptr : weight->const_data_ptr<T>(),
                   bias.has_value() ? bias->const_data_ptr<T>() : nullptr, x.const_data_ptr<T>(),
                   y.mutable_data_ptr<T>(), in, out, in == 0 ? 0 : x.numel() / in},
         adapters);
}

void check_input(const at::Tensor& x, const at::Tensor& other) {
  TORCH_CHECK(x.is_contiguous() && other.is_contiguous(), "x, the weight and y must be contiguous");
  TORCH_CHECK(x.scalar_type() == other.scalar_type(), "x, the weight and y must have one dtype");
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "dtype ", x.scalar_type(),
              " is not supported; use float32 or bfloat16");
}

// y [.., out] += the adapters' part for x [.., in].
void gated_lora_(at::Tensor& y, const at::Tensor& x, const at::Tensor& table, const at::Tensor& scalings,
                 int64_t module, const at::Tensor& segments, const at::Tensor& gates) {
  check_input(x, y);
  const int64_t num_tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  TORCH_CHECK(y.numel() == num_tokens * y.size(-1), "x and y differ in their number of tokens");
  const Adapters adapters = read_adapters(table, scalings, module, segments, gates, num_tokens);
  if (adapters.segments.empty()) return;
  if (x.scalar_type() == at::kFloat) {
    dispatch<float>(x, nullptr, std::nullopt, y, adapters);
  } else {
    dispatch<c10::BFloat16>(x, nullptr, std::nullopt, y, adapters);
  }
}

// y [.., out] = x [.., in] weight^T + bias + the adapters' part.
at::Tensor gated_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& table, const at::Tensor& scalings, int64_t module,
                        const at::Tensor& segments, const at::Tensor& gates) {
  check_input(x, weight);
  TORCH_CHECK(x.size(-1) == weight.size(1), "x has ", x.size(-1), " features, the weight takes ", weight.size(1));
  if (bias.has_value()) check_input(x, *bias);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor y = at::empty(shape, x.options());
  const int64_t num_tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  const Adapters adapters = read_adapters(table, scalings, module, segments, gates, num_tokens);
  if (x.scalar_type() == at::kFloat) {
    dispatch<float>(x, &weight, bias, y, adapters);
  } else {
    dispatch<c10::BFloat16>(x, &weight, bias, y, adapters);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY(loraplex, m) {
  m.def(
      "gated_lora_(Tensor(a!) y, Tensor x, Tensor table, Tensor scalings, int module, Tensor segments, "
      "Tensor gates) -> ()");
  m.def(
      "gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor table, Tensor scalings, int module, "
      "Tensor segments, Tensor gates) -> Tensor");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) {
  m.impl("gated_lora_", gated_lora_);
  m.impl("gated_linear", gated_linear);
}
