// A run of decoder layers for single tokens: everything between a pass's embedding and its last norm.
//
//   x += o(attention(rotate(q(n1(x))), rotate(k(n1(x))), v(n1(x)))),   x += down(silu(gate(n2(x))) * up(n2(x)))
//
// where each of the seven linear modules has its gated adapters. The parts are those that run by themselves too, so a
// token has the same bits either way. All threads go through all layers together and wait for each other where one
// needs what another made: that costs about a microsecond, where a call from Python costs ten.
#pragma once

#include <omp.h>

#include <optional>
#include <vector>

#include "adapters.h"
#include "fused.h"
#include "int8_tiles.h"

namespace loraplex {

enum Module { kQuery, kKey, kValue, kOut, kGate, kUp, kDown, kModules };

template <typename T>
struct Norm {
  const T* weight;
  float eps;
  bool plus_one;
};

template <typename T>
struct Layer {
  Norm<T> before_attention, before_mlp;
  const T* weight[kModules];
  const T* bias[kModules];  // or null
  T* keys;                  // [blocks, kv_heads, block_tokens, head_dim]
  T* values;
  float scale, softcap;
  int64_t window;
};

struct Sizes {
  int64_t tokens, hidden, heads, kv_heads, head_dim, inner, block_tokens, row_blocks;

  int64_t in(int module) const {
    return module == kDown ? inner : module == kOut ? heads * head_dim : hidden;
  }
  int64_t out(int module) const {
    if (module == kGate || module == kUp) return inner;
    if (module == kQuery) return heads * head_dim;
    return module == kKey || module == kValue ? kv_heads * head_dim : hidden;
  }
};

template <typename T>
struct Decoder {
  Sizes sizes;
  std::vector<Layer<T>> layers;
  std::vector<Adapters> adapters;  // [layers * kModules]
  const int32_t* table;            // [rows, row_blocks]
  const int64_t* rows;             // [tokens]
  const int64_t* positions;        // [tokens]
  const T* cos;                    // [tokens, head_dim]
  const T* sin;
  T* x;                   // [tokens, hidden]  in and out
  T* normed;              // [tokens, hidden]
  T* made[kModules];      // what each module gives [tokens, out]; kGate's becomes the product with kUp's
  T* attended;            // [tokens, heads * head_dim]
  float* rank_space;      // of three modules that run together
  std::optional<Tiling> tiling;  // where all weights are packed, which bfloat16 ones can be
  const int64_t* int8_groups = nullptr;  // [layers * kModules]  where all weights are 8-bit integers

  // Called by all threads of a team, each with its number.
  void run(int64_t i, int64_t n) const {
    for (size_t l = 0; l < layers.size(); ++l) {
      const Layer<T>& layer = layers[l];
      norm(layer.before_attention, i, n);
      linear(l, {kQuery, kKey, kValue}, normed, i, n);
      wait();
      rotate_and_store(layer, i, n);
      wait();
      attend(layer, i, n);
      wait();
      linear(l, {kOut}, attended, i, n);
      add(kOut, i, n);
      norm(layer.before_mlp, i, n);
      linear(l, {kGate, kUp}, normed, i, n);
      activate(i, n);
      wait();
      linear(l, {kDown}, made[kGate], i, n);
      add(kDown, i, n);
    }
  }

  static void wait() {
#pragma omp barrier
  }

  int64_t first(int64_t i, int64_t n) const { return sizes.tokens * i / n; }

  void norm(const Norm<T>& norm, int64_t i, int64_t n) const {
    for (int64_t t = first(i, n); t < first(i + 1, n); ++t) {
      rms_norm(x + t * sizes.hidden, norm.weight, normed + t * sizes.hidden, sizes.hidden, norm.eps, norm.plus_one);
    }
    wait();
  }

  // Modules of one input; each thread leaves with its own columns made.
  void linear(size_t l, std::initializer_list<Module> modules, const T* input, int64_t i, int64_t n) const {
    thread_local Ahead ahead;
    ahead.clear();
    const int64_t in = sizes.in(*modules.begin());
    const auto each_module = [&](const auto& run) {  // with its adapters, the thread's units of them, and its columns
      for (const Module m : modules) {
        const Adapters& own = adapters[l * kModules + m];
        const int64_t out = sizes.out(m);
        run(m, own, own.first_unit(i, n), own.first_unit(i + 1, n), share(out, i, n), share(out, i + 1, n));
      }
    };
    const auto with_base = [&](Module m, const auto& use) {
      if constexpr (std::is_same_v<T, Half>) {
        if (int8_groups != nullptr) {
          return use(Int8Linear<>{reinterpret_cast<const uint8_t*>(layers[l].weight[m]), layers[l].bias[m], input,
                                  made[m], in, sizes.out(m), sizes.tokens, int8_groups[l * kModules + m],
                                  best_int8_tiling()});
        }
        if (tiling.has_value()) {
          return use(TiledLinear<>{layers[l].weight[m], layers[l].bias[m], input, made[m], in, sizes.out(m),
                                   sizes.tokens, *tiling});
        }
      }
      return use(Linear<T>{layers[l].weight[m], layers[l].bias[m], input, made[m], in, sizes.out(m), sizes.tokens});
    };
    int64_t num_tiles = 0, num_units = 0;
    each_module([&](Module m, const Adapters& own, int64_t first, int64_t last, int64_t begin, int64_t end) {
      own.add_shrink_to<T>(ahead, first, last, in);
      with_base(m, [&](const auto& base) { num_tiles += base.num_tiles(begin, end); });
      num_units += own.num_units;
    });
    each_module([&](Module m, const Adapters& own, int64_t, int64_t, int64_t begin, int64_t end) {
      own.add_expand_to<T>(ahead, begin, end, sizes.out(m));
    });
    const int64_t portions = ahead.share(num_tiles);
    each_module([&](Module m, const Adapters&, int64_t, int64_t, int64_t begin, int64_t end) {
      with_base(m, [&](const auto& base) { base.columns(begin, end, ahead, portions); });
    });
    if (num_units == 0) return;
    float* space = rank_space;
    each_module([&](Module, const Adapters& own, int64_t first, int64_t last, int64_t, int64_t) {
      own.shrink<T>(first, last, input, in, space, ahead);
      space += own.num_hidden;
    });
    wait();
    space = rank_space;
    each_module([&](Module m, const Adapters& own, int64_t, int64_t, int64_t begin, int64_t end) {
      own.expand<T>(begin, end, space, made[m], sizes.out(m), ahead);
      space += own.num_hidden;
    });
  }

  void rotate_and_store(const Layer<T>& layer, int64_t i, int64_t n) const {
    const int64_t dim = sizes.head_dim;
    for (int64_t t = first(i, n); t < first(i + 1, n); ++t) {
      T* k = made[kKey] + t * sizes.kv_heads * dim;
      const T* v = made[kValue] + t * sizes.kv_heads * dim;
      rotate(made[kQuery] + t * sizes.heads * dim, cos + t * dim, sin + t * dim, sizes.heads, dim);
      rotate(k, cos + t * dim, sin + t * dim, sizes.kv_heads, dim);
      const int64_t block = table[rows[t] * sizes.row_blocks + positions[t] / sizes.block_tokens];
      for (int64_t h = 0; h < sizes.kv_heads; ++h) {
        const int64_t place = (block * sizes.kv_heads + h) * sizes.block_tokens + positions[t] % sizes.block_tokens;
        std::memcpy(layer.keys + place * dim, k + h * dim, dim * sizeof(T));
        std::memcpy(layer.values + place * dim, v + h * dim, dim * sizeof(T));
      }
    }
  }

  void attend(const Layer<T>& layer, int64_t i, int64_t n) const {
    const auto pages = [&](const T* data) {
      return Pages<T>{data, sizes.head_dim, sizes.kv_heads, sizes.block_tokens, sizes.row_blocks, table, rows};
    };
    const Attention<T, Pages<T>> attention{made[kQuery], attended, pages(layer.keys), pages(layer.values), sizes.heads,
                                           sizes.kv_heads, layer.scale, layer.softcap, layer.window, positions,
                                           nullptr, 0};
    thread_local std::vector<float> buffer;
    const int64_t stop = first_group(layer, i + 1, n);
    for (int64_t g = first_group(layer, i, n); g < stop; ++g) {
      attention.head_group(g / sizes.kv_heads, g % sizes.kv_heads, buffer);
    }
  }

  // Groups of heads are shared out by how many keys they see. A row's first token waits for the memory as long as it
  // computes; the others find its keys and values in the cache.
  int64_t first_group(const Layer<T>& layer, int64_t i, int64_t n) const {
    constexpr int64_t kAlways = 16;  // keys that take as long as a group with none
    const auto cost = [&](int64_t t) {
      const int64_t keys = layer.window > 0 ? std::min(layer.window, positions[t] + 1) : positions[t] + 1;
      return kAlways + (t == 0 || rows[t] != rows[t - 1] ? 2 * keys : keys);
    };
    int64_t total = 0, token = 0;
    for (int64_t t = 0; t < sizes.tokens; ++t) total += cost(t);
    int64_t before = total * i / n;
    for (; token < sizes.tokens && before >= cost(token); ++token) before -= cost(token);
    return token == sizes.tokens ? token * sizes.kv_heads : token * sizes.kv_heads + before * sizes.kv_heads / cost(token);
  }

  // gate = silu(gate) * up on the thread's own columns: whole vectors, as the caller has checked.
  void activate(int64_t i, int64_t n) const {
    const int64_t begin = share(sizes.inner, i, n), end = share(sizes.inner, i + 1, n);
    for (int64_t t = 0; t < sizes.tokens; ++t) {
      const int64_t offset = t * sizes.inner + begin;
      gated_silu(made[kGate] + offset, made[kUp] + offset, end - begin);
    }
  }

  // x += what a module made, on the thread's own columns.
  void add(Module m, int64_t i, int64_t n) const {
    const int64_t begin = share(sizes.hidden, i, n), end = share(sizes.hidden, i + 1, n);
    for (int64_t t = 0; t < sizes.tokens; ++t) {
      T* target = x + t * sizes.hidden;
      const T* source = made[m] + t * sizes.hidden;
      int64_t c = begin;
      for (; c + kLanes <= end; c += kLanes) store(target + c, load(target + c) + load(source + c));
      for (; c < end; ++c) target[c] = static_cast<T>(float(target[c]) + float(source[c]));
    }
    wait();
  }
};

}  // namespace loraplex
