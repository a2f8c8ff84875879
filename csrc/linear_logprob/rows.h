// The head's logits for a block of rows and their softmax, without torch. Shared by linear_logprob, sample
// and the native decode, so that the sampler's logprobs have the same bits as the trainer's.
//
//     logprob[v] = (z[v] - max) - log_sum          z = hidden . weight[v] / temperature
//
// A row's sum over V is computed in chunks of LOGIT_CHUNK tokens. Within a chunk, 16 lanes add in order,
// relative to the chunk's maximum, in f32. The chunks are merged in order, in f64. The order depends on V
// only, and a caller needs to keep one chunk of logits at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/gemm.h"

namespace reason_rl {

constexpr int64_t LOGIT_CHUNK = 1024;

// logits: f32[rows, stride]: z of the `count` tokens packed at `panels`, then -inf up to the next multiple of
// 16.
template <class T>
void logit_rows(float* logits, int64_t stride, RowsOf<T> hidden, int64_t rows, const T* panels, int64_t hidden_size, int64_t count,
                float temperature) {
    const auto write = [=](int64_t m, int num_rows, int64_t n, int64_t columns, const Tile& tile) {
        for (int r = 0; r < num_rows; ++r)
            for (int64_t j = 0; j < columns; j += LANES) {
                F32x16 z = load(tile.row(r) + j);
                if (temperature != 1.0f) z = z / splat(temperature);
                store(logits + (m + r) * stride + n + j, keep_first(z, columns - j, -std::numeric_limits<float>::infinity()));
            }
    };
    for_tiles(rows, count, hidden_size, hidden, panels, write);
}

// The running softmax of a row.
struct LogitSums {
    float max = -std::numeric_limits<float>::infinity();
    double sum = 0;       // of exp(z - max)
    double weighted = 0;  // of exp(z - max) * (z - max)

    // The sums of one chunk. `count` is a multiple of 16; padding is -inf. NaN and +inf logits make `sum`
    // NaN.
    template <bool WITH_ENTROPY>
    static LogitSums of_chunk(const float* logits, int64_t count) {
        F32x16 top = load(logits);
        for (int64_t j = LANES; j < count; j += LANES) top = reason_rl::max(top, load(logits + j));
        LogitSums chunk;
        chunk.max = highest(top);
        F32x16 sums = splat(0.0f), weighted = splat(0.0f);
        const F32x16 least = splat(-std::numeric_limits<float>::max());
        for (int64_t j = 0; j < count; j += LANES) {
            const F32x16 shifted = load(logits + j) - chunk.max, e = exp(shifted);
            sums = sums + e;
            // A logit of -inf adds 0 to the entropy, not 0 * -inf = NaN.
            if constexpr (WITH_ENTROPY) weighted = fma(e, reason_rl::max(shifted, least), weighted);
        }
        chunk.sum = reason_rl::sum(sums);
        if constexpr (WITH_ENTROPY) chunk.weighted = reason_rl::sum(weighted);
        return chunk;
    }
    // The same sums relative to a larger maximum.
    LogitSums relative_to(float other) const {
        const double down = static_cast<double>(max) - other, factor = std::exp(down);
        return {other, sum * factor, factor == 0 ? 0.0 : (weighted + sum * down) * factor};
    }
    // Adds the next chunk's logits.
    template <bool WITH_ENTROPY = true>
    void add(const float* logits, int64_t count, bool is_first) {
        const LogitSums chunk = of_chunk<WITH_ENTROPY>(logits, count);
        if (is_first) {
            *this = chunk;
            return;
        }
        const float top = !(chunk.max <= max) ? chunk.max : max;
        const LogitSums a = max == top ? *this : relative_to(top), b = chunk.max == top ? chunk : chunk.relative_to(top);
        *this = {top, a.sum + b.sum, a.weighted + b.weighted};
    }

    float log_sum() const { return static_cast<float>(std::log(sum)); }
    float entropy() const { return static_cast<float>(std::log(sum) - weighted / sum); }
};

}  // namespace reason_rl
