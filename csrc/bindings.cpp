// The schemas of the native ops on the CPU. Each op is implemented and registered in <op>/cpu.cpp or
// <op>/backward.cpp. sample_cuda, in a separate library, declares its schema in sample/cuda.cpp.
//
// An op writes into the tensors marked (x!), which the caller has allocated, and returns nothing: the ops
// allocate no tensors, and torch.compile sees every write.
//
// Letters, here and in all of csrc/:
//     T tokens of a pack      N loss tokens         V vocabulary           D model width
//     H query heads           K kv heads            C head dim             I expert (or MLP) width
//     E experts               k experts per token   S segments             L layers
//     R sequences in decode   P positions of the RoPE table
//     M, N, K in linear/ and common/gemm.h: the sizes of C [M, N] = A [M, K] @ B [K, N]
//     fp    f32 or bf16: the compute dtype of one call (the template parameter T of the code)
//     fp|f32    a weight stored in the compute dtype, or an f32 master weight that is rounded to it when packed
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(reason_rl, m) {
    // y = x @ weight^T. y: fp[M, N]; x: fp[M, K]; weight: fp|f32[N, K].
    m.def("linear_fwd(Tensor(a!) y, Tensor x, Tensor weight) -> ()");
    // dx = dy @ weight. dx: fp[M, K]; dy: fp[M, N].
    m.def("linear_dgrad(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()");
    // dweight = dy^T @ x, summed over the M rows in f32. dweight: f32[N, K].
    m.def("linear_wgrad(Tensor(a!) dweight, Tensor dy, Tensor x) -> ()");

    // Decodes up to tokens.size(1) - 1 tokens per sequence with the whole model; tokens[:, 0] is the newest
    // token so far.
    m.def("decode(Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!) kept_logmass, Tensor(d!) num_new, Tensor(e!) routes, "
          "Tensor(f!) keys, Tensor(g!) values, "
          "Tensor prefix_table, Tensor prefix_lens, Tensor prefix_index, Tensor own_table, Tensor own_lens, Tensor limits, "
          "Tensor noise_keys, Tensor stop_ids, Tensor[] weights, int[] sizes, float eps, float temperature, int top_k, "
          "float top_p, float min_p) -> ()");
    // Packs E weights for `decode` (csrc/common/gemm.h). packed: fp[E * packed_size]; weight: fp|f32[E, N,
    // K].
    m.def("pack_weight(Tensor(a!) packed, Tensor weight) -> ()");
    // Writes k, v: fp[T, K, C] into slots i64[T] of one layer's KV cache fp[K, num_blocks, 16, C], in
    // `decode`'s layout.
    m.def("store_keys(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor slots) -> ()");

    // y = x / sqrt(mean(x^2) + eps) * weight over the last dimension. x: fp[.., D] or fp[.., .., D], strided;
    // weight: f32[D].
    m.def("rms_norm_fwd(Tensor(a!) y, Tensor x, Tensor weight, float eps) -> ()");
    // dx: fp; dweight: f32[D], summed over the rows.
    m.def("rms_norm_bwd(Tensor(a!) dx, Tensor(b!) dweight, Tensor dy, Tensor x, Tensor weight, float eps) -> ()");
    // y = x with each pair (c, c + C/2) rotated by its token's angle. x: fp[T, H, C], strided; cos, sin:
    // f32[T, C/2].
    m.def("rope_fwd(Tensor(a!) y, Tensor x, Tensor cos, Tensor sin) -> ()");
    // dx = dy rotated back.
    m.def("rope_bwd(Tensor(a!) dx, Tensor dy, Tensor cos, Tensor sin) -> ()");
    // logprob of target_ids i64[N] and entropy, f32[N], of softmax(hidden @ weight^T / temperature). hidden:
    // fp[N, D]; weight: fp|f32[V, D]; stats: f32[N, 2]: a row's largest logit m, and log(sum(exp(logit -
    // m))).
    m.def("linear_logprob_fwd(Tensor(a!) logprob, Tensor(b!) entropy, Tensor(c!) stats, Tensor hidden, Tensor weight, "
          "Tensor target_ids, float temperature) -> ()");
    // dhidden: fp[N, D]; dweight: f32[V, D]. The logits are recomputed.
    m.def("linear_logprob_bwd(Tensor(a!) dhidden, Tensor(b!) dweight, Tensor dlogprob, Tensor dentropy, Tensor hidden, "
          "Tensor weight, Tensor target_ids, Tensor stats, Tensor entropy, float temperature) -> ()");
    // Samples a token i64[R] for each row of hidden fp[R, D] by Gumbel-max; the noise depends on (keys,
    // positions), i64[R]. logprob, kept_logmass: f32[R], the latter the log of the probability that the cuts
    // keep; weight: fp|f32[V, D].
    m.def("sample(Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) kept_logmass, Tensor hidden, Tensor weight, Tensor keys, "
          "Tensor positions, float temperature, int top_k, float top_p, float min_p) -> ()");
    // loss: f32[]; its gradients: f32[N]; metrics: f32[14], named and ordered in
    // kernels/grpo_loss/function.py.
    m.def("grpo_loss(Tensor(a!) loss, Tensor(b!) metrics, Tensor(c!) dlogprobs, Tensor(d!) dentropy, Tensor logprobs, "
          "Tensor old_logprobs, Tensor advantages, Tensor sequence_index, Tensor? rollout_logprobs, Tensor? ref_logprobs, "
          "Tensor? entropy, int[] choices, int[] counts, float[] numbers) -> ()");

    // y = silu(gate) * up. y: fp[T, I]; gate_up: fp[T, 2I], the gate first.
    m.def("swiglu_fwd(Tensor(a!) y, Tensor gate_up) -> ()");
    // dgate_up: fp[T, 2I]; dy: fp[T, I]. The exponentials are recomputed.
    m.def("swiglu_bwd(Tensor(a!) dgate_up, Tensor dy, Tensor gate_up) -> ()");
    // The router: expert_ids i64[T, k], weights f32[T, k] and scores f32[T, E] of logits f32[T, E]. bias
    // f32[E] changes which experts are chosen, not their weights.
    m.def("moe_route_fwd(Tensor(a!) expert_ids, Tensor(b!) weights, Tensor(c!) scores, Tensor logits, Tensor? bias, bool sigmoid, "
          "bool normalize) -> ()");
    // dlogits: f32[T, E] from dweights f32[T, k] and dscores f32[T, E]; a missing gradient counts as zero.
    m.def("moe_route_bwd(Tensor(a!) dlogits, Tensor? dweights, Tensor? dscores, Tensor expert_ids, Tensor scores, bool sigmoid, "
          "bool normalize) -> ()");
    // y: fp[T, D] = the weighted sum of each token's experts, in order of k. x: fp[T, D]; gate_up: fp|f32[E,
    // 2I, D]; down: fp|f32[E, D, I]; kept: fp[T * k, 2I], the gate_up outputs sorted by expert, for backward;
    // [0, 2I]: not saved.
    m.def("moe_experts_fwd(Tensor(a!) y, Tensor(b!) kept, Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, "
          "Tensor weights) -> ()");
    // dx: fp[T, D]; dgate_up, ddown, dweights: f32.
    m.def("moe_experts_bwd(Tensor(a!) dx, Tensor(b!) dgate_up, Tensor(c!) ddown, Tensor(d!) dweights, Tensor dy, Tensor kept, "
          "Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights) -> ()");

    // Causal attention over a pack. out, q: fp[T, H, C]; k, v: fp[T, K, C]; segments: i32[S, 4], each attends
    // to its prefix too; stats: f32[K, T, H / K, 2]: a row's highest score, and the sum of exp(score -
    // highest).
    m.def("attention_fwd(Tensor(a!) out, Tensor(b!) stats, Tensor q, Tensor k, Tensor v, Tensor segments, float scale) -> ()");
    // dq, dk, dv of dout: fp[T, H, C]. The weights are recomputed from stats; dk and dv of a shared prefix
    // sum over the segments that read it.
    m.def("attention_bwd(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dout, Tensor out, Tensor stats, Tensor q, Tensor k, "
          "Tensor v, Tensor segments, float scale) -> ()");
    // Decode attention. out, q: fp[R, H, C]; caches: fp[K, num_blocks, 16, C]. Row r attends to prefix
    // prefix_index[r], then to its own keys; the block tables and lengths are i64.
    m.def("paged_attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_table, Tensor prefix_lens, "
          "Tensor prefix_index, Tensor own_table, Tensor own_lens, float scale) -> ()");
}
