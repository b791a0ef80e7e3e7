// Operators that run single parts of a layer by the formula that decoder layers have.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "arguments.h"
#include "fused.h"
#include "split.h"

namespace {

using loraplex::check_input;
using loraplex::split_values;

// Norms of x [.., size], or of each of `weight`'s rows [heads, size] for x [.., heads, size]; see norm.h.
at::Tensor norm(const at::Tensor& x, const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                double eps, bool centered, bool plus_one) {
  const int64_t size = x.size(-1);
  int64_t groups = 1;
  check_input(x, x);
  if (weight.has_value()) {
    check_input(x, *weight);
    groups = weight->numel() / size;
    TORCH_CHECK(groups * size == weight->numel() && (groups == 1 || x.size(-2) == groups), "the weight doesn't fit x");
  }
  if (bias.has_value()) {
    check_input(x, *bias);
    TORCH_CHECK(bias->numel() == groups * size, "the bias doesn't fit x");
  }
  at::Tensor out = at::empty(x.sizes(), x.options());
  LORAPLEX_DISPATCH(x, {
    const loraplex::Norm<scalar> norm{weight.has_value() ? weight->const_data_ptr<scalar>() : nullptr,
                                      bias.has_value() ? bias->const_data_ptr<scalar>() : nullptr,
                                      size,
                                      groups == 1 ? 0 : size,
                                      static_cast<float>(eps),
                                      centered,
                                      plus_one};
    const scalar* in = x.const_data_ptr<scalar>();
    scalar* result = out.mutable_data_ptr<scalar>();
    split_values(size == 0 ? 0 : x.numel() / size, 2 * x.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) norm.run(in + t * size, result + t * size, t % groups);
    });
  })
  return out;
}

// act(gate) * up, or act(gate), in gate's memory; kind: see activation.h.
void activate_(at::Tensor& gate, const std::optional<at::Tensor>& up, int64_t kind) {
  check_input(gate, gate);
  TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(loraplex::Activation::kSquaredRelu), "no activation ", kind);
  if (up.has_value()) {
    check_input(gate, *up);
    TORCH_CHECK(gate.sizes() == up->sizes(), "gate and up differ in shape");
  }
  LORAPLEX_DISPATCH(gate, {
    scalar* g = gate.mutable_data_ptr<scalar>();
    const scalar* u = up.has_value() ? up->const_data_ptr<scalar>() : nullptr;
    split_values(gate.numel(), 16 * gate.numel(), [&](int64_t begin, int64_t end) {
      loraplex::activate(static_cast<loraplex::Activation>(kind), g + begin, u == nullptr ? u : u + begin, g + begin,
                         end - begin);
    });
  })
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def("norm(Tensor x, Tensor? weight, Tensor? bias, float eps, bool centered, bool plus_one) -> Tensor");
  m.def("activate_(Tensor(a!) gate, Tensor? up, int kind) -> ()");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) {
  m.impl("norm", norm);
  m.impl("activate_", activate_);
}
