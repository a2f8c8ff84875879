// The engine's native decode on the CPU: several tokens for each running sequence in one call, with the whole
// model inside. It is not an op with a reference: its specification is reason_rl/model/transformer.py,
// decoded op by op by the engine. tests/reason_rl/engine/test_decoders.py checks that both give the same
// bits.
//
// Each thread takes some of the sequences through all layers and all steps and never waits for other threads,
// because sequences do not read each other. It calls the row functions of the training ops (<op>/rows.h),
// whose results do not depend on the batch, so that the recorded logprobs equal the trainer's.
//
// Supported, and nothing else:
//     layers      pre-norm, RMSNorm with one eps for the whole model
//     attention   causal over all earlier tokens, scale 1 / sqrt(C), C even and at most 256; a qkv matrix
//                 without bias; optionally RMSNorm on each head of q and k
//     positions   RoPE on the whole head dim, by a table of angles
//     mlp         SwiGLU in every layer, or in every layer E experts of equal size: a softmax or sigmoid router,
//                 optional normalisation of the weights, expert_bias, an ungated shared expert
//     dtypes      f32, or bf16 with f32 norms, router and embedding
//     sampling    greedy, temperature, top_k, top_p, min_p
// The caller (reason_rl/engine) must refuse every other model, because most differences do not show in the
// arguments: attention biases, norms over all heads at once, partial rotary dims, sliding windows, dense
// layers among MoE layers, a routed_scaling_factor, projections by torch's GEMM.
//
// Siblings: model.h and worker.h here; reason_rl/engine/native_decode.py, which packs the weights in the
// order of read_layer and read_model; tests/reason_rl/engine/test_native_decode.py.
#include <cmath>

#include "../common/pack.h"
#include "../common/tensor.h"
#include "../sample/check.h"
#include "worker.h"

namespace reason_rl {
namespace {

constexpr int64_t TENSORS_PER_LAYER = 12, TENSORS_AFTER = 4, NUM_SIZES = 12;
constexpr int64_t SEQUENCES_PER_TASK = 64;  // at most: their activations stay in the second-level cache
constexpr int64_t MAX_SIZE = 1 << 20;       // of the sizes that are multiplied: their products fit 64 bits

// The weights are a list of tensors, in which an empty tensor is a missing one.
std::optional<Tensor> if_any(const Tensor& tensor) { return tensor.numel() ? std::optional(tensor) : std::nullopt; }

// The memory of `count` packed matrices [n, k].
template <class T>
const T* packed(const char* op, const char* name, const Tensor& tensor, int64_t count, int64_t n, int64_t k) {
    return data<const T>(op, name, tensor, {count * packed_size<T>(n, k)});
}

template <class T>
LayerWeights<T> read_layer(const char* op, const ModelSizes& s, const Tensor* t) {
    // Attention.
    LayerWeights<T> layer;
    layer.attention_norm = data<const float>(op, "attention_norm", t[0], {s.hidden});
    layer.qkv = packed<T>(op, "qkv", t[1], 1, s.qkv_rows(), s.hidden);
    layer.q_norm = optional_data<const float>(op, "q_norm", if_any(t[2]), {s.head_dim});
    layer.k_norm = optional_data<const float>(op, "k_norm", if_any(t[3]), {s.head_dim});
    layer.out = packed<T>(op, "out", t[4], 1, s.hidden, s.heads * s.head_dim);
    // The MLP or the experts, which are packed one after the other.
    layer.mlp_norm = data<const float>(op, "mlp_norm", t[5], {s.hidden});
    layer.router = s.experts > 1 ? packed<float>(op, "router", t[6], 1, s.experts, s.hidden) : nullptr;
    const T* gate_up = packed<T>(op, "gate_up", t[7], s.experts, 2 * s.inner, s.hidden);
    const T* down = packed<T>(op, "down", t[8], s.experts, s.hidden, s.inner);
    const int64_t up_size = packed_size<T>(2 * s.inner, s.hidden), down_size = packed_size<T>(s.hidden, s.inner);
    for (int64_t e = 0; e < s.experts; ++e) layer.experts.push_back({gate_up + e * up_size, down + e * down_size});
    layer.expert_bias = optional_data<const float>(op, "expert_bias", if_any(t[9]), {s.experts});
    // The shared expert.
    const bool is_shared = s.shared_inner > 0;
    layer.shared_gate_up = is_shared ? packed<T>(op, "shared_gate_up", t[10], 1, 2 * s.shared_inner, s.hidden) : nullptr;
    layer.shared_down = is_shared ? packed<T>(op, "shared_down", t[11], 1, s.hidden, s.shared_inner) : nullptr;
    return layer;
}

ModelSizes read_sizes(const char* op, const std::vector<int64_t>& sizes) {
    RR_CHECK(sizes.size() == NUM_SIZES, op, ": sizes must hold ", NUM_SIZES, " numbers, got ", sizes.size());
    for (size_t i = 0; i < sizes.size(); ++i) {
        // The first eight are multiplied with each other. The last four are dimensions of existing tensors,
        // or flags.
        const int64_t most = i < 8 ? MAX_SIZE : INT64_MAX;
        RR_CHECK(sizes[i] >= 0 && sizes[i] <= most, op, ": sizes[", i, "] must be in 0..", most, ", got ", sizes[i]);
    }
    const ModelSizes s{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], sizes[8], sizes[9]};
    RR_CHECK(s.hidden && s.experts && s.inner && s.vocab, op,
             ": hidden size, experts, inner size and vocabulary must be above 0, got ", s.hidden, ", ", s.experts, ", ",
             s.inner, ", ", s.vocab);
    RR_CHECK(s.kv_heads && s.heads % s.kv_heads == 0, op, ": heads must be a multiple of kv heads, got ", s.heads, " and ",
             s.kv_heads);
    RR_CHECK(s.head_dim && s.head_dim % 2 == 0 && s.head_dim <= MAX_HEAD_DIM, op, ": the head dim must be even and in 2..",
             MAX_HEAD_DIM, ", got ", s.head_dim);
    RR_CHECK(s.experts_per_tok >= 1 && s.experts_per_tok <= s.experts, op, ": experts per token must be in 1..", s.experts,
             ", got ", s.experts_per_tok);
    return s;
}

template <class T>
ModelWeights<T> read_model(const char* op, const std::vector<Tensor>& t, const std::vector<int64_t>& sizes, double eps) {
    ModelWeights<T> model;
    model.sizes = read_sizes(op, sizes);
    const ModelSizes& s = model.sizes;
    // The layers, TENSORS_PER_LAYER tensors each.
    const int64_t num_layers = (static_cast<int64_t>(t.size()) - TENSORS_AFTER) / TENSORS_PER_LAYER;
    RR_CHECK(num_layers * TENSORS_PER_LAYER + TENSORS_AFTER == static_cast<int64_t>(t.size()), op, ": weights must hold ",
             TENSORS_PER_LAYER, " tensors a layer and ", TENSORS_AFTER, " more, got ", t.size());
    for (int64_t i = 0; i < num_layers; ++i) model.layers.push_back(read_layer<T>(op, s, t.data() + i * TENSORS_PER_LAYER));
    // The embedding, the last norm, the head and the table of angles.
    const Tensor* after = t.data() + num_layers * TENSORS_PER_LAYER;
    model.embedding = data<const float>(op, "embedding", after[0], {s.vocab, s.hidden});
    model.norm = data<const float>(op, "norm", after[1], {s.hidden});
    model.head = packed<T>(op, "head", after[2], 1, s.vocab, s.hidden);
    model.cos = data<const float>(op, "rope", after[3], {2, s.max_positions, s.head_dim / 2});
    model.sin = model.cos + s.max_positions * (s.head_dim / 2);
    model.route = {s.experts, s.experts_per_tok, sizes[10] != 0, sizes[11] != 0, nullptr};
    model.eps = static_cast<float>(eps);
    return model;
}

void check_in(const char* op, const char* name, const int64_t* values, int64_t count, int64_t low, int64_t high) {
    for (int64_t i = 0; i < count; ++i)
        RR_CHECK(values[i] >= low && values[i] <= high, op, ": ", name, " must be in ", low, "..", high, ", got ", values[i],
                 " at ", i);
}

// The number of own keys that row r has after its last step.
int64_t last_length(const DecodeRows& rows, int64_t r) { return rows.own_lens[r] + std::max<int64_t>(rows.limits[r], 1) - 1; }

// A row writes keys into its own blocks, so no prefix and no other row may hold them. Call this last: it
// indexes with the ids that check_rows has checked.
void check_own_blocks(const char* op, const DecodeRows& rows, int64_t num_prefixes) {
    std::vector<bool> is_taken(rows.num_blocks);
    for (int64_t p = 0; p < num_prefixes; ++p)
        for (int64_t b = 0; b * BLOCK_SIZE < rows.prefix_lens[p]; ++b)
            is_taken[rows.prefix_table[p * rows.prefix_width + b]] = true;
    for (int64_t r = 0; r < rows.count; ++r)
        for (int64_t b = 0; b * BLOCK_SIZE < last_length(rows, r); ++b) {
            const int64_t block = rows.own_table[r * rows.own_width + b];
            RR_CHECK(!is_taken[block], op, ": own_table[", r, ", ", b, "] must be a block of this row alone, got ", block,
                     ", which a prefix or another place of own_table has too");
            is_taken[block] = true;
        }
}

// Checks every index through which memory is read or written.
void check_rows(const char* op, const DecodeRows& rows, const ModelSizes& s, int64_t num_prefixes) {
    check_in(op, "prefix_table", rows.prefix_table, num_prefixes * rows.prefix_width, 0, rows.num_blocks - 1);
    check_in(op, "prefix_lens", rows.prefix_lens, num_prefixes, 0, rows.prefix_width * BLOCK_SIZE);
    check_in(op, "prefix_index", rows.prefix_index, rows.count, 0, num_prefixes - 1);
    check_in(op, "own_table", rows.own_table, rows.count * rows.own_width, 0, rows.num_blocks - 1);
    check_in(op, "own_lens", rows.own_lens, rows.count, 1, rows.own_width * BLOCK_SIZE);
    check_in(op, "limits", rows.limits, rows.count, 0, rows.max_new);
    for (int64_t r = 0; r < rows.count; ++r) {
        check_in(op, "tokens", rows.tokens + r * (1 + rows.max_new), 1, 0, s.vocab - 1);
        const int64_t last = last_length(rows, r);
        RR_CHECK(last <= rows.own_width * BLOCK_SIZE, op, ": own_lens[", r, "] = ", rows.own_lens[r], " and limits[", r, "] = ",
                 rows.limits[r], " do not fit own_table of ", rows.own_width, " blocks of ", BLOCK_SIZE);
        const int64_t position = rows.prefix_lens[rows.prefix_index[r]] + last - 1;
        RR_CHECK(position < s.max_positions, op, ": row ", r, " would reach position ", position, " of ", s.max_positions);
    }
    check_own_blocks(op, rows, num_prefixes);
}

// tokens: i64[R, 1 + M] for up to M new tokens; logprobs, kept_logmass: f32[R, M]; num_new: i64[R]; routes:
// i32[R, M, L, k], or empty if not needed; keys, values: fp[L, K, num_blocks, 16, C]; prefix_table: i64[B,
// ..], prefix_lens: i64[B] for B prefixes; prefix_index, own_lens, limits, noise_keys: i64[R]; own_table:
// i64[R, ..]; stop_ids: i64[..]. M is at least 1; limits[r] is at most M.
void decode(Tensor tokens, Tensor logprobs, Tensor kept_logmass, Tensor num_new, Tensor routes, Tensor keys, Tensor values,
            Tensor prefix_table, Tensor prefix_lens, Tensor prefix_index, Tensor own_table, Tensor own_lens, Tensor limits,
            Tensor noise_keys, Tensor stop_ids, std::vector<Tensor> weights, std::vector<int64_t> sizes, double eps,
            double temperature, int64_t top_k, double top_p, double min_p) {
    const char* op = "decode";
    RR_CHECK(tokens.dim() == 2 && tokens.size(1) >= 2, op, ": tokens must be i64[R, 1 + new tokens], got ", tokens.dim(),
             " dimensions");
    RR_CHECK(prefix_table.dim() == 2 && own_table.dim() == 2 && keys.dim() == 5 && stop_ids.dim() == 1, op,
             ": prefix_table, own_table, keys, stop_ids must have 2, 2, 5, 1 dimensions, got ", prefix_table.dim(), ", ",
             own_table.dim(), ", ", keys.dim(), ", ", stop_ids.dim());
    check_sampling(op, temperature, top_k, top_p, min_p);
    const int64_t count = tokens.size(0), max_new = tokens.size(1) - 1, num_prefixes = prefix_table.size(0);
    const auto indices = [op](const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
        return data<const int64_t>(op, name, tensor, shape);
    };
    DecodeRows rows{
        .count = count, .num_blocks = keys.size(2), .prefix_width = prefix_table.size(1), .own_width = own_table.size(1),
        .max_new = max_new,
        .prefix_table = indices("prefix_table", prefix_table, {num_prefixes, ANY}),
        .prefix_lens = indices("prefix_lens", prefix_lens, {num_prefixes}),
        .prefix_index = indices("prefix_index", prefix_index, {count}),
        .own_table = indices("own_table", own_table, {count, ANY}), .own_lens = indices("own_lens", own_lens, {count}),
        .limits = indices("limits", limits, {count}), .noise_keys = indices("noise_keys", noise_keys, {count}),
        .stop_ids = indices("stop_ids", stop_ids, {ANY}), .num_stop_ids = stop_ids.numel(),
        .tokens = data<int64_t>(op, "tokens", tokens, {count, ANY}),
        .logprobs = data<float>(op, "logprobs", logprobs, {count, max_new}),
        .kept_logmass = data<float>(op, "kept_logmass", kept_logmass, {count, max_new}),
        .num_new = data<int64_t>(op, "num_new", num_new, {count}), .routed_expert_ids = nullptr};
    by_dtype(op, "keys", keys, [&](auto zero) {
        using T = decltype(zero);
        const ModelWeights<T> model = read_model<T>(op, weights, sizes, eps);
        const ModelSizes& s = model.sizes;
        check_rows(op, rows, s, num_prefixes);
        const int64_t num_layers = model.layers.size();
        if (routes.numel())
            rows.routed_expert_ids = data<int32_t>(op, "routes", routes, {count, max_new, num_layers, s.experts_per_tok});
        T* k = data<T>(op, "keys", keys, {num_layers, s.kv_heads, rows.num_blocks, BLOCK_SIZE, s.head_dim});
        T* v = data<T>(op, "values", values, {num_layers, s.kv_heads, rows.num_blocks, BLOCK_SIZE, s.head_dim});
        const SampleSpec spec{temperature, top_k, top_p, min_p};
        parallel_blocks(count, items_per_task(count, 1, SEQUENCES_PER_TASK), [&](int64_t first, int64_t num) {
            Worker<T>(model, rows, spec, k, v, first, num).run();
        });
    });
}

// packed: fp[E * packed_size(N, K)]; weight: fp|f32[E, N, K].
void pack_weight(Tensor packed_weight, Tensor weight) {
    const char* op = "pack_weight";
    RR_CHECK(weight.dim() == 3, op, ": weight must be [E, N, K], got ", weight.dim(), " dimensions");
    const int64_t count = weight.size(0), n = weight.size(1), k = weight.size(2);
    by_dtype(op, "packed", packed_weight, [&](auto zero) {
        using T = decltype(zero);
        T* place = data<T>(op, "packed", packed_weight, {count * packed_size<T>(n, k)});
        by_master<T>(op, "weight", weight, {count, n, k},
                     [&](const auto* matrices) { pack_matrices<true>(place, matrices, count, n, k); });
    });
}

// keys, values: fp[K, num_blocks, 16, C], one layer's cache; k, v: fp[T, K, C]; slots: i64[T].
void store_keys(Tensor keys, Tensor values, Tensor k, Tensor v, Tensor slots) {
    const char* op = "store_keys";
    RR_CHECK(k.dim() == 3 && keys.dim() == 4, op, ": k and keys must have 3 and 4 dimensions, got ", k.dim(), " and ", keys.dim());
    const int64_t tokens = k.size(0), heads = k.size(1), head_dim = k.size(2), num_blocks = keys.size(1);
    RR_CHECK(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= MAX_HEAD_DIM, op, ": k's head dim must be even and in 2..",
             MAX_HEAD_DIM, ", got ", head_dim);
    // A slot is block * 16 + position in the block.
    const int64_t* place = data<const int64_t>(op, "slots", slots, {tokens});
    check_in(op, "slots", place, tokens, 0, num_blocks * BLOCK_SIZE - 1);
    by_dtype(op, "k", k, [&](auto zero) {
        using T = decltype(zero);
        const T* from_k = data<const T>(op, "k", k, {tokens, heads, head_dim});
        const T* from_v = data<const T>(op, "v", v, {tokens, heads, head_dim});
        T* to_k = data<T>(op, "keys", keys, {heads, num_blocks, BLOCK_SIZE, head_dim});
        T* to_v = data<T>(op, "values", values, {heads, num_blocks, BLOCK_SIZE, head_dim});
        parallel_for(heads, [&](int64_t h) {
            const int64_t head = h * num_blocks * BLOCK_SIZE * head_dim;
            for (int64_t t = 0; t < tokens; ++t) {
                const int64_t from = (t * heads + h) * head_dim;
                put_key(to_k + head, to_v + head, place[t], from_k + from, from_v + from, head_dim);
            }
        });
    });
}

RR_REGISTER(m) {
    m.impl("decode", TORCH_BOX(&decode));
    m.impl("pack_weight", TORCH_BOX(&pack_weight));
    m.impl("store_keys", TORCH_BOX(&store_keys));
}

}  // namespace
}  // namespace reason_rl
