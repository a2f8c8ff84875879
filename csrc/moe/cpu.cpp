// Routing, forward and backward, and the experts' forward, on the CPU. Siblings: rows.h, backward.cpp, kernels/moe/,
// tests/kernels/test_moe.py.
//
// The (token, choice) pairs are sorted by expert, each expert's rows run in blocks, and each token sums its rows in order of k:
// a row's bits come from run_expert alone, whoever else was sent there.
#include "plan.h"

namespace reason_rl {
namespace {

constexpr int64_t TOKEN_BLOCK = 64;  // tokens that a thread takes at a time

template <class F>
void for_token_blocks(int64_t num_tokens, F&& body) {
    parallel_for((num_tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK, [&](int64_t block) {
        body(block * TOKEN_BLOCK, std::min(num_tokens, (block + 1) * TOKEN_BLOCK));
    });
}

void moe_route_fwd(Tensor expert_ids, Tensor weights, Tensor scores, Tensor logits, std::optional<Tensor> bias, bool sigmoid,
                   bool normalize) {
    const char* op = "moe_route_fwd";
    RR_CHECK(logits.dim() == 2 && expert_ids.dim() == 2, op, ": logits and expert_ids must have 2 dimensions, got ", logits.dim(),
             " and ", expert_ids.dim());
    const int64_t num_tokens = logits.size(0), num_experts = logits.size(1), k = expert_ids.size(1);
    RR_CHECK(k >= 1 && k <= num_experts, op, ": expert_ids must hold 1..", num_experts, " choices, got ", k);
    const float* in = data<const float>(op, "logits", logits, {num_tokens, num_experts});
    int64_t* ids = data<int64_t>(op, "expert_ids", expert_ids, {num_tokens, k});
    float* out = data<float>(op, "weights", weights, {num_tokens, k});
    float* all = data<float>(op, "scores", scores, {num_tokens, num_experts});
    const RouteSpec spec{num_experts, k, sigmoid, normalize, optional_data<const float>(op, "bias", bias, {num_experts})};
    for_token_blocks(num_tokens, [&](int64_t first, int64_t last) {  // route_row in two loops: the first has no branches to guess
        for (int64_t t = first; t < last; ++t) route_scores(in + t * num_experts, spec, all + t * num_experts);
        for (int64_t t = first; t < last; ++t) route_choice(all + t * num_experts, spec, ids + t * k, out + t * k);
    });
}

// dlogits of one token: dweights reaches the scores of the chosen, then all go through softmax or sigmoid. Either may be null.
void route_backward_row(float* dlogits, const float* dweights, const float* dscores, const int64_t* ids, const float* scores,
                        const RouteSpec& spec) {
    const int64_t size = spec.num_experts;
    if (dscores) std::copy(dscores, dscores + size, dlogits);
    else std::fill(dlogits, dlogits + size, 0.0f);
    if (dweights) {
        const float total = route_sum(scores, ids, spec.k);
        const bool is_clamped = total < LEAST_ROUTE_SUM;
        const float divisor = !spec.normalize ? 1.0f : is_clamped ? LEAST_ROUTE_SUM : total;
        float mean = 0.0f;  // of dweights, by weight
        for (int64_t c = 0; c < spec.k; ++c) mean += dweights[c] * (scores[ids[c]] / divisor);
        if (!spec.normalize || is_clamped) mean = 0.0f;
        for (int64_t c = 0; c < spec.k; ++c) dlogits[ids[c]] += (dweights[c] - mean) / divisor;
    }
    F32x16 total = splat(0.0f);
    if (!spec.sigmoid) {
        for (int64_t j = 0; j < size; j += LANES) total = fma(load(dlogits + j, size - j), load(scores + j, size - j), total);
    }
    const float mean = sum(total);
    for (int64_t j = 0; j < size; j += LANES) {
        const F32x16 score = load(scores + j, size - j), gradient = load(dlogits + j, size - j);
        store(dlogits + j, spec.sigmoid ? gradient * score * (splat(1.0f) - score) : score * (gradient - mean), size - j);
    }
}

void moe_route_bwd(Tensor dlogits, std::optional<Tensor> dweights, std::optional<Tensor> dscores, Tensor expert_ids, Tensor scores,
                   bool sigmoid, bool normalize) {
    const char* op = "moe_route_bwd";
    RR_CHECK(scores.dim() == 2 && expert_ids.dim() == 2, op, ": scores and expert_ids must have 2 dimensions, got ", scores.dim(),
             " and ", expert_ids.dim());
    const int64_t num_tokens = scores.size(0), num_experts = scores.size(1), k = expert_ids.size(1);
    RR_CHECK(k >= 1, op, ": expert_ids must hold 1 choice or more, got ", k);
    float* out = data<float>(op, "dlogits", dlogits, {num_tokens, num_experts});
    const float* dw = optional_data<const float>(op, "dweights", dweights, {num_tokens, k});
    const float* ds = optional_data<const float>(op, "dscores", dscores, {num_tokens, num_experts});
    const float* all = data<const float>(op, "scores", scores, {num_tokens, num_experts});
    const int64_t* ids = data<const int64_t>(op, "expert_ids", expert_ids, {num_tokens, k});
    check_expert_ids(op, ids, num_tokens, k, num_experts);
    const RouteSpec spec{num_experts, k, sigmoid, normalize, nullptr};
    for_token_blocks(num_tokens, [&](int64_t t, int64_t last) {
        for (; t < last; ++t)
            route_backward_row(out + t * num_experts, dw ? dw + t * k : nullptr, ds ? ds + t * num_experts : nullptr, ids + t * k,
                               all + t * num_experts, spec);
    });
}

// kept: the gate_up outputs [T * k, 2I] for the backward pass, in the plan's order of rows; [0, 2I] where none comes.
void moe_experts_fwd(Tensor y, Tensor kept, Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights) {
    const char* op = "moe_experts_fwd";
    const ExpertSizes size(op, x, down, expert_ids);
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const int64_t hidden = size.hidden, inner = size.inner;
        const T* tokens = data<const T>(op, "x", x, {size.num_tokens, hidden});
        const float* shares = data<const float>(op, "weights", weights, {size.num_tokens, size.k});
        T* out = data<T>(op, "y", y, {size.num_tokens, hidden});
        const bool is_kept = kept.dim() == 2 && kept.size(0) > 0;
        T* saved = data<T>(op, "kept", kept, {is_kept ? size.num_tokens * size.k : 0, 2 * inner});
        const Plan plan(op, size, expert_ids);
        const PackedExperts<T, true> first_weights(op, "gate_up", gate_up, 2 * inner, hidden, plan);
        const PackedExperts<T, true> second_weights(op, "down", down, hidden, inner, plan);
        Scratch<T> outputs(plan.num_rows() * hidden);
        const auto blocks = plan.blocks(ROW_BLOCK);
        share_out(blocks.size(), [&](auto next) {
            Scratch<T> rows(ROW_BLOCK * hidden), act(ROW_BLOCK * inner), projected(is_kept ? 0 : ROW_BLOCK * 2 * inner);
            for (int64_t i; (i = next()) >= 0;) {
                const auto [expert, first, count] = blocks[i];
                plan.gather<T>(rows, tokens, first, count);
                const ExpertWeights<T> matrices{first_weights.of(expert), second_weights.of(expert)};
                T* p = is_kept ? saved + first * 2 * inner : projected;
                run_expert<T>(outputs + first * hidden, rows, count, matrices, hidden, inner, p, act);
            }
        });
        plan.combine<T>(out, outputs, shares);
    });
}

RR_REGISTER(m) {
    m.impl("moe_route_fwd", TORCH_BOX(&moe_route_fwd));
    m.impl("moe_route_bwd", TORCH_BOX(&moe_route_bwd));
    m.impl("moe_experts_fwd", TORCH_BOX(&moe_experts_fwd));
}

}  // namespace
}  // namespace reason_rl
