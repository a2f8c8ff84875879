// linear_logprob on the CPU, forward and backward. Siblings: kernels/linear_logprob/,
// tests/kernels/test_linear_logprob*.py.
//
// Both passes visit the vocabulary in chunks of LOGIT_CHUNK tokens, so that the logits of a chunk and a block
// of rows stay in cache and scratch memory does not grow with V. Backward recomputes a chunk's logits and
// turns them into dz.
//
// Precision: logits are f32; the sums over V are f32 within a chunk and f64 across chunks (rows.h). dz is
// rounded to fp, the dtype of its two products. dhidden is summed over the chunks in f32 and rounded once.
// dweight is f32, summed over the rows in blocks whose size depends on V, D and the dtype only, never on the
// number of threads.
#include "rows.h"

#include "../common/pack.h"
#include "../common/tensor.h"

namespace reason_rl {
namespace {

struct Shape {
    int64_t rows, hidden, vocab;
};

Shape check_shape(const char* op, const Tensor& hidden, const Tensor& weight, double temperature) {
    RR_CHECK(hidden.dim() == 2 && weight.dim() == 2, op, ": hidden and weight must have 2 dimensions, got ", hidden.dim(), " and ",
             weight.dim());
    RR_CHECK(weight.size(0) > 0 || hidden.size(0) == 0, op, ": weight must have a row for each token of the vocabulary, got none");
    RR_CHECK(temperature > 0, op, ": temperature must be above 0, got ", temperature);
    return {hidden.size(0), hidden.size(1), weight.size(0)};
}

const int64_t* check_targets(const char* op, const Tensor& target_ids, const Shape& s) {
    const int64_t* targets = data<const int64_t>(op, "target_ids", target_ids, {s.rows});
    for (int64_t r = 0; r < s.rows; ++r)
        RR_CHECK(targets[r] >= 0 && targets[r] < s.vocab, op, ": target_ids must be in 0..", s.vocab - 1, ", got ", targets[r],
                 " in row ", r);
    return targets;
}

// The rows of a task: a multiple of TILE_ROWS, so that every task starts at an even row and pairs of bf16
// rows stay together.
int64_t rows_per_task(int64_t rows) { return items_per_task(rows, TILE_ROWS, ROW_BLOCK); }

// logprob, entropy: f32[N]; stats: f32[N, 2]; hidden: fp[N, D]; weight: fp|f32[V, D]; target_ids: i64[N].
void linear_logprob_fwd(Tensor logprob, Tensor entropy, Tensor stats, Tensor hidden, Tensor weight, Tensor target_ids,
                        double temperature) {
    const char* op = "linear_logprob_fwd";
    const Shape s = check_shape(op, hidden, weight, temperature);
    const int64_t* targets = check_targets(op, target_ids, s);
    float* logprobs = data<float>(op, "logprob", logprob, {s.rows});
    float* entropies = data<float>(op, "entropy", entropy, {s.rows});
    float* row_stats = data<float>(op, "stats", stats, {s.rows, 2});
    by_dtype(op, "hidden", hidden, [&](auto zero) {
        using T = decltype(zero);
        const T* inputs = data<const T>(op, "hidden", hidden, {s.rows, s.hidden});
        by_master<T>(op, "weight", weight, {s.vocab, s.hidden}, [&](const auto* matrix) {
            const int64_t width = padded(std::min(s.vocab, LOGIT_CHUNK));
            Scratch<T> panels(packed_size<T>(width, s.hidden));
            std::vector<LogitSums> sums(s.rows);
            for (int64_t token = 0; token < s.vocab; token += LOGIT_CHUNK) {
                const int64_t count = std::min(LOGIT_CHUNK, s.vocab - token);
                pack_matrices<true, T>(panels, matrix + token * s.hidden, 1, count, s.hidden);
                parallel_blocks(s.rows, rows_per_task(s.rows), [&](int64_t first, int64_t rows) {
                    // The block's logits for this chunk: f32[rows, width].
                    Scratch<float> logits(rows * width);
                    Scratch<T> pairs(rows * odd_row<T>(s.hidden));
                    const auto a = even_rows(inputs + first * s.hidden, rows, s.hidden, static_cast<T*>(pairs));
                    logit_rows<T>(logits, width, a, rows, panels, s.hidden, count, static_cast<float>(temperature));
                    // Add the chunk to each row's softmax; keep the target's logit for later.
                    for (int64_t r = 0; r < rows; ++r) {
                        const float* row = logits + r * width;
                        sums[first + r].add(row, padded(count), token == 0);
                        const int64_t target = targets[first + r] - token;
                        if (target >= 0 && target < count) logprobs[first + r] = row[target];
                    }
                    // After the last chunk.
                    for (int64_t r = first; r < first + rows && token + count == s.vocab; ++r) {
                        const float log_sum = sums[r].log_sum();
                        row_stats[2 * r] = sums[r].max, row_stats[2 * r + 1] = log_sum;
                        logprobs[r] = logprobs[r] - sums[r].max - log_sum;
                        entropies[r] = sums[r].entropy();
                    }
                });
            }
        });
    });
}

// The gradients of one row's results, and its softmax.
struct RowGradient {
    float dlogprob, dentropy, max, log_sum, entropy;
    int64_t target;  // index in the chunk; out of range if the target is in another chunk
};

// The gradient of the logits h . w_v, for the `count` tokens of a chunk and 0 up to the next multiple of 16:
//     dz[v] = (dlogprob * (1[v = target] - p) - dentropy * p * (log p + entropy)) / temperature
template <class T>
void gradient_row(T* dz, float* logits, int64_t count, const RowGradient& row, float temperature) {
    const F32x16 divisor = splat(temperature);
    for (int64_t v = 0; v < count; v += LANES) {
        const F32x16 log_p = load(logits + v) - row.max - row.log_sum;
        // p is 0 for log p < -87.34; the bound keeps p * log p from becoming 0 * -inf = NaN.
        const F32x16 slope = splat(-row.dlogprob) - (max(log_p, splat(-1e4f)) + row.entropy) * row.dentropy;
        store(logits + v, exp(log_p) * slope);
    }
    if (row.target >= 0 && row.target < count) logits[row.target] += row.dlogprob;
    for (int64_t v = 0; v < count; v += LANES) store(dz + v, load(logits + v) / divisor);
}

template <class T>
struct Backward {
    Shape s;
    float temperature;
    const T* hidden;
    const int64_t* targets;
    const float *dlogprob, *dentropy, *stats, *entropy;
    T* dhidden;
    float* dweight;

    template <class S>
    void run(const S* weight) const {
        const int64_t most = std::min(s.vocab, LOGIT_CHUNK), width = padded(most);
        // Rows per block: dz and inputs of half a megabyte, within bounds that make a pass over dweight worth
        // it.
        const int64_t row_bytes = std::max<int64_t>(1, (width + s.hidden) * static_cast<int64_t>(sizeof(T)));
        const int64_t block = std::clamp((1 << 19) / row_bytes / K_BLOCK * K_BLOCK, 4 * K_BLOCK, 16 * K_BLOCK);
        Scratch<T> panels(packed_size<T>(most, s.hidden)), plain(packed_size<T>(s.hidden, most));
        Scratch<T> dz(block * width), pairs(PER_UNIT<T> == 2 ? block * width : 0), inputs(packed_size<T>(s.hidden, block));
        // With several chunks dhidden is summed in f32: in place, or in `wide` if dhidden is bf16.
        Scratch<float> wide(sizeof(T) == 2 && s.vocab > LOGIT_CHUNK ? s.rows * s.hidden : 0);
        std::fill(dweight, dweight + s.vocab * s.hidden, 0.0f);
        for (int64_t token = 0; token < s.vocab; token += LOGIT_CHUNK) {
            const int64_t count = std::min(LOGIT_CHUNK, s.vocab - token);
            // W of the chunk, transposed for the logits and plain for dhidden.
            pack_matrices<true, T>(panels, weight + token * s.hidden, 1, count, s.hidden);
            pack_matrices<false, T>(plain, weight + token * s.hidden, 1, s.hidden, count);
            for (int64_t row = 0; row < s.rows; row += block) {
                const int64_t rows = std::min(block, s.rows - row);
                parallel_blocks(rows, rows_per_task(rows), [&](int64_t first, int64_t num) {
                    rows_of_chunk(row + first, num, token, count, width, panels, plain, dz + first * width, wide);
                    // The operands of dweight's product: dz with rows in pairs, the inputs as panels.
                    if constexpr (PER_UNIT<T> == 2) columns_of<T>(dz + first * width, num, count, width, pairs + first * count);
                    const T* own = hidden + (row + first) * s.hidden;
                    for (int64_t c = 0; c < s.hidden; c += LANES)
                        pack_panel<T>(inputs + packed_size<T>(c, rows) + first * LANES, own, num, s.hidden, s.hidden, c);
                });
                add_dweight(dweight + token * s.hidden, count, rows, width, dz, pairs, inputs);
            }
        }
    }

    // dz: T[rows, width] of one chunk, and what the chunk adds to dhidden, for `rows` rows from `first`.
    void rows_of_chunk(int64_t first, int64_t rows, int64_t token, int64_t count, int64_t width, const T* panels, const T* plain,
                       T* dz, float* wide) const {
        Scratch<float> logits(rows * width);
        Scratch<T> odd(rows * odd_row<T>(s.hidden));
        const auto a = even_rows(hidden + first * s.hidden, rows, s.hidden, static_cast<T*>(odd));
        logit_rows<T>(logits, width, a, rows, panels, s.hidden, count, temperature);
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t n = first + r;
            gradient_row(dz + r * width, logits + r * width, count,
                         {dlogprob[n], dentropy[n], stats[2 * n], stats[2 * n + 1], entropy[n], targets[n] - token}, temperature);
        }
        // dhidden += dz @ W. One chunk: rounded at once; several: summed in f32, rounded after the last.
        const auto gradients = rows_of<T>(dz, width);
        T* out = dhidden + first * s.hidden;
        float* sum = sizeof(T) == 4 ? reinterpret_cast<float*>(out) : wide + first * s.hidden;
        if (s.vocab <= LOGIT_CHUNK) return for_tiles(rows, s.hidden, count, gradients, plain, store_tile(out, s.hidden));
        if (token == 0) for_tiles(rows, s.hidden, count, gradients, plain, store_tile(sum, s.hidden));
        else for_tiles(rows, s.hidden, count, gradients, plain, add_tile(sum, s.hidden));
        if constexpr (sizeof(T) == 2)
            for (int64_t i = 0; i < rows * s.hidden && token + LOGIT_CHUNK >= s.vocab; i += LANES) {
                const int64_t n = std::min<int64_t>(LANES, rows * s.hidden - i);
                store(out + i, load(sum + i, n), n);
            }
    }

    // out: f32[count, D] += dz^T @ hidden over `rows` rows. Each task owns some tokens, which are rows of
    // dweight.
    void add_dweight(float* out, int64_t count, int64_t rows, int64_t width, const T* dz, const T* pairs, const T* inputs) const {
        parallel_blocks(count, items_per_task(count, TILE_ROWS, ROW_BLOCK), [&](int64_t first, int64_t num) {
            RowsOf<T> a{dz + first, 1, width};
            if constexpr (PER_UNIT<T> == 2) a = {pairs + 2 * first, 1, count};
            for_tiles<T>(num, s.hidden, rows, a, inputs, add_tile(out + first * s.hidden, s.hidden));
        });
    }
};

// dhidden, hidden: fp[N, D]; dweight: f32[V, D]; weight: fp|f32[V, D]; dlogprob, dentropy, entropy: f32[N];
// stats: f32[N, 2]; target_ids: i64[N].
void linear_logprob_bwd(Tensor dhidden, Tensor dweight, Tensor dlogprob, Tensor dentropy, Tensor hidden, Tensor weight,
                        Tensor target_ids, Tensor stats, Tensor entropy, double temperature) {
    const char* op = "linear_logprob_bwd";
    const Shape s = check_shape(op, hidden, weight, temperature);
    const int64_t* targets = check_targets(op, target_ids, s);
    by_dtype(op, "hidden", hidden, [&](auto zero) {
        using T = decltype(zero);
        const Backward<T> backward{
            s, static_cast<float>(temperature), data<const T>(op, "hidden", hidden, {s.rows, s.hidden}), targets,
            data<const float>(op, "dlogprob", dlogprob, {s.rows}), data<const float>(op, "dentropy", dentropy, {s.rows}),
            data<const float>(op, "stats", stats, {s.rows, 2}), data<const float>(op, "entropy", entropy, {s.rows}),
            data<T>(op, "dhidden", dhidden, {s.rows, s.hidden}), data<float>(op, "dweight", dweight, {s.vocab, s.hidden})};
        by_master<T>(op, "weight", weight, {s.vocab, s.hidden}, [&](const auto* matrix) { backward.run(matrix); });
    });
}

RR_REGISTER(m) {
    m.impl("linear_logprob_fwd", TORCH_BOX(&linear_logprob_fwd));
    m.impl("linear_logprob_bwd", TORCH_BOX(&linear_logprob_bwd));
}

}  // namespace
}  // namespace reason_rl
