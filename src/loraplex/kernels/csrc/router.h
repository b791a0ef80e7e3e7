// Gates that a module predicts for the experts of a mixture from its own input, between an adapter's two products:
// `shrink` has left h = scaling * lora_a x of each expert, and `route` multiplies it by the expert's gate.
//
//   kArrow    score = |c . h|             c [rank]        softmax(score / temperature) over the top_k largest scores
//   kSpectr   score = sqrt(h' G h)        G [rank, rank]  the same
//   kLinear   score = r . x + bias        r [in], bias    the same; with top_p over the fewest experts that add up to it
//   kSigmoid  score = r . x + bias                        sigmoid(score / temperature), of the top_k largest
//   kStatic   the gate itself [1]
//
// c and G are the router's for lora_a x, divided by the scaling and by its square. A token's gates depend on its own
// values only. Ties go to the first expert. Mirrors loraplex/routers/router.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace loraplex {

enum class RouterKind : int64_t { kArrow, kSpectr, kLinear, kSigmoid, kStatic };

struct RoutedExpert {
  const float* parameters;
  float weight;          // of the mixture in the row's link
  int64_t rank;
  int64_t first_hidden;  // of the first token's h
  float* told;           // where the first token's gate is kept, without the weight; none: nobody wants to know it
  int64_t told_stride;   // floats from one token's to the next one's
};

// The experts of one mixture on the tokens [start, stop).
struct RouteGroup {
  RouterKind kind;
  int64_t top_k;              // 0: all
  float temperature, top_p;   // top_p 0: all
  int64_t start, stop;
  std::vector<RoutedExpert> experts;

  // Multiplies each expert's h of one token; x are the token's own values [in].
  template <typename T>
  void run(int64_t token, const T* x, int64_t in, float* hidden, std::vector<float>& gates,
           std::vector<int>& order) const {
    const auto h_of = [&](const RoutedExpert& expert) {
      return hidden + expert.first_hidden + (token - start) * expert.rank;
    };
    const int num = static_cast<int>(experts.size());
    gates.resize(num);
    for (int e = 0; e < num; ++e) gates[e] = score(experts[e], h_of(experts[e]), x, in);
    choose(gates, order);
    for (int e = 0; e < num; ++e) {
      float* h = h_of(experts[e]);
      if (experts[e].told != nullptr) experts[e].told[(token - start) * experts[e].told_stride] = gates[e];
      const float gate = gates[e] * experts[e].weight;
      for (int64_t r = 0; r < experts[e].rank; ++r) h[r] = gate == 0 ? 0.0f : h[r] * gate;
    }
  }

 private:
  static constexpr int64_t kColumns = 16;
  static constexpr int kInserted = 32;  // experts up to which the order comes by insertion

  // In four sums, in an order that the count alone decides.
  static float dot_of(const float* a, const float* b, int64_t count) {
    float sums[4] = {};
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
      for (int k = 0; k < 4; ++k) sums[k] += a[i + k] * b[i + k];
    }
    for (; i < count; ++i) sums[0] += a[i] * b[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // The largest first, of equal ones the first.
  static void sort_by(const std::vector<float>& values, std::vector<int>& order) {
    const auto is_before = [&](int a, int b) { return values[a] > values[b]; };
    const int num = static_cast<int>(order.size());
    if (num > kInserted) return std::stable_sort(order.begin(), order.end(), is_before);
    for (int i = 1; i < num; ++i) {
      const int moved = order[i];
      int j = i;
      for (; j > 0 && is_before(moved, order[j - 1]); --j) order[j] = order[j - 1];
      order[j] = moved;
    }
  }

  template <typename T>
  float score(const RoutedExpert& expert, const float* h, const T* x, int64_t in) const {
    const float* p = expert.parameters;
    float total = 0;
    switch (kind) {
      case RouterKind::kArrow:
        return std::fabs(dot_of(p, h, expert.rank));
      case RouterKind::kSpectr: {  // by columns of G: sums that don't wait for each other
        for (int64_t first = 0; first < expert.rank; first += kColumns) {
          const int64_t count = std::min<int64_t>(kColumns, expert.rank - first);
          float sums[kColumns] = {};
          for (int64_t r = 0; r < expert.rank; ++r) {
            const float* row = p + r * expert.rank + first;
            for (int64_t q = 0; q < count; ++q) sums[q] += row[q] * h[r];
          }
          total += dot_of(sums, h + first, count);
        }
        return std::sqrt(std::max(total, 0.0f));
      }
      case RouterKind::kStatic:
        return p[0];
      default: {
        Floats sums{};
        int64_t k = 0;
        for (; k + kLanes <= in; k += kLanes) sums += load(p + k) * load(x + k);
        for (; k < in; ++k) total += p[k] * float(x[k]);
        return total + sum(sums) + p[in];
      }
    }
  }

  // From scores to gates.
  void choose(std::vector<float>& values, std::vector<int>& order) const {
    if (kind == RouterKind::kStatic || values.empty()) return;
    const int num = static_cast<int>(values.size());
    int kept = top_k > 0 ? static_cast<int>(std::min<int64_t>(top_k, num)) : num;
    order.resize(num);
    std::iota(order.begin(), order.end(), 0);
    if (kept < num || top_p > 0) sort_by(values, order);
    if (kind == RouterKind::kSigmoid) {
      for (int i = 0; i < num; ++i) {
        float& value = values[order[i]];
        value = i < kept ? 1.0f / (1.0f + std::exp(-value / temperature)) : 0.0f;
      }
      return;
    }
    float most = -INFINITY, total = 0;
    for (int i = 0; i < kept; ++i) most = std::max(most, values[order[i]]);
    for (int i = 0; i < kept; ++i) {
      float& value = values[order[i]];
      value = std::exp((value - most) / temperature);
      total += value;
    }
    if (top_p > 0) {  // the largest, until they add up to it
      float before = 0;
      int count = 0;
      for (; count < kept && before < top_p * total; ++count) before += values[order[count]];
      kept = count;
      total = before;
    }
    for (int i = 0; i < num; ++i) values[order[i]] = i < kept ? values[order[i]] / total : 0.0f;
  }
};

}  // namespace loraplex
