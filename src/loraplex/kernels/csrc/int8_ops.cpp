// The operators for weights of 8-bit integers.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "arguments.h"
#include "int8_tiles.h"
#include "run.h"

namespace {

using loraplex::Adapters;
using loraplex::check_input;
using loraplex::Half;
using loraplex::Int8Layout;
using loraplex::Int8Linear;
using loraplex::read_adapters;
using loraplex::Tiling;

Int8Layout layout_of(int64_t out, int64_t in, int64_t group) {
  TORCH_CHECK(out > 0 && in > 0 && group >= 0 && group % 32 == 0 && group <= loraplex::kMaxInt8Group,
              "no 8-bit weight has ", out, " rows, ", in, " columns and groups of ", group);
  TORCH_CHECK(group > 0 || in <= loraplex::kMaxInt8Depth, "a row of ", in, " values needs scales of groups");
  return {out, in, group};
}

void check_packed(const at::Tensor& packed, const Int8Layout& layout) {
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.numel() == layout.bytes(),
              "the packed weight isn't one of ", layout.out, " rows and ", layout.in, " 8-bit values");
}

// values [out, in] int8 and scales [out, groups] float32, packed.
at::Tensor pack_int8(const at::Tensor& values, const at::Tensor& scales, int64_t group) {
  TORCH_CHECK(values.dim() == 2 && values.is_contiguous() && values.scalar_type() == at::kChar,
              "values to pack must be contiguous int8 [out, in]");
  const Int8Layout layout = layout_of(values.size(0), values.size(1), group);
  TORCH_CHECK(scales.is_contiguous() && scales.scalar_type() == at::kFloat &&
                  scales.numel() == layout.out * layout.num_groups(),
              "scales to pack must be contiguous float32 [out, groups]");
  at::Tensor packed = at::empty({layout.bytes()}, values.options().dtype(at::kByte));
  uint8_t* target = packed.mutable_data_ptr<uint8_t>();
  std::memset(target, 0, layout.bytes());
  int8_t* source = const_cast<int8_t*>(values.const_data_ptr<int8_t>());
  at::parallel_for(0, layout.out, 64, [&](int64_t begin, int64_t end) {
    loraplex::copy_int8_values(source, reinterpret_cast<int8_t*>(target), layout, begin, end, false);
  });
  loraplex::copy_int8_scales(const_cast<float*>(scales.const_data_ptr<float>()), target, layout, false);
  return packed;
}

// The values [out, in] and the scales [out, groups] of a packed weight.
std::tuple<at::Tensor, at::Tensor> unpack_int8(const at::Tensor& packed, int64_t out, int64_t in, int64_t group) {
  const Int8Layout layout = layout_of(out, in, group);
  check_packed(packed, layout);
  at::Tensor values = at::empty({out, in}, packed.options().dtype(at::kChar));
  at::Tensor scales = at::empty({out, layout.num_groups()}, packed.options().dtype(at::kFloat));
  uint8_t* source = const_cast<uint8_t*>(packed.const_data_ptr<uint8_t>());
  int8_t* target = values.mutable_data_ptr<int8_t>();
  at::parallel_for(0, out, 64, [&](int64_t begin, int64_t end) {
    loraplex::copy_int8_values(target, reinterpret_cast<int8_t*>(source), layout, begin, end, true);
  });
  loraplex::copy_int8_scales(scales.mutable_data_ptr<float>(), source, layout, true);
  return {values, scales};
}

template <typename O>
void run_int8(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, at::Tensor& y,
              const Adapters& adapters, int64_t group, Tiling tiling) {
  const int64_t in = x.size(-1);
  loraplex::run<Half>(Int8Linear<O>{packed.const_data_ptr<uint8_t>(),
                                    bias.has_value() ? bias->const_data_ptr<Half>() : nullptr, x.const_data_ptr<Half>(),
                                    y.mutable_data_ptr<O>(), in, y.size(-1), x.numel() / in, group, tiling},
                      adapters);
}

// y [.., out] = x [.., in] weight^T + bias + the adapters' part, for bfloat16 x. tiling: see best_int8_tiling.
at::Tensor gated_int8_linear(const at::Tensor& x, const at::Tensor& packed, int64_t out, int64_t in, int64_t group,
                             const std::optional<at::Tensor>& bias, const at::Tensor& table,
                             const at::Tensor& scalings, int64_t module, const at::Tensor& segments,
                             const at::Tensor& gates, at::TensorList routing, bool float_sums,
                             int64_t tiling) {
  check_packed(packed, layout_of(out, in, group));
  check_input(x, bias.has_value() ? *bias : x);
  TORCH_CHECK(x.size(-1) == in && x.scalar_type() == at::kBFloat16, "x has shape ", x.sizes(), " and dtype ",
              x.scalar_type(), ", but the weight takes ", in, " bfloat16 values");
  TORCH_CHECK(!bias.has_value() || bias->numel() == out, "the bias doesn't fit the weight");
  TORCH_CHECK(tiling >= -1 && (tiling <= static_cast<int64_t>(loraplex::best_int8_tiling()) ||
                               tiling == static_cast<int64_t>(Tiling::kEmulated)),
              "this machine has no way ", tiling);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out;
  at::Tensor y = at::empty(shape, float_sums ? x.options().dtype(at::kFloat) : x.options());
  const int64_t num_tokens = x.numel() / in;
  const Adapters adapters = read_adapters(table, scalings, module, segments, gates.const_data_ptr<float>(), num_tokens,
                                          routing);
  const Tiling way = tiling < 0 ? loraplex::best_int8_tiling() : static_cast<Tiling>(tiling);
  if (float_sums) {
    run_int8<float>(x, packed, bias, y, adapters, group, way);
  } else {
    run_int8<Half>(x, packed, bias, y, adapters, group, way);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def("int8_tiling() -> int", []() { return static_cast<int64_t>(loraplex::best_int8_tiling()); });
  m.def("pack_int8(Tensor values, Tensor scales, int group) -> Tensor");
  m.def("unpack_int8(Tensor packed, int out, int in_, int group) -> (Tensor, Tensor)");
  m.def(
      "gated_int8_linear(Tensor x, Tensor packed, int out, int in_, int group, Tensor? bias, Tensor table, "
      "Tensor scalings, int module, Tensor segments, Tensor gates, Tensor[] routing, "
      "bool float_sums=False, int tiling=-1) -> Tensor");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) {
  m.impl("pack_int8", pack_int8);
  m.impl("unpack_int8", unpack_int8);
  m.impl("gated_int8_linear", gated_int8_linear);
}
