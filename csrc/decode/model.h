// The inputs of the native decode as checked pointers: the model's sizes and weights, and the running
// sequences. cpu.cpp fills them from the tensors of one call.
#pragma once

#include <cstdint>
#include <vector>

#include "../moe/rows.h"
#include "../sample/rows.h"

namespace reason_rl {

constexpr int64_t BLOCK_SIZE = LANES;  // tokens per block of the KV cache: one panel of keys

struct ModelSizes {
    int64_t hidden, heads, kv_heads, head_dim, experts, experts_per_tok, inner, shared_inner, vocab, max_positions;
    int64_t qkv_rows() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Matrices are packed (gemm.h); norms, router and embedding are f32. Null: the model has no such weight.
template <class T>
struct LayerWeights {
    const float *attention_norm, *q_norm, *k_norm, *mlp_norm, *expert_bias, *router;
    const T *qkv, *out, *shared_gate_up, *shared_down;
    std::vector<ExpertWeights<T>> experts;  // a dense layer has one expert and no router
};

template <class T>
struct ModelWeights {
    ModelSizes sizes;
    RouteSpec route;
    float eps;
    std::vector<LayerWeights<T>> layers;
    const float *embedding, *norm, *cos, *sin;  // [V, D], [D], [max_positions, C / 2] each
    const T* head;
};

// The running sequences. Each attends to its prefix, then to its own keys, and appends to its own blocks.
struct DecodeRows {
    int64_t count, num_blocks, prefix_width, own_width, max_new;
    const int64_t *prefix_table, *prefix_lens;  // [num_prefixes, prefix_width], [num_prefixes]
    const int64_t *prefix_index, *own_table, *own_lens, *limits, *noise_keys;  // [count], own_table [count, own_width]
    const int64_t* stop_ids;
    int64_t num_stop_ids;
    int64_t* tokens;   // [count, 1 + max_new]: the newest token so far, then the sampled ones
    float *logprobs, *kept_logmass;  // [count, max_new]
    int64_t* num_new;  // [count]
    int32_t* routed_expert_ids;   // [count, max_new, layers, experts per token], or null
};

}  // namespace reason_rl
