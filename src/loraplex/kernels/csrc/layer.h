// What a decoder layer is made of. Every part but the attention may be left out.
//
//   x += m b1(o(attention(rotate(nq(q(n1(x)))), rotate(nk(k(n1(x)))), v(n1(x)))))
//   x += m b2(down(act(gate(n2(x))) * up(n2(x))))
//
// n1, n2, b1, b2, nq and nk are norms, m is a number. In a parallel layer, n2 reads what n1 read. Where the layer has
// experts (experts.h), their sum takes the place of down(..), or is added to it: sigmoid(shared(n2(x))) down(..).
#pragma once

#include "activation.h"
#include "experts.h"
#include "linear_module.h"
#include "norm.h"
#include "rotary.h"

namespace loraplex {

enum Role { kQuery, kKey, kValue, kOut, kGate, kUp, kDown, kRouter, kSharedGate, kRoles };

// Where query, key and value heads come from: three modules; one that gives all queries, then keys, then values (Phi-3);
// one that gives for each key head its queries, key and value (GPT-NeoX).
enum class Projection { kSeparate, kBlocks, kGroups };

// What multiplies the activation: nothing; another module, or the second half of the same one; its first half.
enum class Gating { kNone, kGateFirst, kUpFirst };

template <typename T>
struct Layer {
  LinearModule<T> modules[kRoles];  // a module that gives several parts has the first one's role
  Norm<T> before_attention, behind_attention, before_mlp, behind_mlp, query, key;
  bool is_attention_only;  // x = o(attention(..)), and nothing else
  bool is_parallel;
  bool shares_norm;  // n2 is n1
  int64_t heads, kv_heads, head_dim, inner;
  int64_t rotary_dim;  // of cosines and sines
  Projection projection;
  Rotary rotary;
  Activation activation;
  Gating gating;
  Experts<T> experts;
  T* keys;  // [blocks, kv_heads, block_tokens, head_dim]
  T* values;
  int64_t window, chunk;  // 0: none
  const float* sinks;     // [heads] or null
  float scale, softcap;   // softcap 0: none
  float multiplier;       // of what is added
  const float* cos;       // [tokens, rotary_dim] or null
  const float* sin;

  bool has_joined_gate() const { return gating != Gating::kNone && !modules[kUp].exists(); }

  // Where the heads of a role begin, counted in heads of the token that one module gives.
  int64_t head_offset(Role role, int64_t head) const {
    const int64_t group = heads / kv_heads;
    if (projection == Projection::kBlocks) return head + (role == kQuery ? 0 : role == kKey ? heads : heads + kv_heads);
    if (projection == Projection::kSeparate) return head;
    if (role == kQuery) return head / group * (group + 2) + head % group;
    return head * (group + 2) + group + (role == kValue);
  }
};

}  // namespace loraplex
