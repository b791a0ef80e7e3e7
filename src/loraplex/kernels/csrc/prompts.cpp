// Torch's view of the attention of prompts.
#include <ATen/Parallel.h>
#include <omp.h>
#include <torch/library.h>

#include "arguments.h"
#include "prompt_attention.h"

namespace {

using loraplex::check_input;
using loraplex::Half;

// Attention of the tokens of a part of a prompt, whose keys and values are in the cache; query and out
// [tokens, heads, dim], which stand at the positions `start` and after of the sequence in `row`.
void attend_prompt_(const at::Tensor& query, at::Tensor& out, const at::Tensor& keys, const at::Tensor& values,
                    const at::Tensor& table, int64_t row, int64_t start, double scale, int64_t window, int64_t chunk,
                    double softcap, const std::optional<at::Tensor>& sinks, int64_t tiling) {
  check_input(query, keys);
  check_input(out, values);
  TORCH_CHECK(query.scalar_type() == at::kBFloat16, "the attention of prompts is compiled for bfloat16 only");
  TORCH_CHECK(keys.dim() == 4 && values.dim() == 4 && keys.is_contiguous() && values.is_contiguous() &&
                  table.is_contiguous() && table.scalar_type() == at::kInt && table.dim() == 2,
              "the cache must be contiguous, and its table int32 [rows, blocks]");
  TORCH_CHECK(values.size(0) == keys.size(0) && values.size(1) == keys.size(1) && values.size(2) == keys.size(2),
              "keys and values differ");
  TORCH_CHECK(query.dim() == 3 && out.dim() == 3 && query.size(2) == keys.size(3) && out.size(2) == values.size(3) &&
                  query.size(0) == out.size(0) && query.size(1) == out.size(1) && query.size(1) % keys.size(1) == 0,
              "the query doesn't fit the cache");
  const int64_t count = query.size(0), last_block = (start + count - 1) / keys.size(2);
  TORCH_CHECK(start >= 0 && count > 0 && row >= 0 && row < table.size(0) && last_block < table.size(1),
              "tokens are in no block");
  const int32_t* blocks = table.const_data_ptr<int32_t>() + row * table.size(1);
  for (int64_t b = 0; b <= last_block; ++b) {
    TORCH_CHECK(blocks[b] >= 0 && blocks[b] < keys.size(0), "a block doesn't exist");
  }
  TORCH_CHECK(!sinks.has_value() || (sinks->scalar_type() == at::kFloat && sinks->is_contiguous() &&
                                     sinks->numel() == query.size(1)),
              "sinks must be float32 [heads]");
  const auto pages = [&](const at::Tensor& pool) {
    return loraplex::Pages<Half>{pool.const_data_ptr<Half>(), pool.size(3), pool.size(1), pool.size(2), table.size(1),
                                 table.const_data_ptr<int32_t>(), &row};
  };
  const loraplex::PromptAttention attention{query.const_data_ptr<Half>(),
                                            out.mutable_data_ptr<Half>(),
                                            pages(keys),
                                            pages(values),
                                            query.size(1),
                                            keys.size(1),
                                            static_cast<float>(scale),
                                            static_cast<float>(softcap),
                                            window,
                                            chunk,
                                            sinks.has_value() ? sinks->const_data_ptr<float>() : nullptr,
                                            0,
                                            start,
                                            count,
                                            loraplex::tiling_of(tiling)};
  thread_local std::vector<Half> packed;
  packed.resize(attention.packed_keys() + attention.packed_values());
  Half* buffer = packed.data();
#pragma omp parallel num_threads(at::get_num_threads())
  attention.run(omp_get_thread_num(), omp_get_num_threads(), buffer);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def(
      "attend_prompt_(Tensor query, Tensor(a!) out, Tensor keys, Tensor values, Tensor table, int row, int start, "
      "float scale, int window, int chunk, float softcap, Tensor? sinks, int tiling=-1) -> ()");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) { m.impl("attend_prompt_", attend_prompt_); }
