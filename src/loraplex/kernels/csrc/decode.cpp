// The operator that runs decoder layers: what it checks and reads, and the memory between its steps.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include "arguments.h"
#include "decoder.h"

namespace {

using loraplex::Adapters;
using loraplex::check_input;
using loraplex::kModules;
using loraplex::kSmallWork;
using loraplex::read_adapters;

// Tells whether every token lies in a block of the pools; checked here, as threads can't throw.
void check_places(const at::Tensor& table, const at::Tensor& rows, const at::Tensor& positions, int64_t num_tokens,
                  int64_t num_blocks, int64_t block_tokens) {
  TORCH_CHECK(rows.numel() >= num_tokens && positions.numel() >= num_tokens, "rows and positions are too few");
  const int64_t row_blocks = table.size(1);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t p = positions.const_data_ptr<int64_t>()[t], row = rows.const_data_ptr<int64_t>()[t];
    TORCH_CHECK(row >= 0 && row < table.size(0) && p >= 0 && p / block_tokens < row_blocks, "token ", t,
                " is in no block");
    for (int64_t b = 0; b <= p / block_tokens; ++b) {
      const int64_t number = table.const_data_ptr<int32_t>()[row * row_blocks + b];
      TORCH_CHECK(number >= 0 && number < num_blocks, "token ", t, " is in block ", number, ", which doesn't exist");
    }
  }
}

constexpr int64_t kLayerInts = 2 + 3 * kModules + 3;
constexpr int64_t kLayerFloats = 6;

// What Python wrote about a layer, in the order of engine/layer_stack.py; the numbers of its modules stay there.
template <typename T>
loraplex::Layer<T> read_layer(const int64_t* ints, const double* floats) {
  loraplex::Layer<T> layer;
  layer.before_attention = {reinterpret_cast<const T*>(ints[0]), static_cast<float>(floats[0]), floats[1] != 0};
  layer.before_mlp = {reinterpret_cast<const T*>(ints[1]), static_cast<float>(floats[2]), floats[3] != 0};
  for (int m = 0; m < kModules; ++m) {
    layer.weight[m] = reinterpret_cast<const T*>(ints[2 + m]);
    layer.bias[m] = reinterpret_cast<const T*>(ints[2 + kModules + m]);
  }
  const int64_t* rest = ints + 2 + 3 * kModules;
  layer.keys = reinterpret_cast<T*>(rest[0]);
  layer.values = reinterpret_cast<T*>(rest[1]);
  layer.window = rest[2];
  layer.scale = static_cast<float>(floats[4]);
  layer.softcap = static_cast<float>(floats[5]);
  return layer;
}

template <typename T>
void decode(loraplex::Decoder<T>& decoder, at::Tensor& out, const at::Tensor& layers, const at::Tensor& constants) {
  const loraplex::Sizes& sizes = decoder.sizes;
  for (int64_t l = 0; l < layers.size(0); ++l) {
    decoder.layers.push_back(
        read_layer<T>(layers.const_data_ptr<int64_t>() + l * kLayerInts, constants.const_data_ptr<double>() + l * kLayerFloats));
  }
  int64_t num_values = sizes.tokens * (sizes.hidden + sizes.heads * sizes.head_dim), num_floats = 0, work = 0;
  for (int m = 0; m < kModules; ++m) {
    num_values += sizes.tokens * sizes.out(m);
    work += sizes.in(m) * sizes.out(m);
  }
  for (size_t a = 0; a < decoder.adapters.size(); a += kModules) {
    int64_t together = 0;
    for (int m = 0; m < kModules; ++m) together += decoder.adapters[a + m].num_hidden;
    num_floats = std::max(num_floats, together);
  }
  at::Tensor values = at::empty({num_values}, out.options());
  at::Tensor floats = at::empty({num_floats}, out.options().dtype(at::kFloat));
  decoder.x = out.mutable_data_ptr<T>();
  decoder.rank_space = floats.mutable_data_ptr<float>();
  T* free = values.mutable_data_ptr<T>();
  const auto take = [&](int64_t size) {
    T* taken = free;
    free += sizes.tokens * size;
    return taken;
  };
  decoder.normed = take(sizes.hidden);
  decoder.attended = take(sizes.heads * sizes.head_dim);
  for (int m = 0; m < kModules; ++m) decoder.made[m] = take(sizes.out(m));
  const int num_threads = work < kModules * kSmallWork ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(num_threads)
  decoder.run(omp_get_thread_num(), omp_get_num_threads());
}

// Layers of a decoder for x [tokens, hidden], one token of each track. layers [n, kLayerInts] and constants
// [n, kLayerFloats] say what read_layer reads, sizes is heads, kv_heads, head_dim, inner, blocks, block_tokens.
// gates [1 or modules, ..]: the same for all modules, or of each. int8_groups [n, kModules]: of weights that are 8-bit
// integers, each at its address as pack_int8 gives it.
at::Tensor decode_layers(const at::Tensor& x, const at::Tensor& layers, const at::Tensor& constants,
                         at::IntArrayRef sizes, const at::Tensor& cos, const at::Tensor& sin, const at::Tensor& table,
                         const at::Tensor& rows, const at::Tensor& positions, const at::Tensor& adapter_table,
                         const at::Tensor& scalings, const at::Tensor& segments, const at::Tensor& gates,
                         bool packed, const std::optional<at::Tensor>& int8_groups) {
  check_input(x, cos);
  check_input(x, sin);
  TORCH_CHECK(x.dim() == 2 && sizes.size() == 6 && layers.is_contiguous() && constants.is_contiguous() &&
                  layers.size(1) == kLayerInts && constants.size(1) == kLayerFloats &&
                  layers.size(0) == constants.size(0),
              "layers and constants don't describe the same layers");
  const loraplex::Sizes all{x.size(0), x.size(1), sizes[0], sizes[1], sizes[2], sizes[3], sizes[5], table.size(1)};
  TORCH_CHECK(cos.numel() == all.tokens * all.head_dim && sin.numel() == cos.numel() && all.head_dim % 2 == 0 &&
                  all.inner % loraplex::kLanes == 0 && all.heads % all.kv_heads == 0,
              "the sizes don't fit each other");
  TORCH_CHECK(table.is_contiguous() && table.scalar_type() == at::kInt && rows.is_contiguous() &&
                  positions.is_contiguous() && rows.scalar_type() == at::kLong && positions.scalar_type() == at::kLong,
              "table must be int32, rows and positions int64, contiguous");
  TORCH_CHECK(gates.dim() == 2 && gates.is_contiguous() && gates.scalar_type() == at::kFloat, "gates must be float32");
  check_places(table, rows, positions, all.tokens, sizes[4], all.block_tokens);
  std::vector<Adapters> adapters(layers.size(0) * kModules);
  for (int64_t l = 0; segments.size(0) > 0 && l < layers.size(0); ++l) {
    for (int m = 0; m < kModules; ++m) {
      const int64_t module = layers.const_data_ptr<int64_t>()[l * kLayerInts + 2 + 2 * kModules + m];
      const float* row = gates.const_data_ptr<float>() + (gates.size(0) == 1 ? 0 : module * gates.size(1));
      adapters[l * kModules + m] = read_adapters(adapter_table, scalings, module, segments, row, all.tokens);
    }
  }
  at::Tensor out = x.clone();
  LORAPLEX_DISPATCH(x, {
    loraplex::Decoder<scalar> decoder{all,
                                      {},
                                      std::move(adapters),
                                      table.const_data_ptr<int32_t>(),
                                      rows.const_data_ptr<int64_t>(),
                                      positions.const_data_ptr<int64_t>(),
                                      cos.const_data_ptr<scalar>(),
                                      sin.const_data_ptr<scalar>()};
    TORCH_CHECK(!packed || x.scalar_type() == at::kBFloat16, "weights of ", x.scalar_type(), " can't be packed");
    if (packed) decoder.tiling = loraplex::best_tiling();
    if (int8_groups.has_value()) {
      TORCH_CHECK(x.scalar_type() == at::kBFloat16 && int8_groups->is_contiguous() &&
                      int8_groups->scalar_type() == at::kLong && int8_groups->numel() == layers.size(0) * kModules,
                  "int8_groups must be int64 [layers, modules], of bfloat16 layers");
      decoder.int8_groups = int8_groups->const_data_ptr<int64_t>();
    }
    decode<scalar>(decoder, out, layers, constants);
  })
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def(
      "decode_layers(Tensor x, Tensor layers, Tensor constants, int[] sizes, Tensor cos, Tensor sin, Tensor table, "
      "Tensor rows, Tensor positions, Tensor adapter_table, Tensor scalings, Tensor segments, Tensor gates, bool packed=False, "
      "Tensor? int8_groups=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) { m.impl("decode_layers", decode_layers); }
