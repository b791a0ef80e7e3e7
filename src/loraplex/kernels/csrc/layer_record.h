// What Python wrote about a layer (engine/worker/fusion/layer_record.py), in its order: whole numbers and addresses, and floats.
#pragma once

#include "arguments.h"
#include "layer.h"

namespace loraplex {

constexpr int64_t kModuleInts = 7, kNormInts = 5, kNorms = 6;
constexpr int64_t kExpertInts = 2 * kModuleInts + 11;
constexpr int64_t kLayerInts = kRoles * kModuleInts + kNorms * kNormInts + 16 + kExpertInts;
constexpr int64_t kLayerFloats = kNorms + 6;

struct LayerRecord {
  const int64_t* ints;
  const double* floats;

  const int64_t* module(int role) const { return ints + role * kModuleInts; }
  bool has_module(int role) const { return module(role)[0] != 0; }
  int64_t module_index(int role) const { return module(role)[5]; }  // in routing plans; -1: it is in none

  // Of the experts' first module, and of their last one.
  int64_t expert_index(bool is_last) const { return experts()[is_last * kModuleInts + 5]; }

  template <typename T>
  Layer<T> read() const {
    Layer<T> layer{};
    for (int role = 0; role < kRoles; ++role) layer.modules[role] = linear<T>(module(role));
    Norm<T>* norms[kNorms] = {&layer.before_attention, &layer.behind_attention, &layer.before_mlp,
                              &layer.behind_mlp,       &layer.query,            &layer.key};
    for (int i = 0; i < kNorms; ++i) {
      const int64_t* n = ints + kRoles * kModuleInts + i * kNormInts;
      *norms[i] = {address<T>(n[0]), address<T>(n[1]), n[2], n[3], static_cast<float>(floats[i]), (n[4] & 1) != 0,
                   (n[4] & 2) != 0};
    }
    const int64_t* rest = ints + kRoles * kModuleInts + kNorms * kNormInts;
    layer.is_attention_only = rest[0] != 0;
    layer.is_parallel = rest[1] != 0;
    layer.shares_norm = rest[2] != 0;
    layer.heads = rest[3];
    layer.kv_heads = rest[4];
    layer.head_dim = rest[5];
    layer.inner = rest[6];
    layer.projection = static_cast<Projection>(rest[7]);
    layer.rotary = static_cast<Rotary>(rest[8]);
    layer.activation = static_cast<Activation>(rest[9]);
    layer.gating = static_cast<Gating>(rest[10]);
    layer.keys = const_cast<T*>(address<T>(rest[11]));
    layer.values = const_cast<T*>(address<T>(rest[12]));
    layer.window = rest[13];
    layer.chunk = rest[14];
    layer.sinks = address<float>(rest[15]);
    layer.scale = static_cast<float>(floats[kNorms]);
    layer.softcap = static_cast<float>(floats[kNorms + 1]);
    layer.multiplier = static_cast<float>(floats[kNorms + 2]);
    layer.experts = read_experts<T>();
    return layer;
  }

 private:
  const int64_t* experts() const { return ints + kLayerInts - kExpertInts; }

  template <typename T>
  Experts<T> read_experts() const {
    const int64_t *e = experts(), *rest = e + 2 * kModuleInts;
    Experts<T> all{};
    all.input = linear<T>(e);
    all.down = linear<T>(e + kModuleInts);
    all.router = {rest[0],     rest[1], static_cast<Scores>(rest[2]), rest[3] != 0,
                  rest[4] != 0, rest[5], rest[6],                      address<float>(rest[7]),
                  static_cast<float>(floats[kNorms + 3])};
    all.gate = static_cast<ExpertGate>(rest[8]);
    all.first_input = rest[9];
    all.first_down = rest[10];
    all.alpha = static_cast<float>(floats[kNorms + 4]);
    all.limit = static_cast<float>(floats[kNorms + 5]);
    return all;
  }

  template <typename T>
  static LinearModule<T> linear(const int64_t* m) {
    return {address<T>(m[0]), address<T>(m[1]), static_cast<WeightForm>(m[2]), m[3], m[4], m[6]};
  }

  template <typename T>
  static const T* address(int64_t number) {
    return reinterpret_cast<const T*>(number);
  }
};

template <typename T>
void check_experts(const Layer<T>& layer, int64_t hidden) {
  const Experts<T>& experts = layer.experts;
  if (!experts.exists()) return;
  const RouterTerms& router = experts.router;
  const LinearModule<T>& logits = layer.modules[kRouter];
  TORCH_CHECK(logits.exists() && logits.form == WeightForm::kRows && logits.in == hidden &&
                  logits.out == router.num_experts,
              "a router [", logits.out, ", ", logits.in, "] doesn't fit ", router.num_experts, " experts of ", hidden);
  TORCH_CHECK(router.top_k > 0 && router.num_groups > 0 && router.num_experts % router.num_groups == 0 &&
                  router.top_groups > 0 && router.top_groups <= router.num_groups &&
                  router.top_k <= router.num_experts / router.num_groups * router.top_groups,
              "a router can't choose ", router.top_k, " of ", router.num_experts, " experts");
  const int64_t made = experts.inner() * (experts.gate == ExpertGate::kNone ? 1 : 2);
  for (const LinearModule<T>* module : {&experts.input, &experts.down}) {
    TORCH_CHECK(module->exists() && module->form != WeightForm::kInt8 &&
                    (module->form != WeightForm::kTiles || std::is_same_v<T, Half>),
                "experts are of another form");
  }
  TORCH_CHECK(experts.input.in == hidden && experts.input.out == made && experts.down.out == hidden,
              "experts of [", experts.input.out, ", ", experts.input.in, "] and [", experts.down.out, ", ",
              experts.down.in, "] don't fit ", hidden);
}

// Whether the sizes of a layer's parts fit each other; checked here, as threads can't throw.
template <typename T>
void check_layer(const Layer<T>& layer, int64_t hidden) {
  const bool is_separate = layer.projection == Projection::kSeparate;
  const auto fits = [&](Role role, int64_t in, int64_t out) {
    const LinearModule<T>& module = layer.modules[role];
    TORCH_CHECK(module.exists() && module.in == in && module.out == out, "module ", static_cast<int>(role), " is [",
                module.out, ", ", module.in, "] instead of [", out, ", ", in, "]");
    const bool is_packed = module.form == WeightForm::kTiles || module.form == WeightForm::kInt8;
    TORCH_CHECK(!is_packed || (std::is_same_v<T, Half>), "only bfloat16 weights can be packed");
  };
  TORCH_CHECK(layer.heads > 0 && layer.kv_heads > 0 && layer.heads % layer.kv_heads == 0 && layer.head_dim > 0,
              layer.heads, " heads can't share ", layer.kv_heads);
  const int64_t queries = layer.heads * layer.head_dim, keys = layer.kv_heads * layer.head_dim;
  fits(kQuery, hidden, is_separate ? queries : queries + 2 * keys);
  if (is_separate) fits(kKey, hidden, keys);
  if (is_separate) fits(kValue, hidden, keys);
  fits(kOut, queries, hidden);
  for (const auto& [norm, size] : {std::pair{&layer.query, queries}, std::pair{&layer.key, keys}}) {
    TORCH_CHECK(norm->size == 0 || norm->size == layer.head_dim ||
                    (norm->size == size && layer.projection != Projection::kGroups),
                "a norm of ", norm->size, " values doesn't fit the heads");
  }
  if (layer.is_attention_only) return;
  check_experts(layer, hidden);
  if (layer.modules[kDown].exists() || !layer.experts.exists()) {
    const bool is_joined = layer.has_joined_gate();
    fits(kGate, hidden, is_joined ? 2 * layer.inner : layer.inner);
    if (layer.gating != Gating::kNone && !is_joined) fits(kUp, hidden, layer.inner);
    fits(kDown, layer.inner, hidden);
    if (layer.modules[kSharedGate].exists()) fits(kSharedGate, hidden, 1);
  }
  for (const Norm<T>* norm : {&layer.before_attention, &layer.behind_attention, &layer.before_mlp, &layer.behind_mlp}) {
    TORCH_CHECK(norm->size == 0 || norm->size == hidden, "a norm of ", norm->size, " values doesn't fit ", hidden);
  }
}

}  // namespace loraplex
