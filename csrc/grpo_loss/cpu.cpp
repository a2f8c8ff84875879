// grpo_loss on the CPU: the loss, both gradients and all metrics in one pass over the tokens. The formulas
// are those of kernels/grpo_loss/reference.py, in the same order. Siblings: kernels/grpo_loss/,
// tests/kernels/test_grpo_loss*.py.
//
// Precision and order: a token is computed in f32; a sequence belongs to one task, which adds its f32 lanes
// to f64 sums every FLUSH tokens; the sequences' sums are added in order. The number of threads does not
// change any bit.
#include <array>
#include <cmath>

#include "../common/tensor.h"

namespace reason_rl {
namespace {

constexpr float MAX_LOG_RATIO = 20.0f, INFINITE = std::numeric_limits<float>::infinity();
constexpr int64_t FLUSH = 1024;

enum Surrogate { CLIP, CISPO, REINFORCE };
enum Estimator { K1, K2, K3 };
enum Importance { NONE, TIS, ICEPOP };
enum Normalizer { TOKEN, SEQUENCE, CONSTANT };

struct Spec {
    bool by_sequence;
    int64_t surrogate, estimator, importance, normalizer;
    float low, high, dual_clip, kl_coef, importance_low, importance_high, entropy_coef;
    int64_t num_sequences, total_tokens, total_sequences, constant_length;
};

struct Columns {  // f32[N] each; null if not given
    const float *logprobs, *old_logprobs, *advantages, *rollout_logprobs, *ref_logprobs, *entropy;
    float *dlogprobs, *dentropy;
};

// The metrics in the order of kernels/grpo_loss/function.py. Those before NUM_SUMS are sums, the others
// extremes.
enum Metric {
    LOSS, CLIP_LOW, CLIP_HIGH, CLIP_DUAL, CUT, TOKENS, APPROX_KL, W, W_SQUARED, KL, ENTROPY, NUM_SUMS,
    RATIO_MAX = NUM_SUMS, RATIO_MIN, GAP_MAX, NUM_METRICS
};
using Sums = std::array<double, NUM_METRICS>;

Sums no_sums() {
    Sums sums{};
    sums[RATIO_MAX] = sums[GAP_MAX] = -INFINITE, sums[RATIO_MIN] = INFINITE;
    return sums;
}
void add(Sums& sums, const Sums& more) {
    for (int i = 0; i < NUM_SUMS; ++i) sums[i] += more[i];
    sums[RATIO_MAX] = std::max(sums[RATIO_MAX], more[RATIO_MAX]), sums[RATIO_MIN] = std::min(sums[RATIO_MIN], more[RATIO_MIN]);
    sums[GAP_MAX] = std::max(sums[GAP_MAX], more[GAP_MAX]);
}

F32x16 capped(F32x16 x) { return select(x > MAX_LOG_RATIO, splat(MAX_LOG_RATIO), x); }  // keeps NaN
F32x16 one_where(I32x16 which) { return select(which, splat(1.0f), splat(0.0f)); }
F32x16 magnitude(F32x16 x) { return bits_of<F32x16>(bits_of<U32x16>(x) & 0x7fffffffu); }

// exp(d) - 1 - d; for |d| < 1 by its power series up to d^10, which avoids the cancellation.
F32x16 k3_of(F32x16 d) {
    F32x16 series = splat(1.0f / 3628800);
    for (float coefficient : {1.0f / 362880, 1.0f / 40320, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f})
        series = fma(series, d, splat(coefficient));
    return select(magnitude(d) < 1.0f, d * d * series, exp(d) - 1.0f - d);
}

struct SequenceConstants {  // the same for all tokens of a sequence
    float weight, mean_log_ratio, mean_mismatch;
};

// A token's loss and its derivative with respect to the logprob.
struct Term {
    F32x16 loss, slope;
};
// The surrogate of 16 tokens with advantages a. Adds to the clip metrics in m.
Term surrogate(const Spec& spec, F32x16 logprob, F32x16 log_ratio, F32x16 ratio, F32x16 a, std::array<F32x16, NUM_METRICS>& m) {
    const F32x16 minus = splat(0.0f) - a, zero = splat(0.0f);
    if (spec.surrogate == REINFORCE) return {minus * logprob, minus};
    const I32x16 is_low = ratio < spec.low, is_high = ratio > spec.high;
    const F32x16 clipped = select(is_low, splat(spec.low), select(is_high, splat(spec.high), ratio));
    // CISPO: the clipped ratio is a constant weight.
    if (spec.surrogate == CISPO) {
        m[CLIP_LOW] = m[CLIP_LOW] + one_where(is_low & (a != 0.0f)), m[CLIP_HIGH] = m[CLIP_HIGH] + one_where(is_high & (a != 0.0f));
        return {minus * clipped * logprob, minus * clipped};
    }
    // CLIP: the smaller of the two objectives, min(ratio * a, clip(ratio) * a).
    const F32x16 unclipped = ratio * a, bounded = clipped * a;
    F32x16 objective = select(unclipped <= bounded, unclipped, bounded);
    // Clipped tokens get a slope of 0. NaN compares false, so a NaN ratio gives a NaN slope.
    F32x16 slope = select((unclipped > bounded) | (log_ratio > MAX_LOG_RATIO), zero, unclipped);
    m[CLIP_LOW] = m[CLIP_LOW] + one_where(is_low & (a < 0.0f)), m[CLIP_HIGH] = m[CLIP_HIGH] + one_where(is_high & (a > 0.0f));
    // Dual clip: for a < 0 the objective is at least dual_clip * a.
    if (spec.dual_clip != 0.0f) {
        const F32x16 floor = a * spec.dual_clip;
        const I32x16 is_dual = (a < 0.0f) & (objective < floor);
        m[CLIP_DUAL] = m[CLIP_DUAL] + one_where(is_dual);
        objective = select(is_dual, floor, objective), slope = select(is_dual, zero, slope);
    }
    return {zero - objective, zero - slope};
}

// Tokens [i, i + n), n <= 16: writes their gradients and adds to the metrics in m.
void add_tokens(const Spec& spec, const Columns& c, const SequenceConstants& seq, int64_t i, int64_t n,
                std::array<F32x16, NUM_METRICS>& m) {
    const F32x16 zero = splat(0.0f), logprob = load(c.logprobs + i, n), old = load(c.old_logprobs + i, n);
    const I32x16 is_valid = lane_is_below(n);
    const F32x16 token_log_ratio = logprob - old, log_ratio = spec.by_sequence ? splat(seq.mean_log_ratio) : token_log_ratio;
    const F32x16 ratio = exp(capped(log_ratio));
    Term term = surrogate(spec, logprob, log_ratio, ratio, load(c.advantages + i, n), m);
    // Importance weight old / rollout of the sampler's mismatch, a constant: truncated (TIS) or masked
    // (ICEPOP).
    if (spec.importance != NONE) {
        const F32x16 w = exp(capped(spec.by_sequence ? splat(seq.mean_mismatch) : old - load(c.rollout_logprobs + i, n)));
        I32x16 is_cut = w > spec.importance_high;
        if (spec.importance == ICEPOP) is_cut = is_cut | (w < spec.importance_low);
        const F32x16 importance = select(is_cut, splat(spec.importance == TIS ? spec.importance_high : 0.0f), w);
        m[CUT] = m[CUT] + one_where(is_cut & is_valid);
        term = {term.loss * importance, term.slope * importance};
    }
    // KL to the reference policy: always measured as k3, penalised with the chosen estimator.
    if (c.ref_logprobs) {
        const F32x16 d = load(c.ref_logprobs + i, n) - logprob, d_capped = capped(d), k3 = k3_of(d_capped);
        m[KL] = m[KL] + k3;
        if (spec.kl_coef != 0.0f) {
            Term kl{k3, select(d > MAX_LOG_RATIO, zero, zero - k3 - d_capped)};
            if (spec.estimator == K1) kl = {zero - d, splat(1.0f)};
            if (spec.estimator == K2) kl = {d * d * 0.5f, zero - d};
            term = {term.loss + kl.loss * spec.kl_coef, term.slope + kl.slope * spec.kl_coef};
        }
    }
    // Entropy bonus.
    if (c.entropy) {
        const F32x16 entropy = load(c.entropy + i, n);
        m[ENTROPY] = m[ENTROPY] + entropy;
        if (spec.entropy_coef != 0.0f) {
            term.loss = term.loss - entropy * spec.entropy_coef;
            store(c.dentropy + i, splat(-spec.entropy_coef * seq.weight), n);
        }
    }
    // The gradient, the loss and the remaining metrics; lanes past n must not count.
    store(c.dlogprobs + i, term.slope * seq.weight, n);
    m[LOSS] = m[LOSS] + select(is_valid, term.loss * seq.weight, zero);
    const F32x16 gap = c.rollout_logprobs ? logprob - load(c.rollout_logprobs + i, n) : token_log_ratio;
    const F32x16 w = select(is_valid, exp(capped(gap)), zero);  // current / rollout policy
    m[W] = m[W] + w, m[W_SQUARED] = fma(w, w, m[W_SQUARED]);
    m[APPROX_KL] = m[APPROX_KL] + k3_of(capped(token_log_ratio));
    m[RATIO_MAX] = max(m[RATIO_MAX], select(is_valid, ratio, splat(-INFINITE)));
    m[RATIO_MIN] = min(m[RATIO_MIN], select(is_valid, ratio, splat(INFINITE)));
    m[GAP_MAX] = max(m[GAP_MAX], select(is_valid, magnitude(gap), splat(-INFINITE)));
}

// The mean of a - b over tokens [begin, end); the f32 sums of 16 are added in f64.
float mean_difference(const float* a, const float* b, int64_t begin, int64_t end) {
    double total = 0;
    for (int64_t i = begin; i < end; i += LANES) {
        const int64_t n = std::min<int64_t>(LANES, end - i);
        total += sum(load(a + i, n) - load(b + i, n));
    }
    return static_cast<float>(total / static_cast<double>(end - begin));
}

// All tokens [begin, end) of one sequence.
Sums add_sequence(const Spec& spec, const Columns& c, int64_t begin, int64_t end) {
    Sums sums = no_sums();
    if (begin == end) return sums;
    // The loss of a token is divided by the normalizer's denominator.
    double denominator = static_cast<double>(std::max<int64_t>(spec.total_tokens, 1));
    if (spec.normalizer == SEQUENCE) denominator = static_cast<double>(end - begin) * static_cast<double>(spec.total_sequences);
    if (spec.normalizer == CONSTANT)
        denominator = static_cast<double>(spec.total_sequences) * static_cast<double>(spec.constant_length);
    SequenceConstants seq{static_cast<float>(1 / denominator), 0.0f, 0.0f};
    if (spec.by_sequence) {
        seq.mean_log_ratio = mean_difference(c.logprobs, c.old_logprobs, begin, end);
        if (spec.importance != NONE) seq.mean_mismatch = mean_difference(c.old_logprobs, c.rollout_logprobs, begin, end);
    }
    // f32 lanes for FLUSH tokens, then f64.
    for (int64_t first = begin; first < end; first += FLUSH) {
        std::array<F32x16, NUM_METRICS> m;
        m.fill(splat(0.0f));
        m[RATIO_MAX] = m[GAP_MAX] = splat(-INFINITE), m[RATIO_MIN] = splat(INFINITE);
        const int64_t last = std::min(end, first + FLUSH);
        for (int64_t i = first; i < last; i += LANES) add_tokens(spec, c, seq, i, std::min<int64_t>(LANES, last - i), m);
        Sums block;
        for (int i = 0; i < NUM_SUMS; ++i) block[i] = sum(m[i]);
        block[TOKENS] = static_cast<double>(last - first);
        block[RATIO_MAX] = highest(m[RATIO_MAX]), block[RATIO_MIN] = -highest(splat(0.0f) - m[RATIO_MIN]);
        block[GAP_MAX] = highest(m[GAP_MAX]);
        add(sums, block);
    }
    return sums;
}

// The first token of each sequence, and the end of the last one. sequence_index must ascend; sequences may be
// empty.
template <class I>
std::vector<int64_t> sequence_starts(const char* op, const I* index, int64_t num_tokens, int64_t num_sequences) {
    std::vector<int64_t> starts(num_sequences + 1, num_tokens);
    int64_t next = 0;
    for (int64_t i = 0; i < num_tokens; ++i) {
        const int64_t sequence = index[i];
        RR_CHECK(sequence >= (next ? next - 1 : 0) && sequence < num_sequences, op, ": sequence_index must ascend within 0..",
                 num_sequences - 1, ", got ", sequence, " at token ", i, next ? " after " + std::to_string(next - 1) : "");
        while (next <= sequence) starts[next++] = i;
    }
    return starts;
}

const float* column(const char* op, const char* name, const std::optional<Tensor>& tensor, int64_t n, bool is_needed) {
    RR_CHECK(tensor.has_value() || !is_needed, op, ": ", name, " must be given for these choices, got None");
    return optional_data<const float>(op, name, tensor, {n});
}

Spec read_spec(const char* op, const std::vector<int64_t>& choices, const std::vector<int64_t>& counts,
               const std::vector<double>& numbers) {
    RR_CHECK(choices.size() == 5 && counts.size() == 4 && numbers.size() == 7, op,
             ": choices, counts and numbers must have 5, 4 and 7 entries, got ", choices.size(), ", ", counts.size(), " and ",
             numbers.size());
    for (size_t i = 0; i < 5; ++i)
        RR_CHECK(choices[i] >= 0 && choices[i] < (i ? 3 : 2), op, ": choices[", i, "] must be from 0 to ", i ? 2 : 1, ", got ",
                 choices[i]);
    const auto number = [&](size_t i) { return static_cast<float>(numbers[i]); };
    const Spec spec{choices[0] == 1, choices[1], choices[2], choices[3], choices[4], static_cast<float>(1 - numbers[0]),
                    static_cast<float>(1 + numbers[1]), number(2), number(3), number(4), number(5), number(6),
                    counts[0], counts[1], counts[2], counts[3]};
    RR_CHECK(spec.num_sequences >= 0 && spec.total_sequences >= spec.num_sequences, op,
             ": counts must have num_sequences in 0..total_sequences, got ", spec.num_sequences, " and ", spec.total_sequences);
    RR_CHECK(spec.normalizer != CONSTANT || spec.constant_length >= 1, op, ": counts must have constant_length >= 1, got ",
             spec.constant_length);
    return spec;
}

// loss: f32[]; metrics: f32[14]; dlogprobs: f32[N]; dentropy: f32[N], or f32[0] without entropy_coef;
// sequence_index: i32|i64[N]; the other tensors: f32[N]. read_spec decodes choices, counts and numbers.
void grpo_loss(Tensor loss, Tensor metrics, Tensor dlogprobs, Tensor dentropy, Tensor logprobs, Tensor old_logprobs,
               Tensor advantages, Tensor sequence_index, std::optional<Tensor> rollout_logprobs, std::optional<Tensor> ref_logprobs,
               std::optional<Tensor> entropy, std::vector<int64_t> choices, std::vector<int64_t> counts,
               std::vector<double> numbers) {
    const char* op = "grpo_loss";
    RR_CHECK(logprobs.dim() == 1, op, ": logprobs must be f32[N], got ", logprobs.dim(), " dimensions");
    const Spec spec = read_spec(op, choices, counts, numbers);
    const int64_t n = logprobs.size(0);
    Columns c{data<const float>(op, "logprobs", logprobs, {n}), data<const float>(op, "old_logprobs", old_logprobs, {n}),
              data<const float>(op, "advantages", advantages, {n}),
              column(op, "rollout_logprobs", rollout_logprobs, n, spec.importance != NONE),
              column(op, "ref_logprobs", ref_logprobs, n, spec.kl_coef != 0),
              column(op, "entropy", entropy, n, spec.entropy_coef != 0), data<float>(op, "dlogprobs", dlogprobs, {n}),
              data<float>(op, "dentropy", dentropy, {spec.entropy_coef != 0 ? n : 0})};
    float* total = data<float>(op, "loss", loss, {});
    float* measured = data<float>(op, "metrics", metrics, {NUM_METRICS});
    const std::vector<int64_t> starts = sequence_index.scalar_type() == ScalarType::Int
        ? sequence_starts(op, data<const int32_t>(op, "sequence_index", sequence_index, {n}), n, spec.num_sequences)
        : sequence_starts(op, data<const int64_t>(op, "sequence_index", sequence_index, {n}), n, spec.num_sequences);
    std::vector<Sums> by_sequence(spec.num_sequences);
    parallel_for(spec.num_sequences, [&](int64_t s) { by_sequence[s] = add_sequence(spec, c, starts[s], starts[s + 1]); });
    Sums sums = no_sums();
    for (const Sums& one : by_sequence) add(sums, one);
    // max and min drop NaN, the sums keep it: copy it to the extremes of the same tokens.
    if (std::isnan(sums[APPROX_KL])) sums[RATIO_MAX] = sums[RATIO_MIN] = sums[APPROX_KL];
    if (std::isnan(sums[W])) sums[GAP_MAX] = sums[W];
    for (int i = 0; i < NUM_METRICS; ++i) measured[i] = static_cast<float>(sums[i]);
    *total = measured[LOSS];
}

RR_REGISTER(m) {
    m.impl("grpo_loss", TORCH_BOX(&grpo_loss));
}

}  // namespace
}  // namespace reason_rl
