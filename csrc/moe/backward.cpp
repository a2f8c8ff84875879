// The experts' backward pass on the CPU. Siblings: cpu.cpp, kernels/moe/, tests/kernels/test_moe.py.
//
// Only the gate_up outputs p were kept. With dact = dy @ down, not weighted yet:
//     dweights = act . dact      (which is out . dy, without out)         dp = swiglu'(p, weight * dact)
//     dx_row = dp @ gate_up, summed over a token's rows in order of k
//     ddown = dy^T @ (weight * act)       dgate_up = dp^T @ x             summed over an expert's rows in order
//
// A group of rows at a time, small enough for the cache: first its blocks, each of which packs its rows for the sums over rows,
// then those sums. They run over an expert's own pieces of PIECE rows: neither the group's size nor the threads enter.
#include "plan.h"

namespace reason_rl {
namespace {

constexpr int64_t PIECE = 5 * ROW_BLOCK;  // rows that one product of a weight's gradient sums over
constexpr int64_t GROUP = 2 * PIECE;      // rows a thread, for a group
constexpr int64_t SLICE = 16 * TILE_ROWS;  // rows of a weight's gradient that a thread takes at a time

struct Piece : Block {
    int64_t place;  // of its first row in the group; even, so that pairs of bf16 rows stay together
};

// The rows of a group as both sides of dweight [left, right] = sum over rows of left^T @ right.
template <class T>
struct RowSum {
    int64_t left_width, right_width;
    float* dweight;
    Scratch<T> left, right;

    RowSum(int64_t left_width, int64_t right_width, int64_t capacity, float* dweight)
        : left_width(left_width), right_width(right_width), dweight(dweight), left(capacity * left_width),
          right(capacity * packed_size<T>(right_width, 1) / PER_UNIT<T>) {}

    T* right_of(const Piece& piece) const { return right + piece.place * packed_size<T>(right_width, 1) / PER_UNIT<T>; }

    void keep(const Piece& piece, int64_t offset, int64_t count, const T* left_rows, const T* right_rows) {
        T* place = left + (piece.place + offset) * left_width;
        if constexpr (PER_UNIT<T> == 1) std::memcpy(place, left_rows, count * left_width * sizeof(T));
        else columns_of(left_rows, count, left_width, left_width, place);
        for (int64_t n = 0; n < right_width; n += LANES)
            pack_panel<T>(right_of(piece) + packed_size<T>(n, piece.count) + offset * LANES, right_rows, count, right_width,
                          right_width, n);
    }

    // Rows first.. of the expert's dweight; its first piece overwrites, the others add.
    void add(const Piece& piece, bool is_first, int64_t first) const {
        const int64_t rows = std::min(SLICE, left_width - first);
        float* out = dweight + (piece.expert * left_width + first) * right_width;
        const RowsOf<T> a{left + piece.place * left_width + first * PER_UNIT<T>, 1, left_width};
        if (is_first) for_tiles<T>(rows, right_width, piece.count, a, right_of(piece), store_tile(out, right_width));
        else for_tiles<T>(rows, right_width, piece.count, a, right_of(piece), add_tile(out, right_width));
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

    // -> dweight of the row; writes dp [2I] and weight * act [I].
    static float activation(T* dp, T* act, const float* dact, const T* p, float weight, int64_t inner) {
        F32x16 total = splat(0.0f);
        for (int64_t j = 0; j < inner; j += LANES) {
            const int64_t n = inner - j;
            const F32x16 upstream = load(dact + j, n);
            const auto gradient = swiglu_gradient(load(p + j, n), load(p + inner + j, n), upstream * weight);
            const F32x16 y = round_to<T>(gradient.y);  // as the forward pass had it
            total = fma(y, upstream, total);
            store(act + j, y * weight, n);
            store(dp + j, gradient.dgate, n);
            store(dp + inner + j, gradient.dup, n);
        }
        return sum(total);
    }

    void run_blocks(const std::vector<std::pair<Piece, int64_t>>& blocks) {
        const int64_t hidden = plan.size.hidden, inner = plan.size.inner;
        share_out(blocks.size(), [&](auto next) {
            Scratch<T> dy_rows(ROW_BLOCK * hidden), x_rows(ROW_BLOCK * hidden), act(ROW_BLOCK * inner), dp(ROW_BLOCK * 2 * inner);
            Scratch<T> pairs(ROW_BLOCK * odd_row<T>(hidden));
            Scratch<float> dact(ROW_BLOCK * inner);
            for (int64_t i; (i = next()) >= 0;) {
                const auto& [piece, offset] = blocks[i];
                const int64_t first = piece.first + offset, count = std::min(ROW_BLOCK, piece.count - offset);
                plan.gather<T>(dy_rows, dy, first, count);
                plan.gather<T>(x_rows, x, first, count);
                for_tiles<T>(count, inner, hidden, even_rows<T>(dy_rows, count, hidden, pairs), down.of(piece.expert),
                             store_tile<float>(dact, inner));
                for (int64_t m = 0; m < count; ++m) {
                    const int64_t pair = plan.pair[first + m];
                    const T* p = kept + (first + m) * 2 * inner;
                    dweights[pair] = activation(dp + m * 2 * inner, act + m * inner, dact + m * inner, p, weights[pair], inner);
                }
                for_tiles<T>(count, hidden, 2 * inner, rows_of<T>(dp, 2 * inner), gate_up.of(piece.expert),
                             store_tile<T>(dx_rows + first * hidden, hidden));
                to_gate_up.keep(piece, offset, count, dp, x_rows);
                to_down.keep(piece, offset, count, dy_rows, act);
            }
        });
    }

    // pieces: those of one group. A unit is a slice of one expert's gradient, over all of the expert's pieces here.
    void run_sums(const std::vector<Piece>& pieces) {
        struct Unit {
            size_t begin;
            const RowSum<T>* sum;
            int64_t slice;
        };
        std::vector<Unit> units;
        for (size_t i = 0; i < pieces.size(); ++i)
            if (i == 0 || pieces[i].expert != pieces[i - 1].expert)
                for (const auto* sum : {&to_gate_up, &to_down})
                    for (int64_t slice = 0; slice < sum->left_width; slice += SLICE) units.push_back({i, sum, slice});
        share_out(units.size(), [&](auto next) {
            for (int64_t i; (i = next()) >= 0;)
                for (size_t at = units[i].begin; at < pieces.size() && pieces[at].expert == pieces[units[i].begin].expert; ++at)
                    units[i].sum->add(pieces[at], pieces[at].first == plan.starts[pieces[at].expert], units[i].slice);
        });
    }

    void run(int64_t capacity) {
        const auto all = plan.blocks(PIECE);
        for (size_t next = 0; next < all.size();) {
            std::vector<Piece> pieces;
            std::vector<std::pair<Piece, int64_t>> blocks;
            for (int64_t place = 0; next < all.size() && place + all[next].count <= capacity; ++next) {
                pieces.push_back({all[next], place});
                for (int64_t offset = 0; offset < all[next].count; offset += ROW_BLOCK) blocks.push_back({pieces.back(), offset});
                place += (all[next].count + 1) / 2 * 2;
            }
            run_blocks(blocks);
            run_sums(pieces);
        }
    }
};

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
        const float* shares = data<const float>(op, "weights", weights, {num_tokens, k});
        T* out = data<T>(op, "dx", dx, {num_tokens, hidden});
        float* to_gate_up = data<float>(op, "dgate_up", dgate_up, {num_experts, 2 * inner, hidden});
        float* to_down = data<float>(op, "ddown", ddown, {num_experts, hidden, inner});
        float* to_weights = data<float>(op, "dweights", dweights, {num_tokens, k});
        const Plan plan(op, size, expert_ids);
        const PackedExperts<T, false> first(op, "gate_up", gate_up, 2 * inner, hidden, plan);
        const PackedExperts<T, false> second(op, "down", down, hidden, inner, plan);
        for (int64_t e = 0; e < num_experts; ++e)
            if (plan.starts[e] == plan.starts[e + 1]) {
                std::fill_n(to_gate_up + e * 2 * inner * hidden, 2 * inner * hidden, 0.0f);
                std::fill_n(to_down + e * hidden * inner, hidden * inner, 0.0f);
            }
        const int64_t capacity = std::min<int64_t>(GROUP * torch::stable::get_num_threads(), plan.num_rows() + num_experts);
        RowSum<T> sum_up(2 * inner, hidden, capacity + 1, to_gate_up), sum_down(hidden, inner, capacity + 1, to_down);
        Scratch<T> dx_rows(plan.num_rows() * hidden);
        Backward<T>{plan, upstream, projected, tokens, shares, first, second, dx_rows, to_weights, sum_up, sum_down}.run(capacity);
        const std::vector<float> ones(num_tokens * k, 1.0f);
        plan.combine<T>(out, dx_rows, ones.data());
    });
}

RR_REGISTER(m) { m.impl("moe_experts_bwd", TORCH_BOX(&moe_experts_bwd)); }

}  // namespace
}  // namespace reason_rl
