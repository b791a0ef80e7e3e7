// What the operators have in common: checks of their arguments, dtypes, and the adapters of one module.
#pragma once

#include <ATen/core/Tensor.h>

#include "adapters.h"

namespace loraplex {

// Multiply-adds below which one thread does it all: half a microsecond or two of any processor with vectors, which waking
// another thread takes too.
constexpr int64_t kSmallWork = 8192;

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

// Mixtures whose routers gate their experts. Empty, or three tensors about the experts' segments, those of one mixture
// and its tokens after each other: int64 [n, 4] (segment, group, kind, top_k), float32 [n, 3] (temperature, top_p,
// weight), int64 [n, modules] (addresses of parameters, as router.h has them; 0: the expert doesn't adapt the module).
// With two more, int64 [n, 2] and float32 [modules, m], gates are kept in the last one: of each expert, its column for
// the segment's first token (-1: they aren't kept) and the columns between two tokens.
inline void add_routes(Adapters& adapters, at::TensorList routing, int64_t module,
                       const std::vector<int64_t>& places) {
  if (routing.empty()) return;
  TORCH_CHECK((routing.size() == 3 || routing.size() == 5) && routing[0].dim() == 2 && routing[0].size(1) == 4 && routing[1].dim() == 2 &&
                  routing[1].size(1) == 3 && routing[2].dim() == 2 && routing[1].size(0) == routing[0].size(0) &&
                  routing[2].size(0) == routing[0].size(0) && module < routing[2].size(1),
              "routing doesn't describe the experts of one plan");
  TORCH_CHECK(routing[0].is_contiguous() && routing[1].is_contiguous() && routing[2].is_contiguous() &&
                  routing[0].scalar_type() == at::kLong && routing[1].scalar_type() == at::kFloat &&
                  routing[2].scalar_type() == at::kLong,
              "routing must be int64, float32 and int64, contiguous");
  const int64_t* columns = nullptr;
  float* told = nullptr;
  if (routing.size() == 5) {
    TORCH_CHECK(routing[3].dim() == 2 && routing[3].size(0) == routing[0].size(0) && routing[3].size(1) == 2 &&
                    routing[4].dim() == 2 && module < routing[4].size(0) && routing[3].is_contiguous() &&
                    routing[4].is_contiguous() && routing[3].scalar_type() == at::kLong &&
                    routing[4].scalar_type() == at::kFloat,
                "what is kept of gates must be int64 [n, 2] and float32 [modules, m], contiguous");
    columns = routing[3].const_data_ptr<int64_t>();
    told = routing[4].mutable_data_ptr<float>() + module * routing[4].size(1);
  }
  const int64_t* row = routing[0].const_data_ptr<int64_t>();
  const float* settings = routing[1].const_data_ptr<float>();
  const int64_t* parameters = routing[2].const_data_ptr<int64_t>() + module;
  int64_t last = -1;
  for (int64_t k = 0; k < routing[0].size(0); ++k, row += 4, settings += 3, parameters += routing[2].size(1)) {
    TORCH_CHECK(row[0] >= 0 && row[0] < static_cast<int64_t>(places.size()) && row[2] >= 0 &&
                    row[2] <= static_cast<int64_t>(RouterKind::kStatic) && settings[0] > 0,
                "expert ", k, " of the routing is of no segment or kind");
    if (places[row[0]] < 0 || *parameters == 0) continue;
    const Segment& s = adapters.segments[places[row[0]]];
    if (last != row[1]) {
      adapters.routes.push_back(
          {static_cast<RouterKind>(row[2]), row[3], settings[0], settings[1], s.start, s.stop, {}});
      last = row[1];
    }
    RouteGroup& group = adapters.routes.back();
    TORCH_CHECK(group.start == s.start && group.stop == s.stop, "the experts of a group have different tokens");
    float* kept = nullptr;
    int64_t stride = 0;
    if (columns != nullptr && columns[2 * k] >= 0) {
      stride = columns[2 * k + 1];
      TORCH_CHECK(stride > 0 && columns[2 * k] + (s.stop - s.start - 1) * stride < routing[4].size(1),
                  "the gates of expert ", k, " are kept outside of the tensor");
      kept = told + columns[2 * k];
    }
    group.experts.push_back(
        {reinterpret_cast<const float*>(*parameters), settings[2], s.rank, s.first_hidden, kept, stride});
  }
}

// table [slots, modules, 3]: addresses of lora_a and lora_b, and the rank (0: this module is not adapted).
// scalings [slots, modules]. segments [n, 4]: start, stop, slot, first gate. gates: float32.
inline Adapters read_adapters(const at::Tensor& table, const at::Tensor& scalings, int64_t module,
                       const at::Tensor& segments, const float* gates, int64_t num_tokens,
                       at::TensorList routing) {
  const int64_t modules = table.size(1);
  const int64_t* entries = table.const_data_ptr<int64_t>();
  const int64_t* rows = segments.const_data_ptr<int64_t>();
  Adapters adapters;
  adapters.segments.reserve(segments.size(0));
  std::vector<int64_t> places(segments.size(0), -1);  // of the segments among those that adapt the module
  for (int64_t i = 0; i < segments.size(0); ++i, rows += 4) {
    TORCH_CHECK(rows[0] >= 0 && rows[1] <= num_tokens && rows[2] >= 0 && rows[2] < table.size(0), "segment ", i,
                " lies outside the batch or the table");
    const int64_t cell = rows[2] * modules + module;
    const int64_t rank = entries[cell * 3 + 2];
    if (rank == 0 || rows[0] >= rows[1]) continue;
    places[i] = adapters.segments.size();
    adapters.add({rows[0], rows[1], reinterpret_cast<const void*>(entries[cell * 3]),
                  reinterpret_cast<const void*>(entries[cell * 3 + 1]), rank,
                  scalings.const_data_ptr<float>()[cell], gates + rows[3], 0, 0, 0});
  }
  add_routes(adapters, routing, module, places);
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
