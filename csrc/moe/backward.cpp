// The experts' backward pass on the CPU. Siblings: plan.h, cpu.cpp, kernels/moe/, tests/kernels/test_moe.py.
//
// Forward saved the gate_up outputs p. With dact = dy @ down, before weighting:
//     dweights = act . dact      (equals out . dy, and needs no out)      dp = swiglu'(p, weight * dact)
//     dx_row = dp @ gate_up, summed over a token's rows in order of k
//     ddown = dy^T @ (weight * act)       dgate_up = dp^T @ x             summed over an expert's rows in order
//
// Rows are processed in groups that fit the cache. First the row blocks of a group, which also pack their
// operands for the weight gradients; then these gradients, by expert. A weight gradient sums over row chunks
// of SUM_ROWS rows of one expert, whatever the size of the group and the number of threads, so that its bits
// depend on neither.
//
// Precision: products accumulate in f32. act, dp, weight * act and the rows of dx are stored in fp; dact,
// weight gradients and dweights in f32.
#include "plan.h"

namespace reason_rl {
namespace {

constexpr int64_t SUM_ROWS = 5 * ROW_BLOCK;    // rows per product of a weight gradient
constexpr int64_t GROUP_ROWS = 2 * SUM_ROWS;   // rows of a group, per thread
constexpr int64_t SLICE_ROWS = 16 * TILE_ROWS;  // rows of a weight gradient per task

struct RowChunk : Block {
    int64_t place;  // index of its first row in the group; even, so that pairs of bf16 rows stay together
};

// One weight gradient, dweight: f32[E, left_width, right_width] += left^T @ right over an expert's rows, and
// both operands for the rows of a group.
template <class T>
struct RowSum {
    int64_t left_width, right_width;
    float* dweight;
    Scratch<T> left, right;

    RowSum(int64_t left_width, int64_t right_width, int64_t capacity, float* dweight)
        : left_width(left_width), right_width(right_width), dweight(dweight), left(capacity * left_width),
          right(capacity * packed_size<T>(right_width, 1) / PER_UNIT<T>) {}

    T* right_of(const RowChunk& chunk) const { return right + chunk.place * packed_size<T>(right_width, 1) / PER_UNIT<T>; }

    // Packs `count` rows of the chunk, from row `offset` of it.
    void pack(const RowChunk& chunk, int64_t offset, int64_t count, const T* left_rows, const T* right_rows) {
        T* place = left + (chunk.place + offset) * left_width;
        if constexpr (PER_UNIT<T> == 1) std::memcpy(place, left_rows, count * left_width * sizeof(T));
        else columns_of(left_rows, count, left_width, left_width, place);
        for (int64_t n = 0; n < right_width; n += LANES)
            pack_panel<T>(right_of(chunk) + packed_size<T>(n, chunk.count) + offset * LANES, right_rows, count, right_width,
                          right_width, n);
    }

    // Computes one slice of the expert's dweight, from row `first`. The expert's first chunk overwrites, the
    // others add.
    void add(const RowChunk& chunk, bool is_first, int64_t first) const {
        const int64_t rows = std::min(SLICE_ROWS, left_width - first);
        float* out = dweight + (chunk.expert * left_width + first) * right_width;
        const RowsOf<T> a{left + chunk.place * left_width + first * PER_UNIT<T>, 1, left_width};
        if (is_first) for_tiles<T>(rows, right_width, chunk.count, a, right_of(chunk), store_tile(out, right_width));
        else for_tiles<T>(rows, right_width, chunk.count, a, right_of(chunk), add_tile(out, right_width));
    }
};

template <class T>
struct Backward {
    const Plan& plan;
    const T *dy, *kept, *x;
    const float* weights;
    const PackedExperts<T, false>&gate_up, &down;
    T* dx_rows;  // [rows, D]
    float* dweights;
    RowSum<T>&to_gate_up, &to_down;

    // Returns dweight of one row; writes dp: T[2I] and act: T[I], already weighted.
    static float activation(T* dp, T* act, const float* dact, const T* p, float weight, int64_t inner) {
        F32x16 total = splat(0.0f);
        for (int64_t j = 0; j < inner; j += LANES) {
            const int64_t n = inner - j;
            const F32x16 upstream = load(dact + j, n);
            const auto gradient = swiglu_gradient(load(p + j, n), load(p + inner + j, n), upstream * weight);
            const F32x16 y = round_to<T>(gradient.y);  // the value that forward used
            total = fma(y, upstream, total);
            store(act + j, y * weight, n);
            store(dp + j, gradient.dgate, n);
            store(dp + inner + j, gradient.dup, n);
        }
        return sum(total);
    }

    // The blocks of a group, as (chunk, offset in the chunk): dweights, dx_rows and the operands of the sums.
    void run_blocks(const std::vector<std::pair<RowChunk, int64_t>>& blocks) {
        const int64_t hidden = plan.size.hidden, inner = plan.size.inner;
        parallel_dynamic(blocks.size(), [&](auto next) {
            Scratch<T> dy_rows(ROW_BLOCK * hidden), x_rows(ROW_BLOCK * hidden), act(ROW_BLOCK * inner), dp(ROW_BLOCK * 2 * inner);
            Scratch<T> pairs(ROW_BLOCK * odd_row<T>(hidden));
            Scratch<float> dact(ROW_BLOCK * inner);
            for (int64_t i; (i = next()) >= 0;) {
                const auto& [chunk, offset] = blocks[i];
                const int64_t first = chunk.first + offset, count = std::min(ROW_BLOCK, chunk.count - offset);
                // dact = dy @ down.
                plan.gather<T>(dy_rows, dy, first, count);
                plan.gather<T>(x_rows, x, first, count);
                for_tiles<T>(count, inner, hidden, even_rows<T>(dy_rows, count, hidden, pairs), down.of(chunk.expert),
                             store_tile<float>(dact, inner));
                // dp and the weighted act.
                for (int64_t m = 0; m < count; ++m) {
                    const int64_t pair = plan.pair[first + m];
                    const T* p = kept + (first + m) * 2 * inner;
                    dweights[pair] = activation(dp + m * 2 * inner, act + m * inner, dact + m * inner, p, weights[pair], inner);
                }
                // dx of each row.
                for_tiles<T>(count, hidden, 2 * inner, rows_of<T>(dp, 2 * inner), gate_up.of(chunk.expert),
                             store_tile<T>(dx_rows + first * hidden, hidden));
                to_gate_up.pack(chunk, offset, count, dp, x_rows);
                to_down.pack(chunk, offset, count, dy_rows, act);
            }
        });
    }

    // The weight gradients of a group's chunks. A task is a slice of one expert's gradient, over all of its
    // chunks here.
    void run_sums(const std::vector<RowChunk>& chunks) {
        struct Unit {
            size_t begin;
            const RowSum<T>* sum;
            int64_t slice;
        };
        std::vector<Unit> units;
        for (size_t i = 0; i < chunks.size(); ++i)
            if (i == 0 || chunks[i].expert != chunks[i - 1].expert)
                for (const auto* sum : {&to_gate_up, &to_down})
                    for (int64_t slice = 0; slice < sum->left_width; slice += SLICE_ROWS) units.push_back({i, sum, slice});
        parallel_dynamic(units.size(), [&](auto next) {
            for (int64_t i; (i = next()) >= 0;)
                for (size_t at = units[i].begin; at < chunks.size() && chunks[at].expert == chunks[units[i].begin].expert; ++at)
                    units[i].sum->add(chunks[at], chunks[at].first == plan.starts[chunks[at].expert], units[i].slice);
        });
    }

    // capacity: the rows of a group.
    void run(int64_t capacity) {
        const auto all = plan.blocks(SUM_ROWS);
        for (size_t next = 0; next < all.size();) {
            std::vector<RowChunk> chunks;
            std::vector<std::pair<RowChunk, int64_t>> blocks;
            for (int64_t place = 0; next < all.size() && place + all[next].count <= capacity; ++next) {
                chunks.push_back({all[next], place});
                for (int64_t offset = 0; offset < all[next].count; offset += ROW_BLOCK) blocks.push_back({chunks.back(), offset});
                place += (all[next].count + 1) / 2 * 2;
            }
            run_blocks(blocks);
            run_sums(chunks);
        }
    }
};

// dx, dy, x: fp[T, D]; dgate_up: f32[E, 2I, D]; ddown: f32[E, D, I]; dweights, weights: f32[T, k]; kept: fp[T
// * k, 2I]; gate_up: fp|f32[E, 2I, D]; down: fp|f32[E, D, I]; expert_ids: i64[T, k].
void moe_experts_bwd(Tensor dx, Tensor dgate_up, Tensor ddown, Tensor dweights, Tensor dy, Tensor kept, Tensor x, Tensor gate_up,
                     Tensor down, Tensor expert_ids, Tensor weights) {
    const char* op = "moe_experts_bwd";
    const ExpertSizes size(op, x, down, expert_ids);
    const int64_t num_tokens = size.num_tokens, k = size.k, num_experts = size.num_experts;
    const int64_t hidden = size.hidden, inner = size.inner;
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const T* upstream = data<const T>(op, "dy", dy, {num_tokens, hidden});
        const T* projected = data<const T>(op, "kept", kept, {num_tokens * k, 2 * inner});
        const T* tokens = data<const T>(op, "x", x, {num_tokens, hidden});
        const float* route_weights = data<const float>(op, "weights", weights, {num_tokens, k});
        T* out = data<T>(op, "dx", dx, {num_tokens, hidden});
        float* to_gate_up = data<float>(op, "dgate_up", dgate_up, {num_experts, 2 * inner, hidden});
        float* to_down = data<float>(op, "ddown", ddown, {num_experts, hidden, inner});
        float* to_weights = data<float>(op, "dweights", dweights, {num_tokens, k});
        const Plan plan(op, size, expert_ids);
        const PackedExperts<T, false> first(op, "gate_up", gate_up, 2 * inner, hidden, plan);
        const PackedExperts<T, false> second(op, "down", down, hidden, inner, plan);
        // Experts without rows get a gradient of 0.
        for (int64_t e = 0; e < num_experts; ++e)
            if (plan.starts[e] == plan.starts[e + 1]) {
                std::fill_n(to_gate_up + e * 2 * inner * hidden, 2 * inner * hidden, 0.0f);
                std::fill_n(to_down + e * hidden * inner, hidden * inner, 0.0f);
            }
        const int64_t capacity = std::min<int64_t>(GROUP_ROWS * torch::stable::get_num_threads(), plan.num_rows() + num_experts);
        RowSum<T> sum_up(2 * inner, hidden, capacity + 1, to_gate_up), sum_down(hidden, inner, capacity + 1, to_down);
        Scratch<T> dx_rows(plan.num_rows() * hidden);
        Backward<T> backward{plan, upstream, projected, tokens, route_weights, first, second, dx_rows, to_weights, sum_up,
                             sum_down};
        backward.run(capacity);
        // dx of a token is the sum of its rows.
        const std::vector<float> ones(num_tokens * k, 1.0f);
        plan.combine<T>(out, dx_rows, ones.data());
    });
}

RR_REGISTER(m) { m.impl("moe_experts_bwd", TORCH_BOX(&moe_experts_bwd)); }

}  // namespace
}  // namespace reason_rl
