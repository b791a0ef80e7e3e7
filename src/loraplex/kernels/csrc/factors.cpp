// Adapters from a file to where the kernels read them: A as it is, B transposed, in the base model's dtype.
#include <c10/util/Half.h>
#include <torch/library.h>

#include "arguments.h"

namespace {

constexpr int64_t kColumns = 64;  // whose rows of B stay in the first cache while they are turned

// out[r, o] = in[o, r]
template <typename From, typename To>
void transpose(const From* in, To* out, int64_t num_out, int64_t rank) {
  for (int64_t first = 0; first < num_out; first += kColumns) {
    const int64_t end = std::min(first + kColumns, num_out);
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t o = first; o < end; ++o) out[r * num_out + o] = static_cast<To>(static_cast<float>(in[o * rank + r]));
    }
  }
}

template <typename From, typename To>
void place(const From* values, const int64_t* factors, int64_t num_modules, To* out) {
  for (int64_t m = 0; m < num_modules; ++m, factors += 6) {
    const int64_t rank = factors[1], num_in = factors[4], num_out = factors[5];
    const From* a = values + factors[2];
    To* target = out + factors[0];
    for (int64_t i = 0; i < rank * num_in; ++i) target[i] = static_cast<To>(static_cast<float>(a[i]));
    transpose(values + factors[3], target + rank * num_in, num_out, rank);
  }
}

template <typename To>
void place_from(const at::Tensor& values, const at::Tensor& factors, To* out) {
  const int64_t* rows = factors.const_data_ptr<int64_t>();
  switch (values.scalar_type()) {
    case at::kFloat: return place(values.const_data_ptr<float>(), rows, factors.size(0), out);
    case at::kBFloat16: return place(values.const_data_ptr<c10::BFloat16>(), rows, factors.size(0), out);
    case at::kHalf: return place(values.const_data_ptr<c10::Half>(), rows, factors.size(0), out);
    default: TORCH_CHECK(false, "adapters of this dtype are not placed here");
  }
}

// factors [modules, 6]: first value in out, rank, first values of A [rank, in] and of B [out, rank] in values, in, out.
// In out, A is followed by B [rank, out]. One thread, which the model's are not to wait for.
void place_factors_(const at::Tensor& values, const at::Tensor& factors, at::Tensor& out) {
  TORCH_CHECK(values.dim() == 1 && out.dim() == 1 && values.is_contiguous() && out.is_contiguous() &&
                  factors.dim() == 2 && factors.size(1) == 6 && factors.is_contiguous() &&
                  factors.scalar_type() == at::kLong,
              "values and out must be of one dimension, factors [modules, 6] int64");
  for (int64_t m = 0; m < factors.size(0); ++m) {
    const int64_t* f = factors.const_data_ptr<int64_t>() + 6 * m;
    TORCH_CHECK(f[0] >= 0 && f[1] > 0 && f[2] >= 0 && f[3] >= 0 && f[4] > 0 && f[5] > 0 &&
                    f[0] + f[1] * (f[4] + f[5]) <= out.numel() && f[2] + f[1] * f[4] <= values.numel() &&
                    f[3] + f[1] * f[5] <= values.numel(),
                "factors of module ", m, " don't fit the file or the target");
  }
  LORAPLEX_DISPATCH(out, { place_from(values, factors, out.mutable_data_ptr<scalar>()); })
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) { m.def("place_factors_(Tensor values, Tensor factors, Tensor(a!) out) -> ()"); }

TORCH_LIBRARY_IMPL(loraplex, CPU, m) { m.impl("place_factors_", place_factors_); }
