// `sample` on one row of logits by the threads of a GPU block: no sort, and no atomics whose order changes
// the result. The same code runs on the host with std::threads in tests (tests/kernels/select_host.cpp).
//
// In the order (logprob descending, index ascending), the kept tokens come first. A cut is therefore one
// logprob, and an index among the tokens with exactly this logprob. It is found by a radix select on the
// logprobs' bits: three levels, each with a histogram of the count and the mass per digit; the digit in which
// top_k or top_p is reached goes on to the next level. Mass is counted in integer units of 2^-60, so that its
// sums are exact in any order.
//
// A Block is the group of threads that works on a row. It has rank(); size(), a power of two; sync(); the
// reductions highest(float), sum(double) in a fixed order, sum(uint64_t) and winner(Score);
// exclusive_sum(Tally), the sum over lower ranks; and add(Tally&, uint32_t, uint64_t), which is atomic.
// `vocab` is at most INT32_MAX - 4 * size(): loop indices pass the end of the row by as much.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RR_BOTH __host__ __device__ __forceinline__
#else
#define RR_BOTH inline
#endif

namespace reason_rl {

template <class T>
RR_BOTH T least(T a, T b) { return b < a ? b : a; }

struct CutSpec {
    float temperature;  // 0: greedy, with the logprob at temperature 1
    uint32_t top_k;     // UINT32_MAX: off
    uint64_t top_p;     // in units of mass, rounded up; UINT64_MAX: off
    float log_min_p;    // -inf: off
    // Does the spec cut the distribution?
    RR_BOTH bool cuts() const {
        return temperature != 0 && (top_k != UINT32_MAX || top_p != UINT64_MAX || log_min_p > -HUGE_VALF);
    }
};

inline CutSpec cut_spec(double temperature, int64_t top_k, double top_p, double min_p) {
    return {static_cast<float>(temperature), top_k > 0 && top_k < UINT32_MAX ? static_cast<uint32_t>(top_k) : UINT32_MAX,
            top_p < 1 ? static_cast<uint64_t>(std::ceil(std::ldexp(top_p, 60))) : UINT64_MAX,
            min_p > 0 ? static_cast<float>(std::log(static_cast<double>(static_cast<float>(min_p)))) : -HUGE_VALF};
}

// The number of some tokens and their mass in units of 2^-60.
struct Tally {
    uint64_t mass;
    uint32_t count;
    RR_BOTH Tally operator+(Tally other) const { return {mass + other.mass, count + other.count}; }
    RR_BOTH bool reaches(const CutSpec& spec) const { return count >= spec.top_k || mass >= spec.top_p; }
};

// A token and its score; of equal scores the lower index wins. Token -1: none.
struct Score {
    float value;
    int32_t token;
    RR_BOTH Score better(Score other) const {
        const bool is_first = value > other.value || (value == other.value && token < other.token);
        const bool is_ours = token >= 0 && (other.token < 0 || is_first);
        return is_ours ? *this : other;
    }
};

struct SampledToken {
    int64_t token;  // -1: the logits hold NaN or inf
    float logprob, kept_logmass;
};

// ---- noise, as defined in kernels/sample/philox.py

struct Words {
    uint32_t word[4];
};

RR_BOTH Words philox(uint64_t key, uint32_t block, uint32_t position) {
    uint32_t key_a = static_cast<uint32_t>(key), key_b = static_cast<uint32_t>(key >> 32);
    uint32_t c0 = block, c1 = position, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key_a, c1 = static_cast<uint32_t>(b);
        c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key_b, c3 = static_cast<uint32_t>(a);
        key_a += 0x9E3779B9, key_b += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

// Exact: f64, rounded to f32.
RR_BOTH float gumbel(uint32_t word) { return static_cast<float>(-log(-log((static_cast<double>(word) + 0.5) * 0x1p-32))); }

// In f32, to within 1e-5: rules out the tokens that cannot win. For u >= 1/2, log u is computed from 1 - u.
RR_BOTH float gumbel_near(uint32_t word) {
    const float low = (static_cast<float>(word) + 0.5f) * 0x1p-32f, high = (static_cast<float>(~word) + 0.5f) * 0x1p-32f;
    return -logf(-(word >> 31 ? log1pf(-high) : logf(low)));
}

// ---- the cut

constexpr int NUM_BINS = 2048;

// The memory that a Block's threads share.
struct Shared {
    Tally bins[NUM_BINS];
    Tally before;
    int32_t found, tie_end;
};

// The bits of a logprob (at most 0) as a key that ascends as the logprob descends; logprob_of inverts it.
RR_BOTH uint32_t order_key(float logprob) {
    uint32_t bits;
    memcpy(&bits, &logprob, sizeof bits);
    return bits & 0x7fffffffu;
}
RR_BOTH float logprob_of(uint32_t key) {
    const uint32_t bits = key | 0x80000000u;
    float logprob;
    memcpy(&logprob, &bits, sizeof logprob);
    return logprob;
}
RR_BOTH uint64_t mass_of(float logprob) { return static_cast<uint64_t>(exp(static_cast<double>(logprob)) * 0x1p60); }

// Keeps the tokens with a smaller key, and those with this key and an index below tie_end; but none below
// `floor`.
struct Cut {
    uint32_t key;
    int32_t tie_end;
    float floor;
    RR_BOTH bool keeps(float logprob, int32_t v) const {
        const uint32_t own = order_key(logprob);
        return (own < key || (own == key && v < tie_end)) && logprob >= floor;
    }
};

// The bin in which top_k or top_p is reached when the bins are added to `before`, or -1. Sets shared.before
// to the sum of all that precedes the bin.
template <class Block>
RR_BOTH int32_t find_bin(Block& block, Shared& shared, const CutSpec& spec, Tally before) {
    // Each thread scans a run of bins; exactly one thread finds the bin, because sums ascend.
    const int each = NUM_BINS / block.size(), first = block.rank() * each;
    Tally own{0, 0};
    for (int i = first; i < first + each; ++i) own = own + shared.bins[i];
    Tally at = before + block.exclusive_sum(own);
    if (block.rank() == 0) shared.found = -1;
    block.sync();
    for (int i = first; i < first + each; ++i) {
        const Tally after = at + shared.bins[i];
        if (!at.reaches(spec) && after.reaches(spec)) shared.found = i, shared.before = at;
        at = after;
    }
    block.sync();
    return shared.found;
}

// One past the index of the `count`-th token (from 1) whose key is `key`.
template <class Block, class F>
RR_BOTH int32_t find_tie_end(Block& block, Shared& shared, int32_t vocab, uint32_t key, uint32_t count, F&& logprob) {
    // Each thread counts a contiguous range of the row; the one that holds the `count`-th token finds it.
    const int32_t each = (vocab + block.size() - 1) / block.size();
    const int32_t first = least(vocab, block.rank() * each), last = least(vocab, first + each);
    Tally own{0, 0};
    for (int32_t v = first; v < last; ++v) own.count += order_key(logprob(v)) == key;
    uint32_t rank = block.exclusive_sum(own).count;
    if (rank < count && count <= rank + own.count) {
        int32_t v = first;
        for (;; ++v)
            if (order_key(logprob(v)) == key && ++rank == count) break;
        shared.tie_end = v + 1;
    }
    block.sync();
    return shared.tie_end;
}

// The cut of one row; min_p's floor is relative to the largest logprob, -log_sum. logprob(v) is a function.
template <class Block, class F>
RR_BOTH Cut find_cut(Block& block, Shared& shared, int32_t vocab, const CutSpec& spec, float log_sum, F&& logprob) {
    Cut cut{UINT32_MAX, 0, (0.0f - log_sum) + spec.log_min_p};
    const bool has_top_p = spec.top_p != UINT64_MAX;
    if (spec.top_k == UINT32_MAX && !has_top_p) return cut;
    // The radix select: `prefix` holds the digits found so far, `before` the tokens with smaller keys.
    uint32_t prefix = 0;
    Tally before{0, 0};
    for (int level = 0; level < 3; ++level) {
        const int shift = 20 - 10 * level, above = level ? shift + 10 : 31;  // digits of 11, 10 and 10 bits
        for (int i = block.rank(); i < NUM_BINS; i += block.size()) shared.bins[i] = Tally{0, 0};
        block.sync();
        for (int32_t v = block.rank(); v < vocab; v += block.size()) {
            const float own = logprob(v);
            const uint32_t key = order_key(own);
            if (key >> above != prefix) continue;
            block.add(shared.bins[(key >> shift) & ((1u << (above - shift)) - 1)], 1, has_top_p ? mass_of(own) : 0);
        }
        block.sync();
        const int32_t bin = find_bin(block, shared, spec, before);
        if (bin < 0) return cut;
        prefix = prefix << (above - shift) | static_cast<uint32_t>(bin), before = shared.before;
    }
    // All tokens of the last bin have the same logprob: keep as many as top_k and top_p allow.
    const uint32_t num_ties = shared.bins[prefix & 1023].count;
    const uint64_t mass = mass_of(logprob_of(prefix));
    uint64_t kept = least(uint64_t{num_ties}, uint64_t{spec.top_k} - before.count);
    if (mass && has_top_p) kept = least(kept, (spec.top_p - before.mass + mass - 1) / mass);
    cut.key = prefix;
    cut.tie_end = kept == num_ties ? vocab : find_tie_end(block, shared, vocab, prefix, static_cast<uint32_t>(kept), logprob);
    return cut;
}

// ---- the row. logits: f32[vocab]; the logprob is that of the whole distribution, before any cut.

template <class Block>
RR_BOTH SampledToken sample_row(Block& block, Shared& shared, const float* logits, int32_t vocab, const CutSpec& spec,
                                uint64_t noise_key, uint32_t position) {
    const float temperature = spec.temperature == 0 ? 1.0f : spec.temperature;
    // The maximum, then the sum of exponentials; f32 terms, f64 sums.
    float top = -HUGE_VALF;
    for (int32_t v = block.rank(); v < vocab; v += block.size()) top = fmaxf(top, logits[v] / temperature);
    top = block.highest(top);
    const auto shifted = [&](int32_t v) { return logits[v] / temperature - top; };
    uint64_t num_non_finite = 0;
    double sum = 0;
    for (int32_t v = block.rank(); v < vocab; v += block.size()) {
        const float own = shifted(v);
        num_non_finite += !(own > -HUGE_VALF);
        sum += expf(own);
    }
    if (block.sum(num_non_finite)) return {-1, 0.0f, 0.0f};
    const float log_sum = static_cast<float>(log(static_cast<double>(static_cast<float>(block.sum(sum)))));
    const auto logprob = [&](int32_t v) { return shifted(v) - log_sum; };
    const bool cuts = spec.cuts();
    const Cut cut = cuts ? find_cut(block, shared, vocab, spec, log_sum, logprob) : Cut{UINT32_MAX, 0, -HUGE_VALF};

    // Find the largest logit + noise among the kept tokens. It is above -4: the most likely token is kept,
    // has the shifted logit 0, and noise above -3.14. gumbel_near is off by 1e-5 and scores, up to 22.9, are
    // rounded by 1e-6: less than MARGIN.
    constexpr float MARGIN = 2e-5f;
    Score best{-4.0f, -1};
    Tally kept{0, 0};
    for (int32_t group = block.rank(); group * 4 < vocab; group += block.size()) {
        const Words noise = spec.temperature == 0 ? Words{} : philox(noise_key, group, position);
        for (int i = 0; i < 4; ++i) {
            const int32_t v = group * 4 + i;
            if (v >= vocab) break;
            const float own = shifted(v);
            if (cuts) {
                if (!cut.keeps(own - log_sum, v)) continue;
                kept = kept + Tally{mass_of(own - log_sum), 1};
            }
            const uint32_t word = noise.word[i];
            if (spec.temperature == 0) best = best.better({own, v});
            else if (own + gumbel_near(word) > best.value - MARGIN) best = best.better({own + gumbel(word), v});
        }
    }
    const int32_t token = block.winner(best).token;
    float kept_logmass = 0;
    if (cuts && block.sum(uint64_t{kept.count}) < static_cast<uint64_t>(vocab))
        kept_logmass = fminf(static_cast<float>(log(static_cast<double>(block.sum(kept.mass)) * 0x1p-60)), 0.0f);
    return {token, logprob(token), kept_logmass};
}

}  // namespace reason_rl
