// Feed-forward experts, of which a router chooses some for each token:
//
//   score[t]    = softmax or sigmoid of (W x[t] + bias)
//   chosen[t]   = the experts with the largest score + correction, of the best groups only
//   weight[t,e] = factor * score[t, e], divided by the sum of the chosen ones' if it is normalised
//   y[t]        = sum over the chosen of weight[t, e] down_e(act(gate_e(x[t])) * up_e(x[t]))
//
// The pairs of tokens and chosen experts are sorted by expert, so that each expert's weights are read once. What a token
// gets depends on its own values only. Ties go to the first expert.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include "activation.h"
#include "adapters.h"
#include "linear_module.h"

namespace loraplex {

enum class Scores { kSoftmax, kSigmoid };

struct RouterTerms {
  int64_t num_experts, top_k;
  Scores kind;
  bool normalises;
  bool rounds;  // logits, to the model's dtype
  int64_t num_groups, top_groups;
  const float* correction;  // [experts] or null
  float factor;

  // Of one token: experts [top_k], and their weights. Logits become what the choice goes by.
  void choose(float* logits, int32_t* experts, float* weights) const {
    thread_local std::vector<float> scores;
    scores.resize(num_experts);
    score(logits, scores.data());
    for (int64_t e = 0; e < num_experts; ++e) {
      logits[e] = correction == nullptr ? scores[e] : scores[e] + correction[e];
    }
    if (top_groups < num_groups) keep_best_groups(logits);
    float total = 0;
    for (int64_t j = 0; j < top_k; ++j) {
      const int64_t best = std::max_element(logits, logits + num_experts) - logits;
      experts[j] = static_cast<int32_t>(best);
      weights[j] = scores[best];
      total += scores[best];
      logits[best] = -INFINITY;
    }
    for (int64_t j = 0; j < top_k; ++j) weights[j] = factor * (normalises ? weights[j] / (total + 1e-20f) : weights[j]);
  }

 private:
  void score(const float* logits, float* scores) const {
    if (kind == Scores::kSigmoid) {
      for (int64_t e = 0; e < num_experts; ++e) scores[e] = 1.0f / (1.0f + std::exp(-logits[e]));
      return;
    }
    const float most = *std::max_element(logits, logits + num_experts);
    float total = 0;
    for (int64_t e = 0; e < num_experts; ++e) total += scores[e] = std::exp(logits[e] - most);
    for (int64_t e = 0; e < num_experts; ++e) scores[e] /= total;
  }

  // A group counts as much as its two best experts together.
  void keep_best_groups(float* choice) const {
    thread_local std::vector<float> sums;
    thread_local std::vector<int> order;
    const int64_t size = num_experts / num_groups;
    sums.resize(num_groups);
    order.resize(num_groups);
    std::iota(order.begin(), order.end(), 0);
    for (int64_t g = 0; g < num_groups; ++g) {
      float first = -INFINITY, second = -INFINITY;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        if (choice[e] > first) second = std::exchange(first, choice[e]);
        else second = std::max(second, choice[e]);
      }
      sums[g] = size > 1 ? first + second : first;
    }
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return sums[a] > sums[b]; });
    for (int64_t g = top_groups; g < num_groups; ++g) {
      std::fill_n(choice + order[g] * size, size, -INFINITY);
    }
  }
};

// What an expert makes of its first product: an activation; one gated by the second half; one of even values, gated by
// odd ones, both clamped (gpt-oss): (up + 1) gate sigmoid(alpha gate).
enum class ExpertGate { kNone, kHalves, kClampedPairs };

template <typename T>
struct Experts {
  RouterTerms router;
  LinearModule<T> input, down;  // of the first expert; those of the others follow
  ExpertGate gate;
  float alpha, limit;
  int64_t first_input, first_down;  // among all experts that adapters know; -1: none do

  bool exists() const { return router.num_experts > 0; }

  int64_t inner() const { return down.in; }

  static LinearModule<T> of(const LinearModule<T>& first, int64_t expert) {
    LinearModule<T> module = first;
    module.weight += expert * first.num_values();
    if (module.bias != nullptr) module.bias += expert * first.out;
    return module;
  }

  // The columns [begin, end) of what goes into the last product.
  void activate(Activation activation, const T* made, T* out, int64_t begin, int64_t end) const {
    if (gate == ExpertGate::kClampedPairs) return clamped_pairs(made, out, begin, end);
    const T* up = gate == ExpertGate::kHalves ? made + inner() + begin : nullptr;
    loraplex::activate(activation, made + begin, up, out + begin, end - begin);
  }

 private:
  void clamped_pairs(const T* made, T* out, int64_t begin, int64_t end) const {
    for (int64_t c = begin; c < end; c += kLanes) {
      float gates[kLanes] = {}, ups[kLanes] = {};
      const int64_t count = std::min<int64_t>(kLanes, end - c);
      for (int64_t k = 0; k < count; ++k) {
        gates[k] = std::min(float(made[2 * (c + k)]), limit);
        ups[k] = std::clamp(float(made[2 * (c + k) + 1]), -limit, limit) + 1.0f;
      }
      const Floats g = load(gates);
      T rounded[kLanes];
      store(rounded, load(ups) * g / (1.0f + exponential_of_negative(g * alpha)));
      std::memcpy(out + c, rounded, count * sizeof(T));
    }
  }
};

// The pairs of one pass, sorted by expert, and for each expert by token.
struct ExpertPairs {
  std::vector<int64_t> starts;  // [experts + 1]
  std::vector<int64_t> tokens;  // [pairs]  by place
  std::vector<int64_t> places;  // [tokens * top_k]

  void sort(const int32_t* chosen, int64_t num_tokens, int64_t top_k, int64_t num_experts) {
    const int64_t count = num_tokens * top_k;
    starts.assign(num_experts + 1, 0);
    tokens.resize(count);
    places.resize(count);
    for (int64_t p = 0; p < count; ++p) ++starts[chosen[p] + 1];
    for (int64_t e = 0; e < num_experts; ++e) starts[e + 1] += starts[e];
    next_.assign(starts.begin(), starts.end() - 1);
    for (int64_t p = 0; p < count; ++p) {
      places[p] = next_[chosen[p]]++;
      tokens[places[p]] = p / top_k;
    }
  }

  // run(expert, first pair, their number) for every expert that some token goes to.
  template <typename F>
  void each_expert(const F& run) const {
    for (size_t e = 0; e + 1 < starts.size(); ++e) {
      if (starts[e] < starts[e + 1]) run(static_cast<int64_t>(e), starts[e], starts[e + 1] - starts[e]);
    }
  }

 private:
  std::vector<int64_t> next_;
};

// The adapters that a pass has for stacked experts: of expert e of a module in a slot, the entry at
// slot * width + first + e, `first` being the module's own.
struct ExpertTable {
  const int64_t* entries = nullptr;  // [slots * width, 3]  addresses of lora_a and lora_b, rank
  const float* scalings = nullptr;   // [slots * width]
  int64_t width = 0;
  const int64_t* segments = nullptr;  // [num_segments, 4]  start, stop, slot, first gate
  int64_t num_segments = 0;

  bool exists() const { return entries != nullptr; }

  // Floats of rank space that a module's pairs take at most.
  int64_t room(int64_t first, int64_t top_k) const {
    int64_t total = 0;
    for (int64_t s = 0; exists() && first >= 0 && s < num_segments; ++s) {
      const int64_t* row = segments + 4 * s;
      total += (row[1] - row[0]) * top_k * entries[(row[2] * width + first) * 3 + 2];  // one rank for all experts
    }
    return total;
  }

  // Those of a module for the pairs; `gates` are the module's own, `kept` holds those of the pairs.
  void find(const ExpertPairs& pairs, int64_t first, int64_t top_k, const float* gates, Adapters& adapters,
            std::vector<float>& kept) const {
    adapters = {};
    kept.clear();
    if (!exists() || first < 0) return;
    int64_t most = 0;
    for (int64_t s = 0; s < num_segments; ++s) most += (segments[4 * s + 1] - segments[4 * s]) * top_k;
    kept.reserve(most);  // so that nothing moves
    pairs.each_expert([&](int64_t expert, int64_t begin, int64_t count) {
      for (int64_t s = 0; s < num_segments; ++s) {
        const int64_t* row = segments + 4 * s;
        const int64_t cell = row[2] * width + first + expert, rank = entries[3 * cell + 2];
        if (rank == 0) continue;
        const auto tokens = pairs.tokens.begin();
        const int64_t start = std::lower_bound(tokens + begin, tokens + begin + count, row[0]) - tokens;
        const int64_t stop = std::lower_bound(tokens + start, tokens + begin + count, row[1]) - tokens;
        if (start == stop) continue;
        const float* own = kept.data() + kept.size();
        for (int64_t p = start; p < stop; ++p) kept.push_back(gates[row[3] + tokens[p] - row[0]]);
        adapters.add({start, stop, reinterpret_cast<const void*>(entries[3 * cell]),
                      reinterpret_cast<const void*>(entries[3 * cell + 1]), rank, scalings[cell], own, 0, 0, 0});
      }
    });
  }
};

// What a pass's experts need between their steps; all threads of a team share it.
template <typename T>
struct ExpertRoom {
  float* logits;    // [tokens, experts]
  float* weights;   // [tokens, top_k]
  int32_t* chosen;  // [tokens, top_k]
  T* inputs;        // [pairs, hidden]
  T* made;          // [pairs, out]
  T* activated;     // [pairs, inner]
  T* outputs;       // [pairs, hidden]
  float* rank_space;
};

}  // namespace loraplex
