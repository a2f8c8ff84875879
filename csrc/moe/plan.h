// Shared by the experts' forward and backward: (token, choice) pairs sorted by expert, the blocks that tasks
// run, and the packed expert weights. Experts get different numbers of rows; dynamic scheduling
// (common/tensor.h) keeps all threads busy.
#pragma once

#include <numeric>

#include "../common/pack.h"
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
    int64_t expert, first, count;  // rows [first, first + count), all of one expert
};

// A row is a (token, choice) pair. Rows are sorted by expert, and an expert's rows by token.
struct Plan {
    ExpertSizes size;
    std::vector<int64_t> starts;  // [E + 1]: each expert's first row
    std::vector<int64_t> pair;    // [rows]: token * k + choice of each row
    std::vector<int64_t> row;     // [rows]: the row of each pair

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

    // Every expert's rows in blocks of at most `most`, counted from the expert's first row, so that the
    // blocks of one expert do not depend on the others.
    std::vector<Block> blocks(int64_t most) const {
        std::vector<Block> all;
        for (int64_t e = 0; e < size.num_experts; ++e)
            for (int64_t first = starts[e]; first < starts[e + 1]; first += most)
                all.push_back({e, first, std::min(most, starts[e + 1] - first)});
        return all;
    }

    // rows: T[count, D] = the tokens of rows [first, first + count).
    template <class T>
    void gather(T* rows, const T* tokens, int64_t first, int64_t count) const {
        const int64_t width = size.hidden;
        for (int64_t m = 0; m < count; ++m)
            std::memcpy(rows + m * width, tokens + pair[first + m] / size.k * width, width * sizeof(T));
    }

    // y: T[num_tokens, D] = the weighted sum of each token's rows, in order of k.
    template <class T>
    void combine(T* y, const T* rows, const float* weights) const {
        constexpr int64_t TOKENS = 64;
        parallel_blocks(size.num_tokens, TOKENS, [&](int64_t first, int64_t num) {
            std::vector<const T*> outs(size.k);
            for (int64_t t = first; t < first + num; ++t) {
                for (int64_t c = 0; c < size.k; ++c) outs[c] = rows + row[t * size.k + c] * size.hidden;
                combine_row(y + t * size.hidden, outs.data(), weights + t * size.k, size.k, size.hidden);
            }
        });
    }
};

// The matrices [E, num_rows, num_columns] of all experts that have rows, packed as B. IS_TRANSPOSED: B is the
// transpose, as in forward.
template <class T, bool IS_TRANSPOSED>
class PackedExperts {
public:
    PackedExperts(const char* op, const char* name, const Tensor& weight, int64_t num_rows, int64_t num_columns, const Plan& plan)
        : n_(IS_TRANSPOSED ? num_rows : num_columns), k_(IS_TRANSPOSED ? num_columns : num_rows),
          memory_(plan.size.num_experts * packed_size<T>(n_, k_)) {
        by_master<T>(op, name, weight, {plan.size.num_experts, num_rows, num_columns}, [&](const auto* matrices) {
            const auto has_rows = [&](int64_t e) { return plan.starts[e] < plan.starts[e + 1]; };
            pack_matrices<IS_TRANSPOSED, T>(memory_, matrices, plan.size.num_experts, n_, k_, has_rows);
        });
    }
    const T* of(int64_t expert) const { return memory_ + expert * packed_size<T>(n_, k_); }

private:
    int64_t n_, k_;
    Scratch<T> memory_;
};

}  // namespace reason_rl
