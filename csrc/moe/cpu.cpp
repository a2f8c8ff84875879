// The router, forward and backward, and the experts' forward, on the CPU. Siblings: rows.h, plan.h,
// backward.cpp, kernels/moe/, tests/kernels/test_moe.py.
//
// Experts run on their tokens in blocks (plan.h), then each token sums its experts in order of k. A row's
// bits come from run_expert and do not depend on the other tokens that chose the same expert.
#include "plan.h"

namespace reason_rl {
namespace {

constexpr int64_t TOKENS_PER_TASK = 64;

// expert_ids: i64[T, k]; weights: f32[T, k]; scores, logits: f32[T, E]; bias: f32[E].
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
    // route_row as two loops: the first one is free of branches.
    parallel_blocks(num_tokens, TOKENS_PER_TASK, [&](int64_t first, int64_t num) {
        for (int64_t t = first; t < first + num; ++t) route_scores(in + t * num_experts, spec, all + t * num_experts);
        for (int64_t t = first; t < first + num; ++t) route_choice(all + t * num_experts, spec, ids + t * k, out + t * k);
    });
}

// dlogits: f32[E] of one token, in f32 throughout. dweights: f32[k] or null; dscores: f32[E] or null.
void route_backward_row(float* dlogits, const float* dweights, const float* dscores, const int64_t* ids, const float* scores,
                        const RouteSpec& spec) {
    const int64_t size = spec.num_experts;
    // The scores' gradient: dscores, plus dweights through the normalisation for the chosen experts.
    if (dscores) std::copy(dscores, dscores + size, dlogits);
    else std::fill(dlogits, dlogits + size, 0.0f);
    if (dweights) {
        const float total = route_sum(scores, ids, spec.k);
        const bool is_clamped = total < LEAST_ROUTE_SUM;
        const float divisor = !spec.normalize ? 1.0f : is_clamped ? LEAST_ROUTE_SUM : total;
        float mean = 0.0f;  // of dweights, weighted
        for (int64_t c = 0; c < spec.k; ++c) mean += dweights[c] * (scores[ids[c]] / divisor);
        if (!spec.normalize || is_clamped) mean = 0.0f;
        for (int64_t c = 0; c < spec.k; ++c) dlogits[ids[c]] += (dweights[c] - mean) / divisor;
    }
    // Through softmax or sigmoid.
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

// dlogits, dscores, scores: f32[T, E]; dweights: f32[T, k]; expert_ids: i64[T, k].
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
    parallel_blocks(num_tokens, TOKENS_PER_TASK, [&](int64_t first, int64_t num) {
        for (int64_t t = first; t < first + num; ++t)
            route_backward_row(out + t * num_experts, dw ? dw + t * k : nullptr, ds ? ds + t * num_experts : nullptr, ids + t * k,
                               all + t * num_experts, spec);
    });
}

// y, x: fp[T, D]; kept: fp[T * k, 2I], the gate_up outputs in the plan's order of rows, or [0, 2I]: not
// saved; gate_up: fp|f32[E, 2I, D]; down: fp|f32[E, D, I]; expert_ids: i64[T, k]; weights: f32[T, k].
void moe_experts_fwd(Tensor y, Tensor kept, Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights) {
    const char* op = "moe_experts_fwd";
    const ExpertSizes size(op, x, down, expert_ids);
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const int64_t hidden = size.hidden, inner = size.inner;
        const T* tokens = data<const T>(op, "x", x, {size.num_tokens, hidden});
        const float* route_weights = data<const float>(op, "weights", weights, {size.num_tokens, size.k});
        T* out = data<T>(op, "y", y, {size.num_tokens, hidden});
        const bool is_kept = kept.dim() == 2 && kept.size(0) > 0;
        T* saved = data<T>(op, "kept", kept, {is_kept ? size.num_tokens * size.k : 0, 2 * inner});
        // Sort the tokens by expert and pack the weights of the experts that have rows.
        const Plan plan(op, size, expert_ids);
        const PackedExperts<T, true> first_weights(op, "gate_up", gate_up, 2 * inner, hidden, plan);
        const PackedExperts<T, true> second_weights(op, "down", down, hidden, inner, plan);
        // One block of an expert's rows at a time.
        Scratch<T> outputs(plan.num_rows() * hidden);
        const auto blocks = plan.blocks(ROW_BLOCK);
        parallel_dynamic(blocks.size(), [&](auto next) {
            Scratch<T> rows(ROW_BLOCK * hidden), act(ROW_BLOCK * inner), projected(is_kept ? 0 : ROW_BLOCK * 2 * inner);
            for (int64_t i; (i = next()) >= 0;) {
                const auto [expert, first, count] = blocks[i];
                plan.gather<T>(rows, tokens, first, count);
                const ExpertWeights<T> matrices{first_weights.of(expert), second_weights.of(expert)};
                T* p = is_kept ? saved + first * 2 * inner : projected;
                run_expert<T>(outputs + first * hidden, rows, count, matrices, hidden, inner, p, act);
            }
        });
        plan.combine<T>(out, outputs, route_weights);
    });
}

RR_REGISTER(m) {
    m.impl("moe_route_fwd", TORCH_BOX(&moe_route_fwd));
    m.impl("moe_route_bwd", TORCH_BOX(&moe_route_bwd));
    m.impl("moe_experts_fwd", TORCH_BOX(&moe_experts_fwd));
}

}  // namespace
}  // namespace reason_rl
