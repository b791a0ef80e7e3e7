// The operator that runs decoder layers: what it checks and reads, and the memory between its steps.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <omp.h>
#include <torch/library.h>

#include <optional>
#include <utility>

#include "arguments.h"
#include "asked_arguments.h"
#include "decoder.h"
#include "layer_record.h"

namespace {

using loraplex::Adapters;
using loraplex::check_input;
using loraplex::kRoles;
using loraplex::kSmallWork;
using loraplex::Layer;
using loraplex::Norm;
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

// The memory between the steps of a layer, as large as the largest layer needs it.
template <typename T>
struct Room {
  int64_t made[kRoles] = {}, heads = 0, inner = 0, rank_space = 0;
  // Of a token, its pairs with experts taken together; the ranks are those of all tokens.
  int64_t experts = 0, pairs = 0, expert_inputs = 0, expert_made = 0, expert_inner = 0, expert_ranks = 0;

  explicit Room(const loraplex::Decoder<T>& decoder) {
    for (size_t l = 0; l < decoder.layers.size(); ++l) {
      const Layer<T>& layer = decoder.layers[l];
      int64_t together = 0;
      for (int role = 0; role < kRoles; ++role) {
        made[role] = std::max(made[role], layer.modules[role].out);
        together += decoder.adapters[l * kRoles + role].num_hidden;
      }
      heads = std::max(heads, layer.heads * layer.head_dim);
      inner = std::max(inner, layer.inner);
      rank_space = std::max(rank_space, together);
      if (layer.experts.exists()) add(decoder, layer.experts);
    }
  }

  void add(const loraplex::Decoder<T>& decoder, const loraplex::Experts<T>& own) {
    const int64_t top_k = own.router.top_k;
    made[loraplex::kDown] = std::max(made[loraplex::kDown], decoder.hidden);
    experts = std::max(experts, own.router.num_experts);
    pairs = std::max(pairs, top_k);
    expert_inputs = std::max(expert_inputs, top_k * decoder.hidden);
    expert_made = std::max(expert_made, top_k * own.input.out);
    expert_inner = std::max(expert_inner, top_k * own.inner());
    for (const int64_t first : {own.first_input, own.first_down}) {
      expert_ranks = std::max(expert_ranks, decoder.expert_table.room(first, top_k));
    }
  }
};

// Multiply-adds of one layer for one token.
template <typename T>
int64_t work_of(const Layer<T>& layer) {
  int64_t work = 0;
  for (const auto& module : layer.modules) work += module.in * module.out;
  const loraplex::Experts<T>& experts = layer.experts;
  if (!experts.exists()) return work;
  return work + experts.router.top_k * (experts.input.in * experts.input.out + experts.down.in * experts.down.out);
}

// Hands out what experts need between their steps, from memory that is kept as long as what this returns.
template <typename T>
std::vector<at::Tensor> take_expert_room(loraplex::Decoder<T>& decoder, const Room<T>& room, const at::Tensor& like) {
  if (room.pairs == 0) return {};
  const int64_t tokens = decoder.tokens, pairs = tokens * room.pairs;
  const at::TensorOptions floats = like.options().dtype(at::kFloat);
  at::Tensor numbers = at::empty({tokens * room.experts + pairs + room.expert_ranks}, floats);
  at::Tensor chosen = at::empty({pairs}, like.options().dtype(at::kInt));
  at::Tensor values = at::empty({tokens * (2 * room.expert_inputs + room.expert_made + room.expert_inner)}, like.options());
  float* logits = numbers.mutable_data_ptr<float>();
  decoder.expert_room = {logits, logits + tokens * room.experts, chosen.mutable_data_ptr<int32_t>()};
  decoder.expert_room.rank_space = logits + tokens * room.experts + pairs;
  T* free = values.mutable_data_ptr<T>();
  const auto take = [&](int64_t size) { return std::exchange(free, free + tokens * size); };
  decoder.expert_room.inputs = take(room.expert_inputs);
  decoder.expert_room.made = take(room.expert_made);
  decoder.expert_room.activated = take(room.expert_inner);
  decoder.expert_room.outputs = take(room.expert_inputs);
  return {numbers, chosen, values};
}

// Room for the packed keys and values of the part of a prompt that sees most.
template <typename T>
at::Tensor room_for_prompts(const loraplex::Decoder<T>& decoder, const at::TensorOptions& options) {
  int64_t size = 0;
  if constexpr (std::is_same_v<T, loraplex::Half>) {
    for (size_t l = 0; l < decoder.layers.size(); ++l) {
      for (const loraplex::PromptPart& part : decoder.split(l).prompts) {
        const loraplex::PromptAttention attention = decoder.prompt_attention(l, part);
        size = std::max(size, attention.packed_keys() + attention.packed_values());
      }
    }
  }
  return at::empty({size}, options);
}

// Whether a token's row asks a layer that keys get a share: tiles don't know a token's weights all at once.
bool has_shares(const loraplex::AskedLayer& asked, int64_t token) {
  const loraplex::SteeringRecord steering = asked.steering(token);
  return steering.exists() && steering.num_shares() > 0;
}

// Which tokens a layer attends to together, where that has tiles: those that follow each other in one row and fill some.
template <typename T>
loraplex::Split split_tokens(const loraplex::Decoder<T>& decoder, const loraplex::AskedLayer& asked) {
  const bool has_tiles = std::is_same_v<T, loraplex::Half> && decoder.tiling == loraplex::Tiling::kTiles;
  loraplex::Split split;
  for (int64_t t = 0, stop = 0; t < decoder.tokens; t = stop) {
    const auto follows = [&](int64_t token) {
      return decoder.rows[token] == decoder.rows[t] && decoder.positions[token] == decoder.positions[t] + token - t;
    };
    for (stop = t + 1; stop < decoder.tokens && follows(stop);) ++stop;
    if (has_tiles && stop - t >= loraplex::kTileTokens && !has_shares(asked, t)) {
      split.prompts.push_back({t, stop - t});
    } else {
      for (int64_t token = t; token < stop; ++token) split.singles.push_back(token);
    }
  }
  return split;
}

// As each layer by itself would: a row has the same bits where its layers run module by module.
template <typename T>
void find_prompts(loraplex::Decoder<T>& decoder) {
  const bool some_have_shares = std::any_of(decoder.asked.begin(), decoder.asked.end(), [&](const auto& layer) {
    for (int64_t t = 0; t < decoder.tokens; ++t) {
      if (has_shares(layer, t)) return true;
    }
    return false;
  });
  if (!some_have_shares) return decoder.splits.push_back(split_tokens(decoder, {}));
  for (const loraplex::AskedLayer& layer : decoder.asked) decoder.splits.push_back(split_tokens(decoder, layer));
}

template <typename T>
void decode(loraplex::Decoder<T>& decoder, at::Tensor& out) {
  const Room<T> room(decoder);
  int64_t num_values = decoder.hidden + 2 * room.heads + room.inner;
  for (const int64_t size : room.made) num_values += size;
  at::Tensor values = at::empty({decoder.tokens * num_values}, out.options());
  at::Tensor packed = room_for_prompts(decoder, out.options());
  if constexpr (std::is_same_v<T, loraplex::Half>) decoder.packed_keys = packed.mutable_data_ptr<T>();
  at::Tensor floats = at::empty({room.rank_space}, out.options().dtype(at::kFloat));
  const std::vector<at::Tensor> expert_room = take_expert_room(decoder, room, out);
  decoder.x = out.mutable_data_ptr<T>();
  decoder.rank_space = floats.mutable_data_ptr<float>();
  T* free = values.mutable_data_ptr<T>();
  const auto take = [&](int64_t size) {
    T* taken = free;
    free += decoder.tokens * size;
    return taken;
  };
  decoder.normed = take(decoder.hidden);
  decoder.queries = take(room.heads);
  decoder.attended = take(room.heads);
  decoder.activated = take(room.inner);
  for (int role = 0; role < kRoles; ++role) decoder.made[role] = take(room.made[role]);
  const int num_threads = work_of(decoder.layers[0]) < kRoles * kSmallWork ? 1 : at::get_num_threads();
#pragma omp parallel num_threads(num_threads)
  decoder.run(omp_get_thread_num(), omp_get_num_threads());
}

// Of all modules of a layer, in the order of their roles.
void add_adapters(std::vector<Adapters>& adapters, const loraplex::LayerRecord& record, const at::Tensor& table,
                  const at::Tensor& scalings, const at::Tensor& segments, const at::Tensor& gates, int64_t num_tokens,
                  at::TensorList routing) {
  for (int role = 0; role < kRoles; ++role) {
    const int64_t module = record.module_index(role);
    if (segments.size(0) == 0 || !record.has_module(role) || module == -1) {
      adapters.emplace_back();
      continue;
    }
    TORCH_CHECK(module >= 0 && module < table.size(1) && (gates.size(0) == 1 || module < gates.size(0)),
                "there is no module ", module);
    const float* row = gates.const_data_ptr<float>() + (gates.size(0) == 1 ? 0 : module * gates.size(1));
    adapters.push_back(read_adapters(table, scalings, module, segments, row, num_tokens, routing));
  }
}

// The adapters of stacked experts. Empty, or int64 [slots * width, 1, 3], addresses of lora_a and lora_b and the rank,
// and float32 [slots * width, 1], scalings.
template <typename T>
void add_expert_table(loraplex::Decoder<T>& decoder, at::TensorList experts, int64_t width, int64_t num_slots,
                      const at::Tensor& segments) {
  if (experts.empty() || segments.size(0) == 0) return;
  TORCH_CHECK(experts.size() == 2 && width > 0 && experts[0].numel() == num_slots * width * 3 &&
                  experts[1].numel() == num_slots * width && experts[0].is_contiguous() &&
                  experts[1].is_contiguous() && experts[0].scalar_type() == at::kLong &&
                  experts[1].scalar_type() == at::kFloat,
              "the table of experts must be int64 [slots * width, 1, 3] and float32 [slots * width, 1], contiguous");
  decoder.expert_table = {experts[0].const_data_ptr<int64_t>(), experts[1].const_data_ptr<float>(), width,
                          segments.const_data_ptr<int64_t>(), segments.size(0)};
  const int64_t* rows = decoder.expert_table.segments;
  for (int64_t i = 0; i < segments.size(0); ++i, rows += 4) {
    TORCH_CHECK(rows[0] >= 0 && rows[1] <= decoder.tokens && rows[2] >= 0 && rows[2] < num_slots, "segment ", i,
                " lies outside the batch or the table");
  }
}

// Where the gates of the adapters of a layer's experts begin; checks what the table of experts has of them.
template <typename T>
void add_expert_gates(loraplex::Decoder<T>& decoder, const loraplex::LayerRecord& record, const Layer<T>& layer,
                      const at::Tensor& gates) {
  for (const bool is_last : {false, true}) {
    const int64_t module = record.expert_index(is_last), first = is_last ? layer.experts.first_down : layer.experts.first_input;
    const bool has_adapters = decoder.expert_table.exists() && layer.experts.exists() && first >= 0;
    TORCH_CHECK(!has_adapters || (first + layer.experts.router.num_experts <= decoder.expert_table.width && module >= 0 &&
                                  (gates.size(0) == 1 || module < gates.size(0))),
                "the table has no experts of module ", module);
    const bool has_own = has_adapters && gates.size(0) > 1;
    decoder.expert_gates.push_back(gates.const_data_ptr<float>() + (has_own ? module * gates.size(1) : 0));
  }
}

// Which vectors are added to which tokens. Empty, or int64 [groups, layers, kVectorSites], addresses of float32 [hidden],
// and [tokens], each token's group or -1.
template <typename T>
void add_vectors(loraplex::Decoder<T>& decoder, at::TensorList vectors, int64_t num_layers) {
  if (vectors.empty()) return;
  TORCH_CHECK(vectors.size() == 2 && vectors[0].dim() == 3 && vectors[0].size(1) == num_layers &&
                  vectors[0].size(2) == loraplex::kVectorSites && vectors[1].numel() == decoder.tokens,
              "vectors don't describe these layers and tokens");
  TORCH_CHECK(vectors[0].is_contiguous() && vectors[1].is_contiguous() && vectors[0].scalar_type() == at::kLong &&
                  vectors[1].scalar_type() == at::kLong,
              "vectors must be int64, contiguous");
  decoder.vectors = vectors[0].const_data_ptr<int64_t>();
  decoder.groups = vectors[1].const_data_ptr<int64_t>();
  for (int64_t t = 0; t < decoder.tokens; ++t) {
    TORCH_CHECK(decoder.groups[t] >= -1 && decoder.groups[t] < vectors[0].size(0), "token ", t, " is of no group");
  }
}

// What rows ask of attention. Empty, or int64 [groups, layers, 3] as asked.h has it, and [tokens], each token's group or
// -1.
template <typename T>
void add_asked(loraplex::Decoder<T>& decoder, at::TensorList asked, int64_t num_layers) {
  if (asked.empty()) return;
  TORCH_CHECK(asked.size() == 2 && asked[0].dim() == 3 && asked[0].size(1) == num_layers, "what is asked doesn't ",
              "describe these layers");
  const int64_t* groups = loraplex::read_groups(asked[0], asked[1], decoder.tokens);
  for (int64_t l = 0; l < num_layers; ++l) {
    decoder.asked.push_back({asked[0].const_data_ptr<int64_t>() + l * loraplex::AskedLayer::kInts,
                             num_layers * loraplex::AskedLayer::kInts, groups});
  }
}

// Layers of a decoder for x [tokens, hidden], one token of each track. `layers` and `constants` have a row for each
// layer, which layer_record.h reads. rotary: cosines and sines [tokens, dim] of all kinds in turn; kinds: by layer which
// of them are its own. gates [1 or modules, ..]: the same for all modules, or of each.
at::Tensor decode_layers(const at::Tensor& x, const at::Tensor& layers, const at::Tensor& constants, int64_t num_blocks,
                         int64_t block_tokens, at::TensorList rotary, at::IntArrayRef kinds, const at::Tensor& table,
                         const at::Tensor& rows, const at::Tensor& positions, const at::Tensor& adapter_table,
                         const at::Tensor& scalings, const at::Tensor& segments, const at::Tensor& gates,
                         at::TensorList routing, at::TensorList vectors, at::TensorList asked,
                         at::TensorList experts, int64_t experts_width) {
  check_input(x, x);
  for (const at::Tensor& values : rotary) {
    TORCH_CHECK(values.is_contiguous() && values.scalar_type() == at::kFloat, "cosines and sines must be float32");
  }
  const int64_t num_layers = layers.size(0), num_tokens = x.size(0);
  TORCH_CHECK(x.dim() == 2 && layers.is_contiguous() && constants.is_contiguous() && num_layers > 0 &&
                  layers.size(1) == loraplex::kLayerInts && constants.size(1) == loraplex::kLayerFloats &&
                  constants.size(0) == num_layers && static_cast<int64_t>(kinds.size()) == num_layers,
              "layers and constants don't describe the same layers");
  TORCH_CHECK(table.is_contiguous() && table.scalar_type() == at::kInt && rows.is_contiguous() &&
                  positions.is_contiguous() && rows.scalar_type() == at::kLong && positions.scalar_type() == at::kLong,
              "table must be int32, rows and positions int64, contiguous");
  TORCH_CHECK(gates.dim() == 2 && gates.is_contiguous() && gates.scalar_type() == at::kFloat, "gates must be float32");
  check_places(table, rows, positions, num_tokens, num_blocks, block_tokens);
  at::Tensor out = x.clone();
  LORAPLEX_DISPATCH(x, {
    loraplex::Decoder<scalar> decoder{num_tokens,
                                      x.size(1),
                                      block_tokens,
                                      table.size(1),
                                      {},
                                      {},
                                      table.const_data_ptr<int32_t>(),
                                      rows.const_data_ptr<int64_t>(),
                                      positions.const_data_ptr<int64_t>(),
                                      loraplex::best_tiling()};
    add_expert_table(decoder, experts, experts_width, adapter_table.size(0), segments);
    for (int64_t l = 0; l < num_layers; ++l) {
      const loraplex::LayerRecord record{layers.const_data_ptr<int64_t>() + l * loraplex::kLayerInts,
                                         constants.const_data_ptr<double>() + l * loraplex::kLayerFloats};
      Layer<scalar> layer = record.read<scalar>();
      loraplex::check_layer(layer, x.size(1));
      if (layer.rotary != loraplex::Rotary::kNone) {
        TORCH_CHECK(kinds[l] >= 0 && 2 * kinds[l] + 1 < static_cast<int64_t>(rotary.size()), "layer ", l,
                    " has no rotary positions");
        const at::Tensor &cos = rotary[2 * kinds[l]], &sin = rotary[2 * kinds[l] + 1];
        layer.rotary_dim = cos.size(-1);
        const int64_t turned = layer.rotary_dim * (layer.rotary == loraplex::Rotary::kNarrowHalves ? 2 : 1);
        TORCH_CHECK(cos.numel() == num_tokens * layer.rotary_dim && sin.numel() == cos.numel() && turned % 2 == 0 &&
                        turned <= layer.head_dim,
                    "the rotary positions don't fit the tokens and heads");
        layer.cos = cos.const_data_ptr<float>();
        layer.sin = sin.const_data_ptr<float>();
      }
      add_expert_gates(decoder, record, layer, gates);
      add_adapters(decoder.adapters, record, adapter_table, scalings, segments, gates, num_tokens, routing);
      decoder.layers.push_back(layer);
    }
    add_vectors(decoder, vectors, num_layers);
    add_asked(decoder, asked, num_layers);
    find_prompts(decoder);
    std::optional<loraplex::Links<scalar>> links;
    if (!decoder.asked.empty()) {
      int64_t kv_heads = 0;
      for (const Layer<scalar>& layer : decoder.layers) kv_heads = std::max(kv_heads, layer.kv_heads);
      links.emplace(num_tokens, decoder.hidden, kv_heads, decoder.asked, decoder.table, decoder.row_blocks, block_tokens,
                    decoder.rows, decoder.positions);
      decoder.links = &*links;
    }
    decode<scalar>(decoder, out);
  })
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(loraplex, m) {
  m.def(
      "decode_layers(Tensor x, Tensor layers, Tensor constants, int num_blocks, int block_tokens, Tensor[] rotary, "
      "int[] kinds, Tensor table, Tensor rows, Tensor positions, Tensor adapter_table, Tensor scalings, "
      "Tensor segments, Tensor gates, Tensor[] routing, Tensor[] vectors, Tensor[] asked, Tensor[] experts, "
      "int experts_width) -> Tensor");
}

TORCH_LIBRARY_IMPL(loraplex, CPU, m) { m.impl("decode_layers", decode_layers); }
