// sample on a block of rows, without torch: shared by the op (cpu.cpp) and the native decode.
//
// A row's token depends on its hidden state, its key and its position, not on the other rows. Its logprob has
// the bits of linear_logprob (linear_logprob/rows.h).
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../linear_logprob/rows.h"
#include "noise.h"

namespace reason_rl {

struct SampleSpec {
    double temperature;  // 0: greedy, with the logprob at temperature 1
    int64_t top_k;       // 0: off
    double top_p;        // 1: off
    double min_p;        // 0: off
    // Does the spec cut the distribution?
    bool cuts() const { return temperature != 0 && (top_k > 0 || top_p < 1 || min_p > 0); }
};

// Scratch memory of one thread; grows to the largest block it is used for.
struct SampleScratch {
    std::vector<float> logits, scores;
    std::vector<int32_t> order;
    std::vector<bf16> pairs;  // rows of odd length, see even_rows
};

// Applies top_k, top_p and min_p to one row: keeps the most likely tokens, in order (equal ones by index), up
// to the first that a rule excludes, and sets the other logits to -inf. Returns kept_logmass, the log of the
// kept probability.
inline float cut_row(float* logits, int64_t vocab, float log_sum, const SampleSpec& spec, SampleScratch& scratch) {
    const auto logprob = [&](int32_t v) { return logits[v] - log_sum; };
    const auto is_after = [&](int32_t a, int32_t b) {
        const float first = logprob(a), second = logprob(b);
        return first < second || (first == second && a > b);
    };
    // A heap gives the tokens in order without sorting them all.
    std::vector<int32_t>& order = scratch.order;
    order.resize(vocab);
    for (int64_t v = 0; v < vocab; ++v) order[v] = static_cast<int32_t>(v);
    std::make_heap(order.begin(), order.end(), is_after);
    const double log_min_p = std::log(static_cast<double>(static_cast<float>(spec.min_p)));  // min_p = 0: -inf, cuts nothing
    const float floor = logprob(order[0]) + static_cast<float>(log_min_p);
    double mass_before = 0;
    auto end = order.end();
    int64_t rank = 0;
    for (; rank < vocab; ++rank, --end) {
        const float next = logprob(order[0]);
        const double mass = std::exp(static_cast<double>(next));  // + mass - mass below: rounds like the reference, cumsum - p
        const bool is_in_mass = spec.top_p == 1 || mass_before + mass - mass < spec.top_p;
        if (rank && !(is_in_mass && next >= floor && (!spec.top_k || rank < spec.top_k))) break;
        mass_before += mass;
        std::pop_heap(order.begin(), end, is_after);
    }
    if (rank == vocab) return 0.0f;
    for (auto v = order.begin(); v != end; ++v) logits[*v] = -std::numeric_limits<float>::infinity();
    return std::min(static_cast<float>(std::log(mass_before)), 0.0f);
}

// The token with the largest logit + noise, the first one if several are equal. logits: f32[padded(vocab)],
// at most 0, the largest kept one 0, -inf if cut. Scores are computed in f32 first. The winner's score lies
// between the noise's extremes, -3.1 and 22.9, so that rounding and NOISE_ERROR change two scores by less
// than MARGIN together: only tokens within MARGIN of the best f32 score can win, and these get their exact
// noise.
inline int64_t pick_token(const float* logits, int64_t vocab, int64_t key, int64_t position, std::vector<float>& scores) {
    constexpr float MARGIN = 2 * NOISE_ERROR + 0x1p-17f;
    // All scores in f32.
    scores.resize(padded(vocab));
    F32x16 top = splat(-std::numeric_limits<float>::infinity());
    uint32_t words[NOISE_WORDS];
    for (int64_t first = 0; first < vocab; first += NOISE_WORDS) {
        philox_words(words, key, position, first / 4);
        for (int64_t v = first; v < std::min(vocab, first + NOISE_WORDS); v += LANES) {
            U32x16 sixteen;
            std::memcpy(&sixteen, words + v - first, sizeof sixteen);
            const F32x16 score = load(logits + v) + gumbel_near(sixteen);
            store(scores.data() + v, score);
            top = max(top, score);
        }
    }
    // The exact scores of the candidates; a single candidate needs none.
    const float least = highest(top) - MARGIN;
    int64_t best = -1, num = 0;
    float best_score = 0;
    const auto exact_score = [&](int64_t v) {
        philox_words(words, key, position, v / 4);
        return logits[v] + gumbel(words[v % 4]);
    };
    for (int64_t first = 0; first < vocab; first += LANES) {
        for (uint32_t near = lane_bits(load(scores.data() + first) >= least); near; near &= near - 1) {
            const int64_t v = first + std::countr_zero(near);
            if (num == 1) best_score = exact_score(best);
            if (const float score = num ? exact_score(v) : 0.0f; !num || score > best_score) best = v, best_score = score;
            ++num;
        }
    }
    return best;
}

// Subtracts the row's maximum from its logits, in place. Returns false if they hold NaN or inf.
inline bool shift_row(float* logits, int64_t vocab, float max) {
    I32x16 is_finite = splat<int32_t>(-1);
    for (int64_t v = 0; v < vocab; v += LANES) {
        const F32x16 shifted = load(logits + v) - max;
        store(logits + v, shifted);
        is_finite = is_finite & (keep_first(shifted, vocab - v, 0.0f) >= -std::numeric_limits<float>::max());
    }
    return lane_bits(is_finite) == 0xffffu;
}

struct SampledToken {
    int64_t token;
    float logprob, kept_logmass;
};

// Samples one row. The token is -1 if its logits hold NaN or inf.
inline SampledToken sample_row(float* logits, int64_t vocab, const SampleSpec& spec, int64_t key, int64_t position,
                               SampleScratch& scratch) {
    LogitSums sums;
    for (int64_t first = 0; first < vocab; first += LOGIT_CHUNK)
        sums.add<false>(logits + first, padded(std::min(LOGIT_CHUNK, vocab - first)), first == 0);
    if (!shift_row(logits, vocab, sums.max)) return {-1, 0.0f, 0.0f};
    // Greedy, or cut and pick with noise.
    const float log_sum = sums.log_sum();
    if (spec.temperature == 0) {
        const int64_t likeliest = std::find(logits, logits + vocab, 0.0f) - logits;
        return {likeliest, 0.0f - log_sum, 0.0f};
    }
    const float kept_logmass = spec.cuts() ? cut_row(logits, vocab, log_sum, spec, scratch) : 0.0f;
    const int64_t token = pick_token(logits, vocab, key, position, scratch.scores);
    return {token, logits[token] - log_sum, kept_logmass};
}

// Samples `rows` rows. hidden: T[rows, D]; keys, positions, token: i64[rows]; logprob, kept_logmass:
// f32[rows]. The head is read once per block of rows; a block has at most 4 MB of logits, or TILE_ROWS rows.
// Returns the first row with NaN or inf logits, or -1.
template <class T>
int64_t sample_rows(const T* hidden, int64_t rows, const T* packed_head, int64_t hidden_size, int64_t vocab,
                    const SampleSpec& spec, const int64_t* keys, const int64_t* positions, int64_t* token, float* logprob,
                    float* kept_logmass, SampleScratch& scratch) {
    const int64_t stride = padded(vocab);
    const int64_t block = std::clamp<int64_t>((1 << 20) / stride, TILE_ROWS, ROW_BLOCK) / TILE_ROWS * TILE_ROWS;
    scratch.logits.resize(std::min(block, rows) * stride);
    if (hidden_size % PER_UNIT<T>) scratch.pairs.resize(block * (hidden_size + 1));
    for (int64_t first = 0; first < rows; first += block) {
        // The block's logits, divided by the temperature: f32[count, stride].
        const int64_t count = std::min(block, rows - first);
        RowsOf<T> a = rows_of(hidden + first * hidden_size, hidden_size);
        if constexpr (PER_UNIT<T> == 2) a = even_rows(hidden + first * hidden_size, count, hidden_size, scratch.pairs.data());
        const float temperature = spec.temperature == 0 ? 1.0f : static_cast<float>(spec.temperature);
        logit_rows(scratch.logits.data(), stride, a, count, packed_head, hidden_size, vocab, temperature);
        for (int64_t r = first; r < first + count; ++r) {
            float* logits = scratch.logits.data() + (r - first) * stride;
            const SampledToken sampled = sample_row(logits, vocab, spec, keys[r], positions[r], scratch);
            if (sampled.token < 0) return r;
            token[r] = sampled.token, logprob[r] = sampled.logprob, kept_logmass[r] = sampled.kept_logmass;
        }
    }
    return -1;
}

[[noreturn]] inline void fail_non_finite_row(int64_t row) {
    throw std::runtime_error("sample: the logits of row " + std::to_string(row) +
                             " hold NaN or inf; the weights or the hidden states are broken");
}

}  // namespace reason_rl
