// sample on the CPU: arguments, packing and threads. The sampling itself is in rows.h and noise.h.
// Siblings: kernels/sample/, tests/kernels/test_sample.py.
#include "rows.h"

#include <atomic>

#include "../common/pack.h"
#include "../common/tensor.h"
#include "check.h"

namespace reason_rl {
namespace {

// token, keys, positions: i64[R]; logprob, kept_logmass: f32[R]; hidden: fp[R, D]; weight: fp|f32[V, D].
void sample(Tensor token, Tensor logprob, Tensor kept_logmass, Tensor hidden, Tensor weight, Tensor keys, Tensor positions,
            double temperature, int64_t top_k, double top_p, double min_p) {
    const char* op = "sample";
    RR_CHECK(hidden.dim() == 2 && weight.dim() == 2, op, ": hidden and weight must have 2 dimensions, got ", hidden.dim(), " and ",
             weight.dim());
    const int64_t rows = hidden.size(0), k = hidden.size(1), vocab = weight.size(0);
    RR_CHECK(vocab > 0 && vocab < (int64_t{1} << 31), op, ": weight must have from 1 to 2^31 - 1 rows, got ", vocab);
    check_sampling(op, temperature, top_k, top_p, min_p);
    const SampleSpec spec{temperature, top_k, top_p, min_p};
    const int64_t* key = data<const int64_t>(op, "keys", keys, {rows});
    const int64_t* position = data<const int64_t>(op, "positions", positions, {rows});
    int64_t* tokens = data<int64_t>(op, "token", token, {rows});
    float* logprobs = data<float>(op, "logprob", logprob, {rows});
    float* logmasses = data<float>(op, "kept_logmass", kept_logmass, {rows});
    by_dtype(op, "hidden", hidden, [&](auto zero) {
        using T = decltype(zero);
        const T* inputs = data<const T>(op, "hidden", hidden, {rows, k});
        Scratch<T> packed(packed_size<T>(vocab, k));
        by_master<T>(op, "weight", weight, {vocab, k},
                     [&](const auto* matrix) { pack_matrices<true, T>(packed, matrix, 1, vocab, k); });
        // The first row with NaN or inf logits over all tasks, so that the error does not depend on the
        // threads.
        std::atomic<int64_t> first_non_finite{rows};
        parallel_blocks(rows, items_per_task(rows, TILE_ROWS, ROW_BLOCK), [&](int64_t first, int64_t count) {
            SampleScratch scratch;
            const int64_t found = sample_rows<T>(inputs + first * k, count, packed, k, vocab, spec, key + first, position + first,
                                                 tokens + first, logprobs + first, logmasses + first, scratch);
            int64_t earliest = first_non_finite;
            while (found >= 0 && first + found < earliest && !first_non_finite.compare_exchange_weak(earliest, first + found)) {}
        });
        if (first_non_finite < rows) fail_non_finite_row(first_non_finite);
    });
}

RR_REGISTER(m) {
    m.impl("sample", TORCH_BOX(&sample));
}

}  // namespace
}  // namespace reason_rl
