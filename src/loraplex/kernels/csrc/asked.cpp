// Torch's view of what rows ask of one attention module, where layers run module by module: the same parts as in
// decode_layers, so that a row has the same bits either way.
#include <ATen/Parallel.h>
#include <omp.h>
#include <torch/library.h>

#include "arguments.h"
#include "asked_arguments.h"
#include "linked.h"
#include "prompt_attention.h"

namespace {

using loraplex::AskedLayer;
using loraplex::Attention;
using loraplex::check_input;
using loraplex::Half;
using loraplex::Pages;

// Where keys lie, which tokens see them and how.
struct Seen {
  const at::Tensor &keys, &table, &rows, &positions;
  double scale;
  int64_t window, chunk;
  double softcap;

  void check(const at::Tensor& query) const {
    check_input(query, keys);
    TORCH_CHECK(keys.dim() == 4 && query.dim() == 3 && query.size(2) == keys.size(3) &&
                    query.size(1) % keys.size(1) == 0,
                "the query doesn't fit the cache");
    TORCH_CHECK(table.is_contiguous() && table.scalar_type() == at::kInt && table.dim() == 2 && rows.is_contiguous() &&
                    positions.is_contiguous() && rows.scalar_type() == at::kLong &&
                    positions.scalar_type() == at::kLong && rows.numel() >= query.size(0) &&
                    positions.numel() >= query.size(0),
                "table must be int32, rows and positions int64, contiguous, for all tokens");
    for (int64_t t = 0; t < query.size(0); ++t) {
      const int64_t p = positions.const_data_ptr<int64_t>()[t], row = rows.const_data_ptr<int64_t>()[t];
      TORCH_CHECK(row >= 0 && row < table.size(0) && p >= 0 && p / keys.size(2) < table.size(1), "token ", t,
                  " is in no block");
    }
  }

  template <typename T>
  Pages<T> pages(const at::Tensor& pool) const {
    return {pool.const_data_ptr<T>(), pool.size(3), pool.size(1), pool.size(2), table.size(1),
            table.const_data_ptr<int32_t>(), rows.const_data_ptr<int64_t>()};
  }

  template <typename T>
  Attention<T, Pages<T>> attention(const at::Tensor& query, T* out, const at::Tensor& values, AskedLayer asked) const {
    return {query.const_data_ptr<T>(), out, pages<T>(keys), pages<T>(values), query.size(1), keys.size(1),
            static_cast<float>(scale), static_cast<float>(softcap), window, positions.const_data_ptr<int64_t>(),
            nullptr, 0, chunk, nullptr, asked};
  }
};

AskedLayer read_asked(const at::Tensor& asked, const at::Tensor& groups, int64_t num_tokens) {
  TORCH_CHECK(asked.dim() == 2, "what is asked must be of one layer");
  return {asked.const_data_ptr<int64_t>(), AskedLayer::kInts, loraplex::read_groups(asked, groups, num_tokens)};
}

// A part of a prompt that is steered together, as decode_layers would.
void attend_part(const Seen& seen, const at::Tensor& query, at::Tensor& out, const at::Tensor& values,
                 loraplex::SteeringRecord steering, int64_t first, int64_t count, loraplex::Tiling tiling) {
  const int64_t head_size = query.size(1) * query.size(2), out_size = out.size(1) * out.size(2);
  const loraplex::PromptAttention attention{query.const_data_ptr<Half>() + first * head_size,
                                            out.mutable_data_ptr<Half>() + first * out_size,
                                            seen.pages<Half>(seen.keys),
                                            seen.pages<Half>(values),
                                            query.size(1),
                                            seen.keys.size(1),
                                            static_cast<float>(seen.scale),
                                            static_cast<float>(seen.softcap),
                                            seen.window,
                                            seen.chunk,
                                            nullptr,
                                            first,
                                            seen.positions.const_data_ptr<int64_t>()[first],
                                            count,
                                            tiling,
                                            steering};
  thread_local std::vector<Half> packed;
  packed.resize(attention.packed_keys() + attention.packed_values());
  Half* buffer = packed.data();
#pragma omp parallel num_threads(at::get_num_threads())
  attention.run(omp_get_thread_num(), omp_get_num_threads(), buffer);
}

// Attention of the tokens whose rows steer it; query and out [tokens, heads, dim]; out keeps the other tokens'.
void attend_steered_(const at::Tensor& query, at::Tensor& out, const at::Tensor& keys, const at::Tensor& values,
                     const at::Tensor& table, const at::Tensor& rows, const at::Tensor& positions, double scale,
                     int64_t window, int64_t chunk, double softcap, const at::Tensor& asked, const at::Tensor& groups,
                     int64_t tiling) {
  const Seen seen{keys, table, rows, positions, scale, window, chunk, softcap};
  seen.check(query);
  check_input(out, values);
  TORCH_CHECK(values.size(0) == keys.size(0) && values.size(1) == keys.size(1) && values.size(2) == keys.size(2) &&
                  out.dim() == 3 && out.size(0) == query.size(0) && out.size(1) == query.size(1) &&
                  out.size(2) == values.size(3) && query.is_contiguous(),
              "keys, values and out don't fit each other");
  const int64_t num_tokens = query.size(0);
  const AskedLayer layer = read_asked(asked, groups, num_tokens);
  const loraplex::Tiling how = loraplex::tiling_of(tiling);
  const int64_t *row = rows.const_data_ptr<int64_t>(), *position = positions.const_data_ptr<int64_t>();
  std::vector<int64_t> singles;
  for (int64_t t = 0, stop = 0; t < num_tokens; t = stop) {
    for (stop = t + 1; stop < num_tokens && row[stop] == row[t] && position[stop] == position[t] + stop - t;) ++stop;
    const loraplex::SteeringRecord steering = layer.steering(t);
    if (!steering.exists()) continue;
    const bool has_tiles = query.scalar_type() == at::kBFloat16 && how == loraplex::Tiling::kTiles;
    if (has_tiles && stop - t >= loraplex::kTileTokens && steering.num_shares() == 0) {
      attend_part(seen, query, out, values, steering, t, stop - t, how);
    } else {
      for (int64_t token = t; token < stop; ++token) singles.push_back(token);
    }
  }
  LORAPLEX_DISPATCH(query, {
    const auto attention = seen.attention<scalar>(query, out.mutable_data_ptr<scalar>(), values, layer);
    at::parallel_for(0, singles.size() * attention.kv_heads, 1, [&](int64_t begin, int64_t end) {
      thread_local std::vector<float> buffer;
      for (int64_t i = begin; i < end; ++i) {
        attention.head_group(singles[i / attention.kv_heads], i % attention.kv_heads, buffer);
      }
    });
  })
}

// All steps, by all threads.
template <typename T, typename A>
void add_links(loraplex::Links<T>& links, const A& attention, const T* x, T* out, int64_t hidden) {
#pragma omp parallel num_threads(at::get_num_threads())
  {
    const int64_t i = omp_get_thread_num(), n = omp_get_num_threads();
    links.shrink(0, x, i, n);
#pragma omp barrier
    links.finish(0, attention, i, n, true);
    links.expand(0, out, loraplex::share(hidden, i, n), loraplex::share(hidden, i + 1, n));
  }
}

// out [tokens, hidden] += the linked residuals of the tokens' rows, for x [tokens, hidden], what the attention block
// reads; query [tokens, heads, dim] as it attended, and keys as they are stored.
void add_links_(const at::Tensor& x, at::Tensor& out, const at::Tensor& query, const at::Tensor& keys,
                const at::Tensor& table, const at::Tensor& rows, const at::Tensor& positions, double scale,
                int64_t window, int64_t chunk, double softcap, const at::Tensor& asked, const at::Tensor& groups) {
  const Seen seen{keys, table, rows, positions, scale, window, chunk, softcap};
  seen.check(query);
  check_input(x, out);
  TORCH_CHECK(x.dim() == 2 && out.dim() == 2 && x.sizes() == out.sizes() && x.size(0) == query.size(0) &&
                  x.scalar_type() == query.scalar_type(),
              "x and out [tokens, hidden] don't fit the query");
  const int64_t num_tokens = x.size(0), hidden = x.size(1);
  const AskedLayer layer = read_asked(asked, groups, num_tokens);
  LORAPLEX_DISPATCH(x, {
    loraplex::Links<scalar> links(num_tokens, hidden, keys.size(1), {layer}, table.const_data_ptr<int32_t>(), table.size(1),
                                  keys.size(2), rows.const_data_ptr<int64_t>(), positions.const_data_ptr<int64_t>());
    const auto attention = seen.attention<scalar>(query, nullptr, keys, layer);
    add_links(links, attention, x.const_data_ptr<scalar>(), out.mutable_data_ptr<scalar>(), hidden);
  })
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def(
      "attend_steered_(Tensor query, Tensor(a!) out, Tensor keys, Tensor values, Tensor table, Tensor rows, "
      "Tensor positions, float scale, int window, int chunk, float softcap, Tensor asked, Tensor groups, "
      "int tiling=-1) -> ()");
  m.def(
      "add_links_(Tensor x, Tensor(a!) out, Tensor query, Tensor keys, Tensor table, Tensor rows, Tensor positions, "
      "float scale, int window, int chunk, float softcap, Tensor asked, Tensor groups) -> ()");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) {
  m.impl("attend_steered_", attend_steered_);
  m.impl("add_links_", add_links_);
}
