// The native decode of one thread's sequences: each step runs the model on their newest tokens and samples
// the next ones. The order of operations and the roundings are those of reason_rl/model/transformer.py.
#pragma once

#include <algorithm>
#include <vector>

#include "../attention/rows.h"
#include "../common/gemm.h"
#include "../rms_norm/rows.h"
#include "../rope/rows.h"
#include "../swiglu/rows.h"
#include "model.h"

namespace reason_rl {

template <class T>
class Worker {
public:
    Worker(const ModelWeights<T>& model, const DecodeRows& rows, const SampleSpec& spec, T* keys, T* values, int64_t first,
           int64_t count)
        : model_(model), s_(model.sizes), rows_(rows), spec_(spec), keys_(keys), values_(values) {
        for (int64_t r = first; r < first + count; ++r) {
            rows_.num_new[r] = 0;
            if (rows_.limits[r]) active_.push_back(r);
        }
        // Sort sequences by prefix, so that `attend` reads the keys of a prefix once for all of them.
        const auto is_before = [&](int64_t a, int64_t b) { return rows_.prefix_index[a] < rows_.prefix_index[b]; };
        std::stable_sort(active_.begin(), active_.end(), is_before);
        // Scratch for all layers; `pairs` counts (sequence, expert) pairs.
        const int64_t pairs = count * s_.experts_per_tok, inner = std::max(s_.inner, s_.shared_inner);
        x_.resize(count * s_.hidden), normed_.resize(count * s_.hidden), added_.resize(count * s_.hidden);
        qkv_.resize(count * s_.qkv_rows()), attended_.resize(count * s_.heads * s_.head_dim);
        gathered_.resize(pairs * s_.hidden), outs_.resize(pairs * s_.hidden);
        gate_up_.resize(pairs * 2 * inner), act_.resize(pairs * inner);
        normed_f32_.resize(count * s_.hidden), logits_.resize(count * s_.experts), scores_.resize(s_.experts);
        expert_ids_.resize(pairs), expert_weights_.resize(pairs), pair_outs_.resize(pairs);
        pairs_.resize(pairs * (std::max({s_.hidden, inner, s_.heads * s_.head_dim}) + 1));
    }

    void run() {
        while (!active_.empty()) {
            embed();
            for (int64_t layer = 0; layer < static_cast<int64_t>(model_.layers.size()); ++layer) {
                attention(layer);
                mlp(layer);
            }
            sample_tokens();
        }
    }

private:
    int64_t num() const { return active_.size(); }
    // The number of own tokens of row r, including the newest.
    int64_t own_length(int64_t r) const { return rows_.own_lens[r] + rows_.num_new[r]; }
    int64_t position(int64_t r) const { return rows_.prefix_lens[rows_.prefix_index[r]] + own_length(r) - 1; }

    // y: T[num(), n] = x: T[num(), k] @ packed; the product of the `linear` op.
    void project(T* y, const T* x, const T* packed, int64_t n, int64_t k) {
        product(y, x, packed, num(), n, k, pairs_.data());
    }

    void norm(T* y, const T* x, const float* weight) {
        for (int64_t i = 0; i < num(); ++i) rms_norm_row(y + i * s_.hidden, x + i * s_.hidden, weight, s_.hidden, model_.eps);
    }

    // x += y in f32, rounded to T as torch rounds it (subnormal numbers kept): the residual stream.
    void add(T* x, const T* y) {
        const int64_t size = num() * s_.hidden;
        for (int64_t j = 0; j < size; j += LANES) store_as_torch(x + j, load(x + j, size - j) + load(y + j, size - j), size - j);
    }

    // x: T[num(), D] = the embedding of each sequence's newest token, rounded to T.
    void embed() {
        for (int64_t i = 0; i < num(); ++i) {
            const int64_t r = active_[i];
            const float* row = model_.embedding + rows_.tokens[r * (1 + rows_.max_new) + rows_.num_new[r]] * s_.hidden;
            T* x = x_.data() + i * s_.hidden;
            for (int64_t j = 0; j < s_.hidden; j += LANES) store_as_torch(x + j, load(row + j, s_.hidden - j), s_.hidden - j);
        }
    }

    // x += attention(norm(x)); the new keys and values go into the cache first.
    void attention(int64_t layer) {
        const LayerWeights<T>& w = model_.layers[layer];
        const int64_t c = s_.head_dim, head_size = rows_.num_blocks * BLOCK_SIZE * c;
        // [num(), D] -> [num(), (H + 2K) * C]: the heads of q, then k, then v.
        norm(normed_.data(), x_.data(), w.attention_norm);
        project(qkv_.data(), normed_.data(), w.qkv, s_.qkv_rows(), s_.hidden);
        T* keys = keys_ + layer * s_.kv_heads * head_size;
        T* values = values_ + layer * s_.kv_heads * head_size;
        for (int64_t i = 0; i < num(); ++i) {
            const int64_t r = active_[i], own = own_length(r) - 1;
            const float *cos = model_.cos + position(r) * (c / 2), *sin = model_.sin + position(r) * (c / 2);
            // Normalise and rotate the heads of q and k in place.
            T* heads = qkv_.data() + i * s_.qkv_rows();
            for (int64_t h = 0; h < s_.heads + s_.kv_heads; ++h) {
                const float* weight = h < s_.heads ? w.q_norm : w.k_norm;
                if (weight) rms_norm_row(heads + h * c, heads + h * c, weight, c, model_.eps);
                rope_row(heads + h * c, heads + h * c, cos, sin, c);
            }
            // Store k and v in the slot of the sequence's newest token.
            const int64_t slot = rows_.own_table[r * rows_.own_width + own / BLOCK_SIZE] * BLOCK_SIZE + own % BLOCK_SIZE;
            const T *k = heads + s_.heads * c, *v = k + s_.kv_heads * c;
            for (int64_t h = 0; h < s_.kv_heads; ++h)
                put_key(keys + h * head_size, values + h * head_size, slot, k + h * c, v + h * c, c);
        }
        // Attend in groups of sequences that share a prefix.
        for (int64_t first = 0; first < num();) {
            int64_t last = first + 1;
            while (last < num() && rows_.prefix_index[active_[last]] == rows_.prefix_index[active_[first]]) ++last;
            for (int64_t h = 0; h < s_.kv_heads; ++h) attend_group(first, last, h, keys + h * head_size, values + h * head_size);
            first = last;
        }
        project(added_.data(), attended_.data(), w.out, s_.hidden, s_.heads * c);
        add(x_.data(), added_.data());
    }

    // The query heads of kv head h for the rows [first, last), which share a prefix.
    void attend_group(int64_t first, int64_t last, int64_t h, const T* keys, const T* values) {
        const int64_t c = s_.head_dim, repeat = s_.heads / s_.kv_heads, prefix = rows_.prefix_index[active_[first]];
        q_.clear(), out_.clear(), own_.clear();
        for (int64_t i = first; i < last; ++i) {
            const int64_t r = active_[i];
            for (int64_t j = h * repeat; j < (h + 1) * repeat; ++j) {
                q_.push_back(qkv_.data() + i * s_.qkv_rows() + j * c);
                out_.push_back(attended_.data() + (i * s_.heads + j) * c);
                own_.push_back({keys, values, rows_.own_table + r * rows_.own_width, own_length(r)});
            }
        }
        const KeyBlocks<T> shared{keys, values, rows_.prefix_table + prefix * rows_.prefix_width, rows_.prefix_lens[prefix]};
        const float scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c)));
        attend<T>(q_.size(), q_.data(), out_.data(), shared, own_.data(), c, scale, nullptr, attend_scratch_);
    }

    // x += mlp(norm(x)), dense or a mixture of experts with an optional shared expert.
    void mlp(int64_t layer) {
        const LayerWeights<T>& w = model_.layers[layer];
        norm(normed_.data(), x_.data(), w.mlp_norm);
        if (s_.experts == 1) {
            dense(added_.data(), w.experts[0].gate_up, w.experts[0].down, s_.inner);
        } else {
            experts(w, layer);
            if (w.shared_gate_up) {
                dense(outs_.data(), w.shared_gate_up, w.shared_down, s_.shared_inner);
                add(added_.data(), outs_.data());
            }
        }
        add(x_.data(), added_.data());
    }

    // y: T[num(), D] = down(swiglu(gate_up(normed))).
    void dense(T* y, const T* gate_up, const T* down, int64_t inner) {
        project(gate_up_.data(), normed_.data(), gate_up, 2 * inner, s_.hidden);
        for (int64_t i = 0; i < num(); ++i) swiglu_row(act_.data() + i * inner, gate_up_.data() + i * 2 * inner, inner);
        project(y, act_.data(), down, s_.hidden, inner);
    }

    // added: T[num(), D] = the weighted sum of each row's experts.
    void experts(const LayerWeights<T>& w, int64_t layer) {
        const int64_t k = s_.experts_per_tok;
        RouteSpec spec = model_.route;
        spec.bias = w.expert_bias;
        // The router's product and scores are f32.
        const int64_t size = num() * s_.hidden;
        for (int64_t j = 0; j < size; j += LANES) store(normed_f32_.data() + j, load(normed_.data() + j, size - j), size - j);
        product<float>(logits_.data(), normed_f32_.data(), w.router, num(), s_.experts, s_.hidden, nullptr);
        for (int64_t i = 0; i < num(); ++i)
            route_row(logits_.data() + i * s_.experts, spec, expert_ids_.data() + i * k, expert_weights_.data() + i * k,
                      scores_.data());
        // Record the routes of the token that this step computes, for routing replay.
        for (int64_t i = 0; rows_.routed_expert_ids && i < num(); ++i) {
            const int64_t r = active_[i], computed = r * rows_.max_new + rows_.num_new[r], num_layers = model_.layers.size();
            std::copy_n(expert_ids_.data() + i * k, k, rows_.routed_expert_ids + (computed * num_layers + layer) * k);
        }
        // Run each expert on the rows that chose it, then combine in order of k.
        int64_t done = 0;
        for (int64_t e = 0; e < s_.experts; ++e) {
            const int64_t start = done;
            for (int64_t pair = 0; pair < num() * k; ++pair) {
                if (expert_ids_[pair] != e) continue;
                std::copy_n(normed_.data() + pair / k * s_.hidden, s_.hidden, gathered_.data() + done * s_.hidden);
                pair_outs_[pair] = outs_.data() + done * s_.hidden;
                ++done;
            }
            if (done > start)
                run_expert<T>(outs_.data() + start * s_.hidden, gathered_.data() + start * s_.hidden, done - start, w.experts[e],
                              s_.hidden, s_.inner, gate_up_.data(), act_.data());
        }
        for (int64_t i = 0; i < num(); ++i)
            combine_row<T>(added_.data() + i * s_.hidden, pair_outs_.data() + i * k, expert_weights_.data() + i * k, k, s_.hidden);
    }

    // Samples the next token of every active sequence. A stop id or the sequence's limit ends it.
    void sample_tokens() {
        // The noise depends on the sequence's key and the index of the new token among its own tokens.
        norm(normed_.data(), x_.data(), model_.norm);
        const int64_t n = num();
        noise_keys_.resize(n), positions_.resize(n), sampled_.resize(n), logprob_.resize(n), logmass_.resize(n);
        for (int64_t i = 0; i < n; ++i) noise_keys_[i] = rows_.noise_keys[active_[i]], positions_[i] = own_length(active_[i]);
        const int64_t bad = sample_rows<T>(normed_.data(), n, model_.head, s_.hidden, s_.vocab, spec_, noise_keys_.data(),
                                           positions_.data(), sampled_.data(), logprob_.data(), logmass_.data(), sample_scratch_);
        if (bad >= 0) fail_non_finite_row(active_[bad]);
        // Append the tokens.
        std::vector<int64_t> still_active;
        for (int64_t i = 0; i < n; ++i) {
            const int64_t r = active_[i], place = rows_.num_new[r]++;
            rows_.tokens[r * (1 + rows_.max_new) + 1 + place] = sampled_[i];
            rows_.logprobs[r * rows_.max_new + place] = logprob_[i];
            rows_.kept_logmass[r * rows_.max_new + place] = logmass_[i];
            const int64_t* stops = rows_.stop_ids;
            const bool is_end = std::find(stops, stops + rows_.num_stop_ids, sampled_[i]) != stops + rows_.num_stop_ids;
            if (!is_end && rows_.num_new[r] < rows_.limits[r]) still_active.push_back(r);
        }
        active_.swap(still_active);
    }

    const ModelWeights<T>& model_;
    const ModelSizes& s_;
    const DecodeRows& rows_;
    const SampleSpec& spec_;
    T *keys_, *values_;
    std::vector<int64_t> active_;
    std::vector<T> x_, normed_, added_, qkv_, attended_, gathered_, outs_, gate_up_, act_, pairs_;
    std::vector<float> normed_f32_, logits_, scores_, expert_weights_, logprob_, logmass_;
    std::vector<int64_t> expert_ids_, noise_keys_, positions_, sampled_;
    std::vector<const T*> pair_outs_, q_;
    std::vector<T*> out_;
    std::vector<KeyBlocks<T>> own_;
    AttendScratch attend_scratch_;
    SampleScratch sample_scratch_;
};

}  // namespace reason_rl
