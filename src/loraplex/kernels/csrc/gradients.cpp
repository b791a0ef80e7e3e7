// Operators for training through a frozen base: parts of a layer with the gradients of their inputs.
#include "gradients.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "arguments.h"
#include "split.h"

namespace {

using loraplex::Activation;
using loraplex::check_input;
using loraplex::split_values;

// Of x [.., size], from grad [.., size] of what `rms_norm` gave.
at::Tensor rms_norm_gradient(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, double eps,
                             bool plus_one) {
  check_input(x, grad);
  check_input(x, weight);
  const int64_t size = weight.numel();
  TORCH_CHECK(grad.sizes() == x.sizes() && x.size(-1) == size, "grad ", grad.sizes(), ", x ", x.sizes(),
              " and the weight's ", size, " values don't fit");
  at::Tensor out = at::empty_like(x);
  LORAPLEX_DISPATCH(x, {
    const scalar *g = grad.const_data_ptr<scalar>(), *v = x.const_data_ptr<scalar>(), *w = weight.const_data_ptr<scalar>();
    scalar* result = out.mutable_data_ptr<scalar>();
    split_values(size == 0 ? 0 : x.numel() / size, 4 * x.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * size; t < end * size; t += size) {
        loraplex::rms_norm_gradient(g + t, v + t, w, result + t, size, static_cast<float>(eps), plus_one);
      }
    });
  })
  return out;
}

void check_gated(const at::Tensor& gate, const at::Tensor& up, int64_t kind) {
  check_input(gate, gate);
  check_input(gate, up);
  TORCH_CHECK(gate.sizes() == up.sizes(), "gate and up differ in shape");
  TORCH_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Activation::kSquaredRelu), "no activation ", kind);
}

// act(gate) * up.
at::Tensor gated_activation(const at::Tensor& gate, const at::Tensor& up, int64_t kind) {
  check_gated(gate, up, kind);
  at::Tensor out = at::empty_like(gate);
  LORAPLEX_DISPATCH(gate, {
    const scalar *g = gate.const_data_ptr<scalar>(), *u = up.const_data_ptr<scalar>();
    scalar* result = out.mutable_data_ptr<scalar>();
    split_values(gate.numel(), 16 * gate.numel(), [&](int64_t begin, int64_t end) {
      loraplex::activate(static_cast<Activation>(kind), g + begin, u + begin, result + begin, end - begin);
    });
  })
  return out;
}

template <typename T>
void run_gradients(Activation kind, const T* grad, const T* gate, const T* up, T* to_gate, T* to_up, int64_t size) {
  const auto run = [&](auto known) {
    constexpr Activation activation = static_cast<Activation>(known.value);
    loraplex::gated_activation_gradients<activation>(grad, gate, up, to_gate, to_up, size);
  };
  switch (kind) {
    case Activation::kSilu: return run(std::integral_constant<int, 0>{});
    case Activation::kGelu: return run(std::integral_constant<int, 1>{});
    case Activation::kGeluTanh: return run(std::integral_constant<int, 2>{});
    case Activation::kRelu: return run(std::integral_constant<int, 3>{});
    case Activation::kSquaredRelu: return run(std::integral_constant<int, 4>{});
  }
}

// Of gate and up, from grad of what `gated_activation` gave.
std::tuple<at::Tensor, at::Tensor> gated_activation_gradients(const at::Tensor& grad, const at::Tensor& gate,
                                                              const at::Tensor& up, int64_t kind) {
  check_gated(gate, up, kind);
  check_input(gate, grad);
  TORCH_CHECK(gate.sizes() == grad.sizes(), "gate and grad differ in shape");
  at::Tensor to_gate = at::empty_like(gate), to_up = at::empty_like(up);
  LORAPLEX_DISPATCH(gate, {
    const scalar *d = grad.const_data_ptr<scalar>(), *g = gate.const_data_ptr<scalar>(), *u = up.const_data_ptr<scalar>();
    scalar *of_gate = to_gate.mutable_data_ptr<scalar>(), *of_up = to_up.mutable_data_ptr<scalar>();
    split_values(gate.numel(), 16 * gate.numel(), [&](int64_t begin, int64_t end) {
      run_gradients(static_cast<Activation>(kind), d + begin, g + begin, u + begin, of_gate + begin, of_up + begin,
                    end - begin);
    });
  })
  return {to_gate, to_up};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def("rms_norm_gradient(Tensor grad, Tensor x, Tensor weight, float eps, bool plus_one) -> Tensor");
  m.def("gated_activation(Tensor gate, Tensor up, int kind) -> Tensor");
  m.def("gated_activation_gradients(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) {
  m.impl("rms_norm_gradient", rms_norm_gradient);
  m.impl("gated_activation", gated_activation);
  m.impl("gated_activation_gradients", gated_activation_gradients);
}
