// A mixture of experts on rows, without torch: the router's choice for a token, one expert on its rows, and
// the weighted sum over a token's experts. Shared by the ops (cpu.cpp, backward.cpp) and the native decode,
// so that a token gets the same bits in both.
#pragma once

#include <vector>

#include "../common/gemm.h"
#include "../swiglu/rows.h"

namespace reason_rl {

struct RouteSpec {
    int64_t num_experts, k;
    bool sigmoid, normalize;
    const float* bias;  // [num_experts]: added to the scores for the choice only; may be null
};
constexpr float LEAST_ROUTE_SUM = 1e-20f;  // the least divisor of normalised weights

// scores: f32[E] = softmax or sigmoid of logits: f32[E]. The order of the softmax's sum depends on E only.
inline void route_scores(const float* logits, const RouteSpec& spec, float* scores) {
    const int64_t size = spec.num_experts;
    if (spec.sigmoid) {
        for (int64_t j = 0; j < size; j += LANES) {
            const F32x16 logit = load(logits + j, size - j), score = splat(1.0f) / (exp(min(logit * -1.0f, splat(80.0f))) + 1.0f);
            store(scores + j, select(logit != logit, logit, score), size - j);  // min() drops a NaN
        }
        return;
    }
    // Softmax: the maximum, the exponentials and their sum, then the division.
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    F32x16 top = splat(LOWEST), total = splat(0.0f);
    for (int64_t j = 0; j < size; j += LANES) top = max(top, keep_first(load(logits + j, size - j), size - j, LOWEST));
    const float shift = highest(top);
    for (int64_t j = 0; j < size; j += LANES) {
        const F32x16 raised = keep_first(exp(load(logits + j, size - j) - shift), size - j, 0.0f);
        total = total + raised;
        store(scores + j, raised, size - j);
    }
    const float whole = sum(total);
    for (int64_t j = 0; j < size; j += LANES) store(scores + j, load(scores + j, size - j) / whole, size - j);
}

// The sum of a token's chosen scores, in order of k: the divisor of its normalised weights.
inline float route_sum(const float* scores, const int64_t* expert_ids, int64_t k) {
    float total = scores[expert_ids[0]];
    for (int64_t c = 1; c < k; ++c) total += scores[expert_ids[c]];
    return total;
}

// expert_ids: i64[k], the k largest of score + bias in descending order. Of equal values the lower index
// comes first; NaN counts as the largest, as in torch.sort. weights: f32[k], the scores of these experts,
// normalised if asked.
inline void route_choice(const float* scores, const RouteSpec& spec, int64_t* expert_ids, float* weights) {
    // Insertion sort of the best so far: ids in expert_ids, their score + bias in weights.
    int64_t count = 0;
    for (int64_t e = 0; e < spec.num_experts; ++e) {
        const float value = spec.bias ? scores[e] + spec.bias[e] : scores[e];
        const auto is_before = [value](float other) { return value > other || (value != value && other == other); };
        if (count == spec.k && !is_before(weights[count - 1])) continue;
        int64_t place = count < spec.k ? count++ : count - 1;
        for (; place > 0 && is_before(weights[place - 1]); --place) {
            weights[place] = weights[place - 1];
            expert_ids[place] = expert_ids[place - 1];
        }
        weights[place] = value;
        expert_ids[place] = e;
    }
    // Replace the sort keys by the weights.
    const float total = route_sum(scores, expert_ids, spec.k);
    const float divisor = !spec.normalize ? 1.0f : total < LEAST_ROUTE_SUM ? LEAST_ROUTE_SUM : total;
    for (int64_t c = 0; c < spec.k; ++c) weights[c] = scores[expert_ids[c]] / divisor;
}

inline void route_row(const float* logits, const RouteSpec& spec, int64_t* expert_ids, float* weights, float* scores) {
    route_scores(logits, spec, scores);
    route_choice(scores, spec, expert_ids, weights);
}

template <class T>
struct ExpertWeights {  // packed by pack_transposed
    const T* gate_up;   // [2I, D]
    const T* down;      // [D, I]
};

// out: T[rows, D] = down(swiglu(gate_up(x))), not weighted; each of the three results is rounded to T.
// gate_up: T[rows, 2I] and act: T[rows, I] are outputs too.
template <class T>
void run_expert(T* out, const T* x, int64_t rows, const ExpertWeights<T>& w, int64_t hidden, int64_t inner, T* gate_up, T* act) {
    std::vector<T> pairs(std::min(rows, ROW_BLOCK) * std::max(odd_row<T>(hidden), odd_row<T>(inner)));
    for (int64_t first = 0; first < rows; first += ROW_BLOCK) {
        const int64_t count = std::min(ROW_BLOCK, rows - first);
        product(gate_up + first * 2 * inner, x + first * hidden, w.gate_up, count, 2 * inner, hidden, pairs.data());
        for (int64_t m = first; m < first + count; ++m) swiglu_row(act + m * inner, gate_up + m * 2 * inner, inner);
        product(out + first * hidden, act + first * inner, w.down, count, hidden, inner, pairs.data());
    }
}

// y: T[D] = the sum of weights[c] * outs[c] over c = 0..k-1, in order, in f32, rounded once.
template <class T>
void combine_row(T* y, const T* const* outs, const float* weights, int64_t k, int64_t hidden) {
    for (int64_t j = 0; j < hidden; j += LANES) {
        F32x16 total = load(outs[0] + j, hidden - j) * weights[0];
        for (int64_t c = 1; c < k; ++c) total = total + load(outs[c] + j, hidden - j) * weights[c];
        store(y + j, total, hidden - j);
    }
}

}  // namespace reason_rl
