// The operators: checks, dtypes, and the split over threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include "arguments.h"
#include "fused.h"
#include "run.h"
#include "tiles.h"

namespace {

using loraplex::Adapters;
using loraplex::check_input;
using loraplex::check_output;
using loraplex::kSmallWork;
using loraplex::Half;
using loraplex::Linear;
using loraplex::read_adapters;
using loraplex::run;
using loraplex::TiledLinear;

template <typename T, typename O = T>
void dispatch_to(const at::Tensor& x, const at::Tensor* weight, const std::optional<at::Tensor>& bias, at::Tensor& y,
                 const Adapters& adapters) {
  const int64_t in = x.size(-1), out = y.size(-1);
  run<T>(Linear<T, O>{weight == nullptr ? nullptr : weight->const_data_ptr<T>(),
                      bias.has_value() ? bias->const_data_ptr<T>() : nullptr, x.const_data_ptr<T>(),
                      y.mutable_data_ptr<O>(), in, out, in == 0 ? 0 : x.numel() / in},
         adapters);
}

void dispatch(const at::Tensor& x, const at::Tensor* weight, const std::optional<at::Tensor>& bias, at::Tensor& y,
              const Adapters& adapters) {
  if (x.scalar_type() == at::kFloat) return dispatch_to<float>(x, weight, bias, y, adapters);
  if (y.scalar_type() == at::kFloat) return dispatch_to<c10::BFloat16, float>(x, weight, bias, y, adapters);
  dispatch_to<c10::BFloat16>(x, weight, bias, y, adapters);
}

// y [.., out] += the adapters' part for x [.., in].
void gated_lora_(at::Tensor& y, const at::Tensor& x, const at::Tensor& table, const at::Tensor& scalings,
                 int64_t module, const at::Tensor& segments, const at::Tensor& gates, at::TensorList routing) {
  check_output(x, y);
  const int64_t num_tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  TORCH_CHECK(y.numel() == num_tokens * y.size(-1), "x and y differ in their number of tokens");
  const Adapters adapters = read_adapters(table, scalings, module, segments, gates.const_data_ptr<float>(), num_tokens,
                                          routing);
  if (adapters.segments.empty()) return;
  dispatch(x, nullptr, std::nullopt, y, adapters);
}

// y [.., out] = x [.., in] weight^T + bias + the adapters' part; with float_sums, y is float32 whatever x is.
at::Tensor gated_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                        const at::Tensor& table, const at::Tensor& scalings, int64_t module,
                        const at::Tensor& segments, const at::Tensor& gates, at::TensorList routing,
                        bool float_sums) {
  check_input(x, weight);
  TORCH_CHECK(x.size(-1) == weight.size(1), "x has ", x.size(-1), " features, the weight takes ", weight.size(1));
  if (bias.has_value()) check_input(x, *bias);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  at::Tensor y = at::empty(shape, float_sums ? x.options().dtype(at::kFloat) : x.options());
  const int64_t num_tokens = x.size(-1) == 0 ? 0 : x.numel() / x.size(-1);
  const Adapters adapters = read_adapters(table, scalings, module, segments, gates.const_data_ptr<float>(), num_tokens,
                                          routing);
  dispatch(x, &weight, bias, y, adapters);
  return y;
}

// The same with a weight that `pack_weight` packed; `out` are its rows. tiling: see best_tiling.
template <typename O>
void run_packed(const at::Tensor& x, const at::Tensor& packed, const std::optional<at::Tensor>& bias, at::Tensor& y,
                const Adapters& adapters, loraplex::Tiling tiling) {
  const int64_t in = x.size(-1);
  run<Half>(TiledLinear<O>{packed.const_data_ptr<Half>(), bias.has_value() ? bias->const_data_ptr<Half>() : nullptr,
                           x.const_data_ptr<Half>(), y.mutable_data_ptr<O>(), in, y.size(-1), x.numel() / in, tiling},
            adapters);
}

at::Tensor gated_packed_linear(const at::Tensor& x, const at::Tensor& packed, int64_t out, int64_t in,
                               const std::optional<at::Tensor>& bias, const at::Tensor& table,
                               const at::Tensor& scalings, int64_t module, const at::Tensor& segments,
                               const at::Tensor& gates, at::TensorList routing, bool float_sums, int64_t tiling) {
  check_input(x, packed);
  if (bias.has_value()) check_input(x, *bias);
  TORCH_CHECK(x.size(-1) == in && in > 0, "x has shape ", x.sizes(), ", but the weight takes ", in, " values");
  TORCH_CHECK(x.scalar_type() == at::kBFloat16 && packed.numel() == loraplex::tiled_size(out, in),
              "the packed weight isn't one of ", out, " rows and ", in, " bfloat16 values");
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = out;
  at::Tensor y = at::empty(shape, float_sums ? x.options().dtype(at::kFloat) : x.options());
  const Adapters adapters = read_adapters(table, scalings, module, segments, gates.const_data_ptr<float>(), x.numel() / in,
                                          routing);
  const loraplex::Tiling way = loraplex::tiling_of(tiling);
  if (float_sums) {
    run_packed<float>(x, packed, bias, y, adapters, way);
  } else {
    run_packed<Half>(x, packed, bias, y, adapters, way);
  }
  return y;
}

// Between a weight [out, in] and its packed values, in either direction.
void move_tiles(Half* weight, Half* packed, int64_t out, int64_t in, bool back) {
  at::parallel_for(0, loraplex::tiles_of(out, loraplex::kTileColumns), 4, [&](int64_t begin, int64_t end) {
    loraplex::copy_tiles(weight, packed, out, in, begin, end, back);
  });
}

at::Tensor pack_weight(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == at::kBFloat16,
              "a weight to pack must be contiguous bfloat16 [out, in]");
  at::Tensor packed = at::empty({loraplex::tiled_size(weight.size(0), weight.size(1))}, weight.options());
  move_tiles(const_cast<Half*>(weight.const_data_ptr<Half>()), packed.mutable_data_ptr<Half>(), weight.size(0),
             weight.size(1), false);
  return packed;
}

at::Tensor unpack_weight(const at::Tensor& packed, int64_t out, int64_t in) {
  TORCH_CHECK(packed.is_contiguous() && packed.scalar_type() == at::kBFloat16 &&
                  packed.numel() == loraplex::tiled_size(out, in), "no packed weight [", out, ", ", in, "]");
  at::Tensor weight = at::empty({out, in}, packed.options());
  move_tiles(weight.mutable_data_ptr<Half>(), const_cast<Half*>(packed.const_data_ptr<Half>()), out, in, true);
  return weight;
}

// Splits [0, count) over threads, unless the work (multiply-adds) isn't worth waking them.
template <typename F>
void split(int64_t count, int64_t work, const F& run_part) {
  const int num_threads = work < 16 * kSmallWork ? 1 : at::get_num_threads();
  if (num_threads == 1 || count == 1) {
    run_part(0, count);
    return;
  }
#pragma omp parallel num_threads(num_threads)
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    run_part(count * i / n, count * (i + 1) / n);
  }
}

void check_cache(const at::Tensor& pool, const at::Tensor& table, const at::Tensor& rows, const at::Tensor& positions) {
  TORCH_CHECK(pool.dim() == 4 && pool.is_contiguous() && table.is_contiguous(), "the cache must be contiguous");
  TORCH_CHECK(table.scalar_type() == at::kInt && rows.scalar_type() == at::kLong &&
                  positions.scalar_type() == at::kLong && rows.is_contiguous() && positions.is_contiguous(),
              "table must be int32, rows and positions int64, contiguous");
}

// Puts new keys or values [tokens, kv_heads, dim] into the blocks of their tracks.
void store_tokens_(const at::Tensor& states, at::Tensor& pool, const at::Tensor& table, const at::Tensor& rows,
                   const at::Tensor& positions) {
  check_cache(pool, table, rows, positions);
  TORCH_CHECK(states.dim() == 3 && states.stride(2) == 1 && states.scalar_type() == pool.scalar_type() &&
                  states.size(1) == pool.size(1) && states.size(2) == pool.size(3) && rows.numel() >= states.size(0),
              "new keys or values don't fit the cache");
  const int64_t heads = pool.size(1), block = pool.size(2), bytes = pool.size(3) * pool.element_size();
  const int64_t row_blocks = table.size(1);
  const char* source = static_cast<const char*>(states.const_data_ptr());
  char* target = static_cast<char*>(pool.mutable_data_ptr());
  for (int64_t t = 0; t < states.size(0); ++t) {
    const int64_t p = positions.const_data_ptr<int64_t>()[t], row = rows.const_data_ptr<int64_t>()[t];
    TORCH_CHECK(row >= 0 && row < table.size(0) && p >= 0 && p / block < row_blocks, "token ", t, " is in no block");
    const int64_t number = table.const_data_ptr<int32_t>()[row * row_blocks + p / block];
    TORCH_CHECK(number >= 0 && number < pool.size(0), "token ", t, " is in block ", number, ", which doesn't exist");
    for (int64_t h = 0; h < heads; ++h) {
      std::memcpy(target + ((number * heads + h) * block + p % block) * bytes,
                  source + (t * states.stride(0) + h * states.stride(1)) * pool.element_size(), bytes);
    }
  }
}

// All heads of all tokens, split over threads.
template <typename A>
void attend(const A& attention, int64_t num_tokens, int64_t work) {
  split(num_tokens * attention.kv_heads, work, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> buffer;
    for (int64_t i = begin; i < end; ++i) {
      attention.head_group(i / attention.kv_heads, i % attention.kv_heads, buffer);
    }
  });
}

// Attention of the first out.size(0) tokens, each over its own track; query and out [tokens, heads, dim].
void attend_single_(const at::Tensor& query, at::Tensor& out, const at::Tensor& keys, const at::Tensor& values,
                    const at::Tensor& table, const at::Tensor& rows, const at::Tensor& positions, double scale,
                    int64_t window, int64_t chunk, double softcap, const std::optional<at::Tensor>& sinks) {
  check_cache(keys, table, rows, positions);
  check_input(query, keys);
  check_input(out, values);
  TORCH_CHECK(values.size(0) == keys.size(0) && values.size(1) == keys.size(1) && values.size(2) == keys.size(2),
              "keys and values differ");
  TORCH_CHECK(query.dim() == 3 && query.size(2) == keys.size(3) && out.size(2) == values.size(3) &&
                  query.size(1) % keys.size(1) == 0 && out.size(0) <= query.size(0) && out.size(1) == query.size(1),
              "the query doesn't fit the cache");
  TORCH_CHECK(!sinks.has_value() || (sinks->scalar_type() == at::kFloat && sinks->is_contiguous() &&
                                     sinks->numel() == query.size(1)),
              "sinks must be float32 [heads]");
  const int64_t num_tokens = out.size(0), kv_heads = keys.size(1);
  int64_t total = 0;
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t p = positions.const_data_ptr<int64_t>()[t], row = rows.const_data_ptr<int64_t>()[t];
    TORCH_CHECK(row >= 0 && row < table.size(0) && p >= 0 && p / keys.size(2) < table.size(1), "token ", t,
                " is in no block");
    total += window > 0 ? std::min(window, p + 1) : p + 1;
  }
  LORAPLEX_DISPATCH(query, {
    using Pages = loraplex::Pages<scalar>;
    const auto pages = [&](const at::Tensor& pool) {
      return Pages{pool.const_data_ptr<scalar>(), pool.size(3), kv_heads, pool.size(2), table.size(1),
                   table.const_data_ptr<int32_t>(), rows.const_data_ptr<int64_t>()};
    };
    attend(loraplex::Attention<scalar, Pages>{query.const_data_ptr<scalar>(), out.mutable_data_ptr<scalar>(),
                                              pages(keys), pages(values), query.size(1), kv_heads,
                                              static_cast<float>(scale), static_cast<float>(softcap), window,
                                              positions.const_data_ptr<int64_t>(), nullptr, 0, chunk,
                                              sinks.has_value() ? sinks->const_data_ptr<float>() : nullptr},
           num_tokens, total * query.size(1) * (keys.size(3) + values.size(3)));
  })
}

// Attention of one token a row over keys and values [rows, kv_heads, places, dim]; query and the result
// [rows, heads, dim]; mask [rows, places], true where a place is seen.
at::Tensor attend_rows(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values,
                       const std::optional<at::Tensor>& mask, double scale) {
  TORCH_CHECK(query.dim() == 3 && keys.dim() == 4 && values.dim() == 4 && query.is_contiguous() &&
                  keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type(),
              "query [rows, heads, dim] must be contiguous, and of the dtype of keys and values [rows, heads, places, dim]");
  const int64_t num_rows = query.size(0), kv_heads = keys.size(1), places = keys.size(2);
  const auto fits = [&](const at::Tensor& states) {
    return states.size(0) == num_rows && states.size(1) == kv_heads && states.size(2) == places &&
           states.stride(3) == 1 && (places < 2 || states.stride(2) == states.size(3));
  };
  TORCH_CHECK(fits(keys) && fits(values) && keys.size(3) == query.size(2) && query.size(1) % kv_heads == 0,
              "the query doesn't fit keys and values, or these aren't dense along their places");
  TORCH_CHECK(!mask.has_value() || (mask->dim() == 2 && mask->scalar_type() == at::kBool && mask->size(0) == num_rows &&
                                    mask->size(1) == places && mask->stride(1) == 1),
              "the mask must be bool [rows, places]");
  at::Tensor out = at::empty({num_rows, query.size(1), values.size(3)}, query.options());
  LORAPLEX_DISPATCH(query, {
    using Rows = loraplex::Rows<scalar>;
    const auto in_rows = [&](const at::Tensor& states) {
      return Rows{states.const_data_ptr<scalar>(), states.size(3), states.stride(0), states.stride(1), places};
    };
    attend(loraplex::Attention<scalar, Rows>{query.const_data_ptr<scalar>(), out.mutable_data_ptr<scalar>(),
                                             in_rows(keys), in_rows(values), query.size(1), kv_heads,
                                             static_cast<float>(scale), 0.0f, 0, nullptr,
                                             mask.has_value() ? mask->const_data_ptr<bool>() : nullptr,
                                             mask.has_value() ? mask->stride(0) : 0},
           num_rows, num_rows * places * query.size(1) * (keys.size(3) + values.size(3)));
  })
  return out;
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, bool plus_one) {
  check_input(x, weight);
  const int64_t size = x.size(-1);
  TORCH_CHECK(weight.numel() == size && size > 0, "the weight doesn't fit x");
  at::Tensor out = at::empty(x.sizes(), x.options());
  LORAPLEX_DISPATCH(x, {
    const scalar* in = x.const_data_ptr<scalar>();
    scalar* result = out.mutable_data_ptr<scalar>();
    const scalar* w = weight.const_data_ptr<scalar>();
    split(x.numel() / size, 2 * x.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        loraplex::rms_norm<scalar>(in + t * size, w, result + t * size, size, static_cast<float>(eps), plus_one);
    });
  })
  return out;
}

// Rotates query [tokens, heads, dim] and key [tokens, kv_heads, dim] in place; cos, sin [tokens, dim].
void rotate_(at::Tensor& query, at::Tensor& key, const at::Tensor& cos, const at::Tensor& sin) {
  check_input(query, key);
  check_input(query, cos);
  check_input(query, sin);
  const int64_t num_tokens = query.size(0), size = query.size(2);
  TORCH_CHECK(query.dim() == 3 && key.dim() == 3 && key.size(0) == num_tokens && key.size(2) == size && size % 2 == 0 &&
                  cos.numel() == num_tokens * size && sin.numel() == num_tokens * size,
              "query, key, cos and sin differ in tokens or dimension");
  LORAPLEX_DISPATCH(query, {
    scalar* q = query.mutable_data_ptr<scalar>();
    scalar* k = key.mutable_data_ptr<scalar>();
    const scalar* c = cos.const_data_ptr<scalar>();
    const scalar* s = sin.const_data_ptr<scalar>();
    split(num_tokens, 2 * (query.numel() + key.numel()), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        loraplex::rotate(q + t * query.size(1) * size, c + t * size, s + t * size, query.size(1), size);
        loraplex::rotate(k + t * key.size(1) * size, c + t * size, s + t * size, key.size(1), size);
      }
    });
  })
}

}  // namespace

TORCH_LIBRARY(loraplex, m) {
  m.def(
      "gated_lora_(Tensor(a!) y, Tensor x, Tensor table, Tensor scalings, int module, Tensor segments, "
      "Tensor gates, Tensor[] routing) -> ()");
  m.def(
      "gated_linear(Tensor x, Tensor weight, Tensor? bias, Tensor table, Tensor scalings, int module, "
      "Tensor segments, Tensor gates, Tensor[] routing, bool float_sums=False) -> Tensor");
  m.def(
      "gated_packed_linear(Tensor x, Tensor packed, int out, int in_, Tensor? bias, Tensor table, Tensor scalings, int module, "
      "Tensor segments, Tensor gates, Tensor[] routing, bool float_sums=False, int tiling=-1) -> Tensor");
  m.def("tiling() -> int", []() { return static_cast<int64_t>(loraplex::best_tiling()); });
  m.def("pack_weight(Tensor weight) -> Tensor");
  m.def("unpack_weight(Tensor packed, int out, int in_) -> Tensor");
  m.def("store_tokens_(Tensor states, Tensor(a!) pool, Tensor table, Tensor rows, Tensor positions) -> ()");
  m.def(
      "attend_single_(Tensor query, Tensor(a!) out, Tensor keys, Tensor values, Tensor table, Tensor rows, "
      "Tensor positions, float scale, int window, int chunk, float softcap, Tensor? sinks) -> ()");
  m.def("attend_rows(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, bool plus_one) -> Tensor");
  m.def("rotate_(Tensor(a!) query, Tensor(b!) key, Tensor cos, Tensor sin) -> ()");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) {
  m.impl("gated_lora_", gated_lora_);
  m.impl("gated_linear", gated_linear);
  m.impl("gated_packed_linear", gated_packed_linear);
  m.impl("pack_weight", pack_weight);
  m.impl("unpack_weight", unpack_weight);
  m.impl("store_tokens_", store_tokens_);
  m.impl("attend_single_", attend_single_);
  m.impl("attend_rows", attend_rows);
  m.impl("rms_norm", rms_norm);
  m.impl("rotate_", rotate_);
}
