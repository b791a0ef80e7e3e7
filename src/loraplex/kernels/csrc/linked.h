// Linked residuals of some tokens' rows at one attention layer (residual/modules.py has the formula).
//
//   u_j[t] = A_j (x[t] + r_0[t] + .. + r_j-1[t]),   w_jk[t, s] = sum_h mix_j[h, k] a_h[t, s]
//   v_j[t, k] = sum_s w_jk[t, s] u_j[s, k],         r_j[t] = scale_j B_j^T v_j[t]
//
// u of all tokens is kept in blocks as keys are. A token that is its row's only one in the pass finds u of all others
// there, so all its sums are made where its weights are; of itself, u_j needs v_j-1, so that share is added behind.
// Where a row has several tokens, each link waits for the one before it, with weights computed anew.
#pragma once

#include <vector>

#include "asked.h"
#include "attention.h"

namespace loraplex {

typedef float Eight __attribute__((vector_size(32)));

// The sum of a row of float32 times a row of T, in an order that depends on nothing else.
template <typename T>
float dot(const float* a, const T* x, int64_t size) {
  Floats acc[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= size; i += 2 * kLanes) {
    each<2>([&](auto j) { acc[j] += load(a + i + j * kLanes) * load(x + i + j * kLanes); });
  }
  for (; i + kLanes <= size; i += kLanes) acc[0] += load(a + i) * load(x + i);
  float total = sum(acc[0] + acc[1]);
  for (; i < size; ++i) total = fused(a[i], float(x[i]), total);
  return total;
}

template <typename T>
class Links {
 public:
  // Tokens [tokens] in the order of the pass; those of one row stand together.
  Links(int64_t tokens, int64_t hidden, int64_t max_kv_heads, std::vector<AskedLayer> layers, const int32_t* table,
        int64_t row_blocks, int64_t block_tokens, const int64_t* rows, const int64_t* positions)
      : layers_(std::move(layers)), hidden_(hidden), kv_heads_(max_kv_heads), table_(table), row_blocks_(row_blocks),
        block_tokens_(block_tokens), rows_(rows), positions_(positions), index_(tokens, -1),
        num_levels_(layers_.size(), 0), is_asked_(layers_.size(), false) {
    for (int64_t t = 0; t < tokens; ++t) {
      const bool follows = t > 0 && rows[t] == rows[t - 1], is_followed = t + 1 < tokens && rows[t] == rows[t + 1];
      bool has_link = false;
      for (size_t l = 0; l < layers_.size(); ++l) {
        const LinkRecord link = layers_[l].link(t);
        if (layers_[l].vector(t) != nullptr) has_link = is_asked_[l] = true;
        if (!link.exists()) continue;
        has_link = is_asked_[l] = true;
        width_ = std::max(width_, link.sum_of_ranks());
        if (follows || is_followed) num_levels_[l] = std::max(num_levels_[l], link.num_levels());
      }
      if (!has_link) continue;
      index_[t] = asked_.size();
      asked_.push_back({t, !follows && !is_followed});
    }
    const size_t size = asked_.size() * width_;
    raw_.resize(size);
    v_.resize(size);
    heard_.resize(size * kv_heads_);
    own_.resize(size * kv_heads_);
  }

  bool is_asked(size_t l) const { return is_asked_[l]; }

  // The first step: A_j x, on the thread's share of the rows of all A; x [tokens, hidden]. A barrier follows.
  void shrink(size_t l, const T* x, int64_t i, int64_t n) {
    if (!is_asked_[l]) return;
    int64_t total = 0;
    for (const Asked& one : asked_) total += sum_of_ranks(l, one.token);
    const int64_t begin = total * i / n, end = total * (i + 1) / n;
    int64_t unit = 0;
    for (const Asked& one : asked_) {
      const LinkRecord link = layers_[l].link(one.token);
      if (!link.exists()) continue;
      float* raw = raw_.data() + index_[one.token] * width_;
      for (int64_t j = 0; j < link.num_levels(); ++j) {
        const LevelRecord level = link.level(j);
        for (int64_t k = 0; k < level.rank(); ++k, ++unit, ++raw) {
          if (unit < begin || unit >= end) continue;
          *raw = dot(level.a() + k * hidden_, x + one.token * hidden_, hidden_);
          if (level.constant() != nullptr) *raw += level.constant()[k];
          if (j == 0) put(level, one.token, k, *raw);
        }
      }
    }
  }

  // The sums of one group of heads of a token whose row has no other in the pass; `weights` as `Attention::weigh` left
  // them. Does nothing for others.
  template <typename A>
  void hear_alone(size_t l, const A& attention, int64_t token, int64_t kv_head, const std::vector<float>& weights) {
    const int64_t own = index_[token];
    const LinkRecord link = layers_[l].link(token);
    if (own < 0 || !asked_[own].is_alone || !link.exists()) return;
    const int64_t last = positions_[token], group = attention.heads / attention.kv_heads;
    int64_t first = 0;
    for (int64_t j = 0; j < link.num_levels(); ++j) {
      const LevelRecord level = link.level(j);
      hear(level, attention, token, kv_head, weights, j == 0 ? last + 1 : last, place(heard_, own, kv_head) + first);
      const int64_t begin = attention.first(token), padded = attention.padded(token);
      for (int64_t k = 0; k < level.rank() && j > 0; ++k) {  // what it listens to itself with
        float total = 0;
        for (int64_t g = 0; g < group; ++g) {
          total = fused(level.mix()[(kv_head * group + g) * level.rank() + k], weights[g * padded + last - begin], total);
        }
        place(own_, own, kv_head)[first + k] = total;
      }
      first += level.rank();
    }
  }

  // All tokens' v, once the keys of the pass are stored; threads are together before and behind. `hears_alone`: also the
  // sums that `hear_alone` makes.
  template <typename A>
  void finish(size_t l, const A& attention, int64_t i, int64_t n, bool hears_alone) {
    if (!is_asked_[l]) return;
    thread_local std::vector<float> weights;
    if (hears_alone) {
      each_unit(l, true, attention.kv_heads, i, n, [&](int64_t token, int64_t kv_head) {
        attention.weigh(token, kv_head, weights);
        hear_alone(l, attention, token, kv_head, weights);
      });
      wait();
    }
    for (size_t own = asked_.size() * i / n; own < asked_.size() * (i + 1) / n; ++own) {
      if (!asked_[own].is_alone) continue;
      const LinkRecord link = layers_[l].link(asked_[own].token);
      for (int64_t j = 0; link.exists() && j < link.num_levels(); ++j) {
        if (j > 0) read(l, own, j);
        conclude(l, own, j, attention.kv_heads);
      }
    }
    for (int64_t j = 0; j < num_levels_[l]; ++j) {
      if (j > 0) each_own(i, n, [&](size_t own) { read(l, own, j); });
      wait();
      each_unit(l, false, attention.kv_heads, i, n, [&](int64_t token, int64_t kv_head) {
        const LinkRecord link = layers_[l].link(token);
        if (j >= link.num_levels()) return;
        attention.weigh(token, kv_head, weights);
        float* sums = place(heard_, index_[token], kv_head) + first_of(link, j);
        hear(link.level(j), attention, token, kv_head, weights, positions_[token] + 1, sums);
      });
      wait();
      each_own(i, n, [&](size_t own) { conclude(l, own, j, attention.kv_heads); });
    }
    wait();
  }

  // out [tokens, hidden] += the residuals, on columns [begin, end), which begin and end with whole vectors.
  void expand(size_t l, T* out, int64_t begin, int64_t end) const {
    if (!is_asked_[l]) return;
    for (size_t own = 0; own < asked_.size(); ++own) {
      const int64_t token = asked_[own].token;
      const LinkRecord link = layers_[l].link(token);
      const float* vector = layers_[l].vector(token);
      if (!link.exists() && vector == nullptr) continue;
      T* target = out + token * hidden_;
      int64_t c = begin;
      for (; c + kLanes <= end; c += kLanes) {
        Floats total = vector == nullptr ? Floats{} : load(vector + c);
        each_factor(link, own, [&](float v, const float* b) { total += v * load(b + c); });
        store(target + c, load(target + c) + total);
      }
      for (; c < end; ++c) {
        float total = vector == nullptr ? 0.0f : vector[c];
        each_factor(link, own, [&](float v, const float* b) { total = fused(v, b[c], total); });
        target[c] = static_cast<T>(float(target[c]) + total);
      }
    }
  }

 private:
  struct Asked {
    int64_t token;
    bool is_alone;  // its row has no other token in the pass
  };

  static void wait() {
#pragma omp barrier
  }

  int64_t sum_of_ranks(size_t l, int64_t token) const {
    const LinkRecord link = layers_[l].link(token);
    return link.exists() ? link.sum_of_ranks() : 0;
  }

  static int64_t first_of(const LinkRecord& link, int64_t level) {
    int64_t first = 0;
    for (int64_t j = 0; j < level; ++j) first += link.level(j).rank();
    return first;
  }

  float* place(std::vector<float>& sums, int64_t own, int64_t kv_head) const {
    return sums.data() + (own * kv_heads_ + kv_head) * width_;
  }

  int64_t pool_place(int64_t token, int64_t p) const {
    return table_[rows_[token] * row_blocks_ + p / block_tokens_] * block_tokens_ + p % block_tokens_;
  }

  void put(const LevelRecord& level, int64_t token, int64_t k, float value) const {
    level.u(pool_place(token, positions_[token]), k / 8)[k % 8] = value;
  }

  // run(token, kv_head) for the thread's share of all tokens that are alone in their rows, or of all others.
  template <typename F>
  void each_unit(size_t l, bool alone, int64_t kv_heads, int64_t i, int64_t n, const F& run) const {
    int64_t total = 0;
    for (const Asked& one : asked_) total += one.is_alone == alone && layers_[l].link(one.token).exists();
    const int64_t begin = total * kv_heads * i / n, end = total * kv_heads * (i + 1) / n;
    int64_t first = 0;
    for (const Asked& one : asked_) {
      if (one.is_alone != alone || !layers_[l].link(one.token).exists()) continue;
      for (int64_t unit = std::max(first, begin); unit < std::min(first + kv_heads, end); ++unit) {
        run(one.token, unit - first);
      }
      first += kv_heads;
    }
  }

  template <typename F>
  void each_own(int64_t i, int64_t n, const F& run) const {
    for (size_t own = asked_.size() * i / n; own < asked_.size() * (i + 1) / n; ++own) {
      if (!asked_[own].is_alone) run(own);
    }
  }

  template <typename F>
  void each_factor(const LinkRecord& link, size_t own, const F& run) const {
    const float* v = v_.data() + own * width_;
    for (int64_t j = 0; link.exists() && j < link.num_levels(); ++j) {
      const LevelRecord level = link.level(j);
      for (int64_t k = 0; k < level.rank(); ++k, ++v) run(*v, level.b() + k * hidden_);
    }
  }

  // u_j of a token, whose residuals before are known.
  void read(size_t l, size_t own, int64_t j) {
    const int64_t token = asked_[own].token;
    const LinkRecord link = layers_[l].link(token);
    if (!link.exists() || j >= link.num_levels()) return;
    const LevelRecord level = link.level(j);
    const int64_t first = first_of(link, j);
    const float* v = v_.data() + own * width_;
    for (int64_t k = 0; k < level.rank(); ++k) {
      float& raw = raw_[own * width_ + first + k];
      for (int64_t m = 0; m < first; ++m) raw = fused(level.before()[k * first + m], v[m], raw);
      put(level, token, k, raw);
    }
  }

  // v_j of a token, from the sums of its heads.
  void conclude(size_t l, size_t own, int64_t j, int64_t kv_heads) {
    const LinkRecord link = layers_[l].link(asked_[own].token);
    if (!link.exists() || j >= link.num_levels()) return;
    const LevelRecord level = link.level(j);
    const int64_t first = first_of(link, j);
    const bool hears_itself = asked_[own].is_alone && j > 0;
    for (int64_t k = first; k < first + level.rank(); ++k) {
      float total = 0, itself = 0;
      for (int64_t h = 0; h < kv_heads; ++h) total += place(heard_, own, h)[k];
      for (int64_t h = 0; h < kv_heads && hears_itself; ++h) itself += place(own_, own, h)[k];
      if (hears_itself) total = fused(itself, raw_[own * width_ + k], total);
      v_[own * width_ + k] = level.scale() * total;
    }
  }

  // sums [rank]: what the heads of a group hear of the keys before `stop`.
  template <typename A>
  void hear(const LevelRecord& level, const A& attention, int64_t token, int64_t kv_head,
            const std::vector<float>& weights, int64_t stop, float* sums) const {
    const int64_t group = attention.heads / attention.kv_heads;
    for (int64_t part = 0; part * 8 < level.rank(); ++part) {
      const int64_t columns = std::min<int64_t>(8, level.rank() - part * 8);
      std::fill(sums + part * 8, sums + part * 8 + columns, 0.0f);
      int64_t g = 0;
      for (; g + 3 <= group; g += 3) hear_heads<3>(level, attention, token, kv_head, g, weights, stop, part, sums);
      for (; g < group; ++g) hear_heads<1>(level, attention, token, kv_head, g, weights, stop, part, sums);
    }
  }

  template <int num, typename A>
  void hear_heads(const LevelRecord& level, const A& attention, int64_t token, int64_t kv_head, int64_t g,
                  const std::vector<float>& weights, int64_t stop, int64_t part, float* sums) const {
    const int64_t begin = attention.first(token), padded = attention.padded(token);
    const float* w = weights.data() + g * padded;
    Eight acc[num] = {};
    for (int64_t p = begin; p < stop;) {
      const int64_t run = std::min(stop - p, block_tokens_ - p % block_tokens_);
      const float* u = level.u(pool_place(token, p), part);
      for (int64_t s = 0; s < run; ++s, u += 8) {
        Eight value;
        std::memcpy(&value, u, sizeof(value));
        each<num>([&](auto head) { acc[head] += w[head * padded + p + s - begin] * value; });
      }
      p += run;
    }
    const int64_t head = kv_head * (attention.heads / attention.kv_heads) + g;
    for (int64_t k = part * 8; k < std::min(part * 8 + 8, level.rank()); ++k) {
      for (int i = 0; i < num; ++i) sums[k] = fused(level.mix()[(head + i) * level.rank() + k], acc[i][k % 8], sums[k]);
    }
  }

  std::vector<AskedLayer> layers_;
  int64_t hidden_, kv_heads_, width_ = 0;
  const int32_t* table_;  // [rows, row_blocks]
  int64_t row_blocks_, block_tokens_;
  const int64_t *rows_, *positions_;  // [tokens]
  std::vector<int64_t> index_;        // [tokens]  among those that ask, or -1
  std::vector<Asked> asked_;
  std::vector<int64_t> num_levels_;  // by layer, of rows with several tokens
  std::vector<bool> is_asked_;       // by layer
  std::vector<float> raw_, v_;       // [asked, width]
  std::vector<float> heard_, own_;   // [asked, kv_heads, width]
};

}  // namespace loraplex
