// A run of decoder layers: everything between a pass's embedding and its last norm.
//
// Each of a layer's linear modules (layer.h) has its gated adapters. The parts are those that run by themselves too, so a
// token has the same bits either way. All threads go through all layers together and wait for each other where one
// needs what another made: that costs about a microsecond, where a call from Python costs ten.
#pragma once

#include <omp.h>

#include <vector>

#include "adapters.h"
#include "layer.h"
#include "linked.h"
#include "prompt_attention.h"

namespace loraplex {

// Tokens of a pass that follow each other in one sequence, and are attended to together.
struct PromptPart {
  int64_t first, count;
};

// How a layer attends to the tokens of a pass: some together, the others each by itself.
struct Split {
  std::vector<PromptPart> prompts;
  std::vector<int64_t> singles;
};

// Where vectors are added: to what the attention's last module makes, to what the feed-forward modules make, to x
// behind the layer.
enum VectorSite { kAttentionSite, kMlpSite, kBlockSite, kVectorSites };

template <typename T>
struct Decoder {
  int64_t tokens, hidden, block_tokens, row_blocks;
  std::vector<Layer<T>> layers;
  std::vector<Adapters> adapters;  // [layers * kRoles]
  const int32_t* table;            // [rows, row_blocks]
  const int64_t* rows;             // [tokens]
  const int64_t* positions;        // [tokens]
  Tiling tiling;
  std::vector<Split> splits;        // [1 or layers]
  Half* packed_keys;                // of a part of a prompt, and its values
  const int64_t* vectors;    // [groups, layers, kVectorSites]  addresses of float32 [hidden], 0: none; or null
  const int64_t* groups;     // [tokens]  of vectors; -1: none
  std::vector<AskedLayer> asked;  // [layers]; empty: no token's row asks for anything
  Links<T>* links;                // or null
  T* x;              // [tokens, hidden]  in and out
  T* normed;         // [tokens, hidden]
  T* made[kRoles];   // what each module gives [tokens, out]
  T* queries;        // [tokens, heads * head_dim], of modules that give more than queries
  T* attended;       // [tokens, heads * head_dim]
  T* activated;      // [tokens, inner], of modules that give gates and what they multiply
  float* rank_space;  // of modules that run together
  ExpertTable expert_table;
  std::vector<const float*> expert_gates;  // [layers * 2]  of both modules' adapters
  ExpertRoom<T> expert_room;

  // Called by all threads of a team, each with its number.
  void run(int64_t i, int64_t n) const {
    for (size_t l = 0; l < layers.size(); ++l) {
      const Layer<T>& layer = layers[l];
      const T* input = layer.is_attention_only ? x : norm(layer.before_attention, i, n);
      linear(l, {kQuery, kKey, kValue}, input, i, n);
      if (links != nullptr) links->shrink(l, input, i, n);
      wait();
      finish_heads(layer, i, n);
      wait();
      attend(l, i, n);
      wait();
      if (links != nullptr) links->finish(l, attention(l), i, n, false);
      linear(l, {kOut}, attended, i, n);
      if (links != nullptr) links->expand(l, made[kOut], share(hidden, i, n), share(hidden, i + 1, n));
      if (layer.is_attention_only) {
        put(kOut, i, n);
        continue;
      }
      add_vectors(l, kAttentionSite, made[kOut], i, n);
      if (!layer.is_parallel) add(layer, kOut, layer.behind_attention, i, n);
      if (!layer.shares_norm) input = norm(layer.before_mlp, i, n);
      if (layer.modules[kDown].exists()) {
        linear(l, {kGate, kUp, kSharedGate}, input, i, n);
        const T* inner = activate(layer, i, n);
        wait();
        linear(l, {kDown}, inner, i, n);
      }
      if (layer.experts.exists()) run_experts(l, input, i, n);
      add_vectors(l, kMlpSite, made[kDown], i, n);
      if (layer.is_parallel) add(layer, kOut, layer.behind_attention, i, n);
      add(layer, kDown, layer.behind_mlp, i, n, l);
    }
  }

  static void wait() {
#pragma omp barrier
  }

  int64_t first(int64_t i, int64_t n) const { return tokens * i / n; }

  // What a norm makes of x; x itself where there is none.
  const T* norm(const Norm<T>& norm, int64_t i, int64_t n) const {
    if (!norm.exists()) return x;
    for (int64_t t = first(i, n); t < first(i + 1, n); ++t) norm.run(x + t * hidden, normed + t * hidden);
    wait();
    return normed;
  }

  // Modules of one input, those which exist; each thread leaves with its own columns made, at least.
  void linear(size_t l, std::initializer_list<Role> roles, const T* input, int64_t i, int64_t n) const {
    thread_local Ahead ahead;
    ahead.clear();
    const auto each_module = [&](const auto& run) {  // with its adapters, the thread's units of them, and its columns
      for (const Role role : roles) {
        const LinearModule<T>& module = layers[l].modules[role];
        if (!module.exists()) continue;
        const Adapters& own = adapters[l * kRoles + role];
        run(role, module, own, own.first_unit(i, n), own.first_unit(i + 1, n), share(module.out, i, n),
            share(module.out, i + 1, n));
      }
    };
    int64_t num_turns = 0, num_units = 0;
    each_module([&](Role role, const auto& module, const Adapters& own, int64_t first, int64_t last, int64_t begin,
                    int64_t end) {
      own.add_shrink_to<T>(ahead, first, last, module.in);
      module.with_product(input, made[role], tokens, tiling,
                          [&](const auto& product) { num_turns += product.num_turns(begin, end); });
      num_units += own.num_units;
    });
    each_module([&](Role, const auto& module, const Adapters& own, int64_t, int64_t, int64_t, int64_t) {
      own.add_expand_to<T>(ahead, i, n, module.out);
    });
    const int64_t portions = ahead.share(num_turns);
    each_module([&](Role role, const auto& module, const Adapters&, int64_t, int64_t, int64_t begin, int64_t end) {
      module.with_product(input, made[role], tokens, tiling,
                          [&](const auto& product) { product.columns(begin, end, ahead, portions); });
    });
    if (num_units == 0) return;
    float* space = rank_space;
    each_module([&](Role, const auto& module, const Adapters& own, int64_t first, int64_t last, int64_t, int64_t) {
      own.shrink<T>(first, last, input, module.in, space, ahead);
      space += own.num_hidden;
    });
    wait();
    bool is_routed = false;
    space = rank_space;
    each_module([&](Role, const auto& module, const Adapters& own, int64_t, int64_t, int64_t, int64_t) {
      if (!own.routes.empty()) own.route<T>(i, n, input, module.in, space);
      is_routed = is_routed || !own.routes.empty();
      space += own.num_hidden;
    });
    if (is_routed) wait();
    space = rank_space;
    bool splits = false;
    each_module([&](Role role, const auto& module, const Adapters& own, int64_t, int64_t, int64_t, int64_t) {
      own.expand<T>(i, n, space, made[role], module.out, ahead);
      space += own.num_hidden;
      splits = splits || own.splits_segments(n);
    });
    if (splits) wait();
  }

  // Adds a module's adapters to y [count, out] for x [count, in]; each thread has made its own columns of y, and leaves
  // with these made, at least.
  template <typename O>
  static void adapt(const Adapters& own, const T* x, int64_t in, O* y, int64_t out, float* space, int64_t i, int64_t n) {
    thread_local Ahead ahead;
    if (own.num_units == 0) return;
    ahead.clear();
    own.shrink<T>(own.first_unit(i, n), own.first_unit(i + 1, n), x, in, space, ahead);
    wait();
    if (!own.routes.empty()) {
      own.route<T>(i, n, x, in, space);
      wait();
    }
    own.expand<T>(i, n, space, y, out, ahead);
    if (own.splits_segments(n)) wait();
  }

  // Head `head` of what was made for a token.
  T* head_of(const Layer<T>& layer, Role role, int64_t token, int64_t head) const {
    const Role module = layer.projection == Projection::kSeparate ? role : kQuery;
    return made[module] + token * layer.modules[module].out + layer.head_offset(role, head) * layer.head_dim;
  }

  // Norms and rotary positions of all queries or keys of a token, in place.
  void finish(const Layer<T>& layer, Role role, const Norm<T>& norm, int64_t token, int64_t num_heads) const {
    const bool is_whole = norm.size > layer.head_dim;  // all heads together
    if (is_whole) norm.run(head_of(layer, role, token, 0), head_of(layer, role, token, 0));
    for (int64_t h = 0; h < num_heads; ++h) {
      T* head = head_of(layer, role, token, h);
      if (norm.exists() && !is_whole) norm.run(head, head, h);
      const int64_t offset = token * layer.rotary_dim;
      rotate_head(layer.rotary, head, layer.cos + offset, layer.sin + offset, layer.rotary_dim);
    }
  }

  // Queries, keys and values as they are attended to; these are stored in their blocks.
  void finish_heads(const Layer<T>& layer, int64_t i, int64_t n) const {
    const int64_t dim = layer.head_dim, bytes = dim * sizeof(T);
    for (int64_t t = first(i, n); t < first(i + 1, n); ++t) {
      finish(layer, kQuery, layer.query, t, layer.heads);
      finish(layer, kKey, layer.key, t, layer.kv_heads);
      for (int64_t h = 0; layer.projection != Projection::kSeparate && h < layer.heads; ++h) {
        std::memcpy(queries + (t * layer.heads + h) * dim, head_of(layer, kQuery, t, h), bytes);
      }
      const int64_t block = table[rows[t] * row_blocks + positions[t] / block_tokens];
      for (int64_t h = 0; h < layer.kv_heads; ++h) {
        const int64_t place = (block * layer.kv_heads + h) * block_tokens + positions[t] % block_tokens;
        std::memcpy(layer.keys + place * dim, head_of(layer, kKey, t, h), bytes);
        std::memcpy(layer.values + place * dim, head_of(layer, kValue, t, h), bytes);
      }
    }
  }

  AskedLayer asked_of(size_t l) const { return asked.empty() ? AskedLayer{} : asked[l]; }

  const Split& split(size_t l) const { return splits[splits.size() == 1 ? 0 : l]; }

  Pages<T> pages(const Layer<T>& layer, const T* data) const {
    return {data, layer.head_dim, layer.kv_heads, block_tokens, row_blocks, table, rows};
  }

  void attend(size_t l, int64_t i, int64_t n) const {
    attend_single(l, i, n);
    if constexpr (std::is_same_v<T, Half>) {
      for (const PromptPart& part : split(l).prompts) prompt_attention(l, part).run(i, n, packed_keys);
    }
  }

  PromptAttention prompt_attention(size_t l, const PromptPart& part) const {
    const Layer<T>& layer = layers[l];
    const int64_t offset = part.first * layer.heads * layer.head_dim;
    return {queries_of(layer) + offset,      attended + offset, pages(layer, layer.keys), pages(layer, layer.values),
            layer.heads,                     layer.kv_heads,    layer.scale,              layer.softcap,
            layer.window,                    layer.chunk,       layer.sinks,              part.first,
            positions[part.first],           part.count,        tiling,                   asked_of(l).steering(part.first)};
  }

  const T* queries_of(const Layer<T>& layer) const {
    return layer.projection == Projection::kSeparate ? made[kQuery] : queries;
  }

  Attention<T, Pages<T>> attention(size_t l) const {
    const Layer<T>& layer = layers[l];
    return {queries_of(layer), attended,     pages(layer, layer.keys), pages(layer, layer.values), layer.heads,
            layer.kv_heads,    layer.scale,  layer.softcap,            layer.window,               positions,
            nullptr,           0,            layer.chunk,              layer.sinks,                asked_of(l)};
  }

  void attend_single(size_t l, int64_t i, int64_t n) const {
    const Layer<T>& layer = layers[l];
    const Attention<T, Pages<T>> attention = this->attention(l);
    const std::vector<int64_t>& singles = split(l).singles;
    thread_local std::vector<float> buffer;
    const int64_t stop = first_group(layer, attention, singles, i + 1, n);
    for (int64_t g = first_group(layer, attention, singles, i, n); g < stop; ++g) {
      const int64_t token = singles[g / layer.kv_heads], kv_head = g % layer.kv_heads;
      attention.head_group(token, kv_head, buffer);
      if (links != nullptr && links->is_asked(l)) links->hear_alone(l, attention, token, kv_head, buffer);
    }
  }

  // Groups of heads are shared out by how many keys they see. A row's first token waits for the memory as long as it
  // computes; the others find its keys and values in the cache.
  int64_t first_group(const Layer<T>& layer, const Attention<T, Pages<T>>& attention,
                      const std::vector<int64_t>& singles, int64_t i, int64_t n) const {
    constexpr int64_t kAlways = 16;  // keys that take as long as a group with none
    const auto cost = [&](int64_t single) {
      const int64_t t = singles[single];
      const int64_t keys = attention.stop(t) - attention.first(t);
      return kAlways + (t == 0 || rows[t] != rows[t - 1] ? 2 * keys : keys);
    };
    const int64_t stop = singles.size();
    int64_t total = 0, single = 0;
    for (int64_t s = 0; s < stop; ++s) total += cost(s);
    int64_t before = total * i / n;
    for (; single < stop && before >= cost(single); ++single) before -= cost(single);
    return single * layer.kv_heads + (single == stop ? 0 : before * layer.kv_heads / cost(single));
  }

  // Leaves the experts' sum where feed-forward modules leave what they make, and adds it to theirs.
  void run_experts(size_t l, const T* input, int64_t i, int64_t n) const {
    const Layer<T>& layer = layers[l];
    const Experts<T>& experts = layer.experts;
    thread_local ExpertPairs pairs;
    choose_experts(l, input, i, n);
    pairs.sort(expert_room.chosen, tokens, experts.router.top_k, experts.router.num_experts);
    const int64_t count = pairs.tokens.size(), inner = experts.inner();
    for (int64_t p = count * i / n; p < count * (i + 1) / n; ++p) {
      std::memcpy(expert_room.inputs + p * hidden, input + pairs.tokens[p] * hidden, hidden * sizeof(T));
    }
    wait();
    expert_products(l, pairs, false, expert_room.inputs, expert_room.made, i, n);
    wait();
    const int64_t begin = share(inner, i, n), end = share(inner, i + 1, n);
    for (int64_t p = 0; p < count; ++p) {
      experts.activate(layer.activation, expert_room.made + p * experts.input.out, expert_room.activated + p * inner,
                       begin, end);
    }
    wait();
    expert_products(l, pairs, true, expert_room.activated, expert_room.outputs, i, n);
    add_experts(layer, pairs, i, n);
  }

  void choose_experts(size_t l, const T* input, int64_t i, int64_t n) const {
    const LinearModule<T>& module = layers[l].modules[kRouter];
    const RouterTerms& router = layers[l].experts.router;
    thread_local Ahead nothing;
    nothing.clear();
    Linear<T, float>{module.weight, module.bias, input, expert_room.logits, hidden, module.out, tokens}.columns(
        share(module.out, i, n), share(module.out, i + 1, n), nothing, 0);
    adapt(adapters[l * kRoles + kRouter], input, hidden, expert_room.logits, module.out, rank_space, i, n);
    wait();
    for (int64_t t = first(i, n); t < first(i + 1, n); ++t) {
      float* logits = expert_room.logits + t * module.out;
      for (int64_t e = 0; router.rounds && e < module.out; ++e) logits[e] = float(static_cast<T>(logits[e]));
      router.choose(logits, expert_room.chosen + t * router.top_k, expert_room.weights + t * router.top_k);
    }
    wait();
  }

  // What one module of every expert makes of its pairs, on the thread's own columns.
  void expert_products(size_t l, const ExpertPairs& pairs, bool is_last, const T* x, T* y, int64_t i, int64_t n) const {
    const Experts<T>& experts = layers[l].experts;
    const LinearModule<T>& all = is_last ? experts.down : experts.input;
    thread_local Ahead nothing;
    nothing.clear();
    pairs.each_expert([&](int64_t expert, int64_t first, int64_t count) {
      Experts<T>::of(all, expert).with_product(x + first * all.in, y + first * all.out, count, tiling,
                                               [&](const auto& product) {
        product.columns(share(all.out, i, n), share(all.out, i + 1, n), nothing, 0);
      });
    });
    if (!expert_table.exists()) return;
    thread_local Adapters own;
    thread_local std::vector<float> gates;
    expert_table.find(pairs, is_last ? experts.first_down : experts.first_input, experts.router.top_k,
                      expert_gates[2 * l + is_last], own, gates);
    adapt(own, x, all.in, y, all.out, expert_room.rank_space, i, n);
  }

  // The weighted sum of each token's experts, and of the modules that all tokens share, on the thread's own columns.
  void add_experts(const Layer<T>& layer, const ExpertPairs& pairs, int64_t i, int64_t n) const {
    const int64_t top_k = layer.experts.router.top_k, begin = share(hidden, i, n), end = share(hidden, i + 1, n);
    const bool is_shared = layer.modules[kDown].exists(), is_gated = layer.modules[kSharedGate].exists();
    for (int64_t t = 0; t < tokens; ++t) {
      T* y = made[kDown] + t * hidden;
      const float shared = is_gated ? 1.0f / (1.0f + std::exp(-float(made[kSharedGate][t]))) : 1.0f;
      const auto each_choice = [&](const auto& run) {
        for (int64_t j = t * top_k; j < (t + 1) * top_k; ++j) {
          run(expert_room.weights[j], expert_room.outputs + pairs.places[j] * hidden);
        }
      };
      int64_t c = begin;
      for (; c + kLanes <= end; c += kLanes) {
        Floats sum = is_shared ? load(y + c) * shared : Floats{};
        each_choice([&](float weight, const T* output) { sum += load(output + c) * weight; });
        store(y + c, sum);
      }
      for (; c < end; ++c) {
        float sum = is_shared ? float(y[c]) * shared : 0.0f;
        each_choice([&](float weight, const T* output) { sum = fused(float(output[c]), weight, sum); });
        y[c] = static_cast<T>(sum);
      }
    }
  }

  // What goes into the last module, on the thread's own columns.
  const T* activate(const Layer<T>& layer, int64_t i, int64_t n) const {
    const int64_t begin = share(layer.inner, i, n), end = share(layer.inner, i + 1, n);
    const bool is_joined = layer.has_joined_gate();
    if (is_joined) wait();  // other threads have made parts of these columns
    const int64_t stride = layer.modules[kGate].out;
    T* out = is_joined ? activated : made[kGate];
    for (int64_t t = 0; t < tokens; ++t) {
      const T* gate = made[kGate] + t * stride + begin;
      const T* up = nullptr;
      if (is_joined) up = gate + layer.inner;
      else if (layer.gating != Gating::kNone) up = made[kUp] + t * layer.inner + begin;
      if (layer.gating == Gating::kUpFirst) std::swap(gate, up);
      loraplex::activate(layer.activation, gate, up, out + t * layer.inner + begin, end - begin);
    }
    return out;
  }

  // x = what a module made, on the thread's own columns.
  void put(Role role, int64_t i, int64_t n) const {
    const int64_t begin = share(hidden, i, n), end = share(hidden, i + 1, n);
    for (int64_t t = 0; t < tokens; ++t) {
      std::memcpy(x + t * hidden + begin, made[role] + t * hidden + begin, (end - begin) * sizeof(T));
    }
    wait();
  }

  // The vector of a token at a site; null: none.
  const float* vector_of(int64_t token, size_t l, VectorSite site) const {
    if (vectors == nullptr || groups[token] < 0) return nullptr;
    const int64_t number = (groups[token] * layers.size() + l) * kVectorSites + site;
    return reinterpret_cast<const float*>(vectors[number]);
  }

  // states [tokens, hidden] += the tokens' vectors, on the thread's own columns.
  void add_vectors(size_t l, VectorSite site, T* states, int64_t i, int64_t n) const {
    if (vectors == nullptr) return;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* vector = vector_of(t, l, site);
      if (vector != nullptr) add_vector(vector, states + t * hidden, share(hidden, i, n), share(hidden, i + 1, n));
    }
  }

  static void add_vector(const float* vector, T* target, int64_t begin, int64_t end) {
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) store(target + c, load(target + c) + load(vector + c));
    for (; c < end; ++c) target[c] = static_cast<T>(float(target[c]) + vector[c]);
  }

  static constexpr size_t kInside = -1;  // of a layer: more is added behind

  // x += what a module made, or its norm; behind the last one of layer `last` its vectors.
  void add(const Layer<T>& layer, Role role, const Norm<T>& behind, int64_t i, int64_t n, size_t last = kInside) const {
    const auto vector_of_block = [&](int64_t t) {
      return last == kInside ? nullptr : vector_of(t, last, kBlockSite);
    };
    if (behind.exists()) {
      wait();
      for (int64_t t = first(i, n); t < first(i + 1, n); ++t) {
        T* vector = made[role] + t * hidden;
        behind.run(vector, vector);
        add_columns(vector, x + t * hidden, 0, hidden, layer.multiplier);
        if (const float* own = vector_of_block(t)) add_vector(own, x + t * hidden, 0, hidden);
      }
    } else {
      const int64_t begin = share(hidden, i, n), end = share(hidden, i + 1, n);
      for (int64_t t = 0; t < tokens; ++t) {
        add_columns(made[role] + t * hidden, x + t * hidden, begin, end, layer.multiplier);
        if (const float* own = vector_of_block(t)) add_vector(own, x + t * hidden, begin, end);
      }
    }
    wait();
  }

  static void add_columns(const T* source, T* target, int64_t begin, int64_t end, float multiplier) {
    int64_t c = begin;
    for (; c + kLanes <= end; c += kLanes) store(target + c, load(target + c) + load(source + c) * multiplier);
    for (; c < end; ++c) target[c] = static_cast<T>(fused(float(source[c]), multiplier, float(target[c])));
  }
};

}  // namespace loraplex
