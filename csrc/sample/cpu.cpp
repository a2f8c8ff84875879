// sample on the CPU. Siblings: kernels/sample/, tests/kernels/test_sample.py; rows.h and noise.h here.
#include "rows.h"

#include <atomic>

#include "../common/tensor.h"

namespace reason_rl {
namespace {

void sample(Tensor token, Tensor logprob, Tensor kept_logmass, Tensor hidden, Tensor weight, Tensor keys, Tensor positions,
            double temperature, int64_t top_k, double top_p, double min_p) {
    const char* op = "sample";
    RR_CHECK(hidden.dim() == 2 && weight.dim() == 2, op, ": hidden and weight must have 2 dimensions, got ", hidden.dim(), " and ",
             weight.dim());
    const int64_t rows = hidden.size(0), k = hidden.size(1), vocab = weight.size(0);
    RR_CHECK(vocab > 0 && vocab < (int64_t{1} << 31), op, ": weight must have from 1 to 2^31 - 1 rows, got ", vocab);
    RR_CHECK(temperature >= 0 && top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1, op,
             ": needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, got ", temperature, ", ", top_k, ", ", top_p,
             ", ", min_p);
    const SampleSpec spec{temperature, top_k, top_p, min_p};
    const int64_t* key = data<const int64_t>(op, "keys", keys, {rows});
    const int64_t* position = data<const int64_t>(op, "positions", positions, {rows});
    int64_t* tokens = data<int64_t>(op, "token", token, {rows});
    float* logprobs = data<float>(op, "logprob", logprob, {rows});
    float* kept = data<float>(op, "kept_logmass", kept_logmass, {rows});
    by_dtype(op, "hidden", hidden, [&](auto zero) {
        using T = decltype(zero);
        const T* inputs = data<const T>(op, "hidden", hidden, {rows, k});
        Scratch<T> packed(packed_size<T>(vocab, k));
        by_master<T>(op, "weight", weight, {vocab, k}, [&](const auto* matrix) {
            parallel_for((vocab + LANES - 1) / LANES, [&](int64_t panel) {
                pack_transposed_panel<T>(packed + packed_size<T>(panel * LANES, k), matrix, vocab, k, k, panel * LANES);
            });
        });
        std::atomic<int64_t> first_broken{rows};  // the same row is named whatever the threads
        const int64_t block = rows ? share(rows, TILE_ROWS, ROW_BLOCK) : 1;
        parallel_for((rows + block - 1) / block, [&](int64_t i) {
            SampleScratch scratch;
            const int64_t first = i * block, count = std::min(block, rows - first);
            const int64_t broken = sample_rows<T>(inputs + first * k, count, packed, k, vocab, spec, key + first,
                                                      position + first, tokens + first, logprobs + first, kept + first, scratch);
            int64_t earliest = first_broken;
            while (broken >= 0 && first + broken < earliest && !first_broken.compare_exchange_weak(earliest, first + broken)) {}
        });
        if (first_broken < rows) fail_broken_row(first_broken);
    });
}

RR_REGISTER(m) {
    m.impl("sample", TORCH_BOX(&sample));
}

}  // namespace
}  // namespace reason_rl
