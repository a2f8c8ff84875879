// What the experts' forward and backward share: the sort of (token, choice) pairs by expert, the work cut into blocks, the packed
// weights. Blocks are shared out to the threads (common/tensor.h), so that uneven experts keep all of them busy.
#pragma once

#include <numeric>

#include "../common/tensor.h"
#include "rows.h"

namespace reason_rl {

inline void check_expert_ids(const char* op, const int64_t* ids, int64_t num_tokens, int64_t k, int64_t num_experts) {
    for (int64_t i = 0; i < num_tokens * k; ++i)
        RR_CHECK(ids[i] >= 0 && ids[i] < num_experts, op, ": expert_ids must be in 0..", num_experts - 1, ", got ", ids[i],
                 " at token ", i / k, ", choice ", i % k);
}

struct ExpertSizes {
    int64_t num_tokens, k, num_experts, hidden, inner;

    ExpertSizes(const char* op, const Tensor& x, const Tensor& down, const Tensor& expert_ids) {
        RR_CHECK(x.dim() == 2 && down.dim() == 3 && expert_ids.dim() == 2 && expert_ids.size(1) >= 1, op,
                 ": x, down and expert_ids must be [T, D], [E, D, I] and [T, k] with k >= 1, got ", x.dim(), ", ",
                 down.dim(), " and ", expert_ids.dim(), " dimensions");
        num_tokens = x.size(0), k = expert_ids.size(1), num_experts = down.size(0), hidden = x.size(1), inner = down.size(2);
    }
};

struct Block {
    int64_t expert, first, count;  // `count` rows of one expert, from row `first` on
};

// Rows are (token, choice) pairs sorted by expert, stably: an expert's rows are in order of token.
struct Plan {
    ExpertSizes size;
    std::vector<int64_t> starts;  // [num_experts + 1]: an expert's first row
    std::vector<int64_t> pair;    // [rows]: token * k + choice of a row
    std::vector<int64_t> row;     // [rows]: the row of a pair

    Plan(const char* op, const ExpertSizes& size, const Tensor& expert_ids)
        : size(size), starts(size.num_experts + 1), pair(size.num_tokens * size.k), row(size.num_tokens * size.k) {
        const int64_t* ids = data<const int64_t>(op, "expert_ids", expert_ids, {size.num_tokens, size.k});
        check_expert_ids(op, ids, size.num_tokens, size.k, size.num_experts);
        for (int64_t i = 0; i < num_rows(); ++i) ++starts[ids[i] + 1];
        std::partial_sum(starts.begin(), starts.end(), starts.begin());
        std::vector<int64_t> next(starts.begin(), starts.end() - 1);
        for (int64_t i = 0; i < num_rows(); ++i) pair[row[i] = next[ids[i]]++] = i;
    }

    int64_t num_rows() const { return size.num_tokens * size.k; }

    // Every expert's rows in blocks of at most `most`, counted from its first: a cut that other experts do not shift.
    std::vector<Block> blocks(int64_t most) const {
        std::vector<Block> all;
        for (int64_t e = 0; e < size.num_experts; ++e)
            for (int64_t first = starts[e]; first < starts[e + 1]; first += most)
                all.push_back({e, first, std::min(most, starts[e + 1] - first)});
        return all;
    }

    // The tokens of some rows, one after the other.
    template <class T>
    void gather(T* rows, const T* tokens, int64_t first, int64_t count) const {
        const int64_t width = size.hidden;
        for (int64_t m = 0; m < count; ++m)
            std::memcpy(rows + m * width, tokens + pair[first + m] / size.k * width, width * sizeof(T));
    }

    // y [T, D]: each token's rows, weighted, summed in order of k.
    template <class T>
    void combine(T* y, const T* rows, const float* weights) const {
        constexpr int64_t TOKENS = 64;
        parallel_for((size.num_tokens + TOKENS - 1) / TOKENS, [&](int64_t block) {
            std::vector<const T*> outs(size.k);
            for (int64_t t = block * TOKENS; t < std::min(size.num_tokens, (block + 1) * TOKENS); ++t) {
                for (int64_t c = 0; c < size.k; ++c) outs[c] = rows + row[t * size.k + c] * size.hidden;
                combine_row(y + t * size.hidden, outs.data(), weights + t * size.k, size.k, size.hidden);
            }
        });
    }
};

// The matrices [num_rows, num_columns] of the experts that have rows, packed for products with the matrix or with its transpose.
template <class T, bool IS_TRANSPOSED>
class PackedExperts {
public:
    PackedExperts(const char* op, const char* name, const Tensor& weight, int64_t num_rows, int64_t num_columns, const Plan& plan)
        : n_(IS_TRANSPOSED ? num_rows : num_columns), k_(IS_TRANSPOSED ? num_columns : num_rows),
          memory_(plan.size.num_experts * packed_size<T>(n_, k_)) {
        by_master<T>(op, name, weight, {plan.size.num_experts, num_rows, num_columns}, [&](const auto* m) { pack(m, plan); });
    }
    const T* of(int64_t expert) const { return memory_ + expert * packed_size<T>(n_, k_); }

private:
    template <class S>
    void pack(const S* matrices, const Plan& plan) {
        const int64_t panels = (n_ + LANES - 1) / LANES;
        parallel_for(plan.size.num_experts * panels, [&](int64_t i) {
            const int64_t expert = i / panels, column = i % panels * LANES;
            if (plan.starts[expert] == plan.starts[expert + 1]) return;
            T* panel = memory_ + expert * packed_size<T>(n_, k_) + packed_size<T>(column, k_);
            const S* matrix = matrices + expert * n_ * k_;
            if constexpr (IS_TRANSPOSED) pack_transposed_panel<T>(panel, matrix, n_, k_, k_, column);
            else pack_panel<T>(panel, matrix, k_, n_, n_, column);
        });
    }
    int64_t n_, k_;
    Scratch<T> memory_;
};

}  // namespace reason_rl
