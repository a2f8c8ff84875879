// The head's logits for a block of rows, and their softmax: shared by linear_logprob and sample, which is what makes the sampler's
// logprobs the trainer's to the bit.
//
//     logprob[v] = (z[v] - max) - log_sum          z = hidden . weight[v] / temperature
//
// A row's sum runs in chunks of LOGIT_CHUNK tokens: in each, 16 lanes in order, relative to the chunk's own maximum; the chunks are
// then merged in order. The order follows from V alone, and nothing of size V need be kept.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "../common/gemm.h"

namespace reason_rl {

constexpr int64_t LOGIT_CHUNK = 1024;

// logits [rows, stride] of `count` tokens whose panels begin at `panels`: z, and -inf from `count` up to the next multiple of 16.
template <class T>
void logit_rows(float* logits, int64_t stride, RowsOf<T> hidden, int64_t rows, const T* panels, int64_t hidden_size, int64_t count,
                float temperature) {
    const auto put = [=](int64_t m, int num_rows, int64_t n, int64_t columns, const Tile& tile) {
        for (int r = 0; r < num_rows; ++r)
            for (int64_t j = 0; j < columns; j += LANES) {
                F32x16 z = load(tile.row(r) + j);
                if (temperature != 1.0f) z = z / splat(temperature);
                store(logits + (m + r) * stride + n + j, keep_first(z, columns - j, -std::numeric_limits<float>::infinity()));
            }
    };
    for_tiles(rows, count, hidden_size, hidden, panels, put);
}

// The softmax of a row, chunk by chunk.
struct LogitSums {
    float max = -std::numeric_limits<float>::infinity();
    double sum = 0;       // of exp(z - max)
    double weighted = 0;  // of exp(z - max) * (z - max)

    // Only what one chunk holds: `count` a multiple of 16, -inf where there is no token. NaN and inf end up in the sum.
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
            // A logit of -inf has no share in the entropy: 0, not 0 * inf.
            if constexpr (WITH_ENTROPY) weighted = fma(e, reason_rl::max(shifted, least), weighted);
        }
        chunk.sum = reason_rl::sum(sums);
        if constexpr (WITH_ENTROPY) chunk.weighted = reason_rl::sum(weighted);
        return chunk;
    }
    // Seen from another maximum, at least this one.
    LogitSums from(float other) const {
        const double down = static_cast<double>(max) - other, factor = std::exp(down);
        return {other, sum * factor, factor == 0 ? 0.0 : (weighted + sum * down) * factor};
    }
    // The next chunk's logits.
    template <bool WITH_ENTROPY = true>
    void add(const float* logits, int64_t count, bool is_first) {
        const LogitSums chunk = of_chunk<WITH_ENTROPY>(logits, count);
        if (is_first) {
            *this = chunk;
            return;
        }
        const float top = !(chunk.max <= max) ? chunk.max : max;
        const LogitSums a = max == top ? *this : from(top), b = chunk.max == top ? chunk : chunk.from(top);
        *this = {top, a.sum + b.sum, a.weighted + b.weighted};
    }

    float log_sum() const { return static_cast<float>(std::log(sum)); }
    float entropy() const { return static_cast<float>(std::log(sum) - weighted / sum); }
};

}  // namespace reason_rl
