// The list of native ops: each schema with one line of purpose. The functions stand in <op>/cpu.cpp and register themselves.
//
// Ops write into tensors marked (x!) that the caller made, and return nothing: no allocation here, and torch.compile sees the
// writes.
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(reason_rl, m) {
    // y = x @ weight^T: x [M, K] f32|bf16, weight [N, K] in x's dtype or f32 (then rounded to it).
    m.def("linear_fwd(Tensor(a!) y, Tensor x, Tensor weight) -> ()");
    // dx = dy @ weight.
    m.def("linear_dgrad(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()");
    // dweight = dy^T @ x, summed over the rows in f32 whatever x's dtype; dweight f32.
    m.def("linear_wgrad(Tensor(a!) dweight, Tensor dy, Tensor x) -> ()");

    // Up to tokens.size(1) - 1 new tokens for each running sequence, the whole model in one call; tokens[:, 0] is the newest.
    m.def("decode(Tensor(a!) tokens, Tensor(b!) logprobs, Tensor(c!) kept_logmass, Tensor(d!) num_new, Tensor(e!) routes, "
          "Tensor(f!) keys, Tensor(g!) values, "
          "Tensor prefix_table, Tensor prefix_lens, Tensor prefix_index, Tensor own_table, Tensor own_lens, Tensor limits, "
          "Tensor noise_keys, Tensor stop_ids, Tensor[] weights, int[] sizes, float eps, float temperature, int top_k, "
          "float top_p, float min_p) -> ()");
    // weight [E, N, K], f32 or in packed's dtype, as E packed matrices (csrc/common/gemm.h) for `decode`.
    m.def("pack_weight(Tensor(a!) packed, Tensor weight) -> ()");
    // k and v [T, K, C] of T tokens into slots [T] of one layer's cache [K, num_blocks, 16, C], laid out as `decode` reads it.
    m.def("store_keys(Tensor(a!) keys, Tensor(b!) values, Tensor k, Tensor v, Tensor slots) -> ()");

    // y = x / sqrt(mean(x^2) + eps) * weight over the last dimension; x [.., D] or [.., .., D], rows where they lie; weight f32.
    m.def("rms_norm_fwd(Tensor(a!) y, Tensor x, Tensor weight, float eps) -> ()");
    // dweight f32[D], summed over the rows in blocks.
    m.def("rms_norm_bwd(Tensor(a!) dx, Tensor(b!) dweight, Tensor dy, Tensor x, Tensor weight, float eps) -> ()");
    // y = x [T, H, C], rows where they lie, with each pair turned by its token's angle; cos, sin f32[T, C/2].
    m.def("rope_fwd(Tensor(a!) y, Tensor x, Tensor cos, Tensor sin) -> ()");
    // The same, turned back.
    m.def("rope_bwd(Tensor(a!) dx, Tensor dy, Tensor cos, Tensor sin) -> ()");
    // logprob, entropy f32[N] of hidden [N, D] @ weight [V, D]^T; stats f32[N, 2]: the largest logit, the log of the sum less it.
    m.def("linear_logprob_fwd(Tensor(a!) logprob, Tensor(b!) entropy, Tensor(c!) stats, Tensor hidden, Tensor weight, "
          "Tensor target_ids, float temperature) -> ()");
    // dhidden in hidden's dtype, dweight f32; the logits are computed again.
    m.def("linear_logprob_bwd(Tensor(a!) dhidden, Tensor(b!) dweight, Tensor dlogprob, Tensor dentropy, Tensor hidden, "
          "Tensor weight, Tensor target_ids, Tensor stats, Tensor entropy, float temperature) -> ()");
    // A token for each row of hidden [R, D], by Gumbel-max with noise keyed by (keys, positions); logprob, log of the kept mass.
    m.def("sample(Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) kept_logmass, Tensor hidden, Tensor weight, Tensor keys, "
          "Tensor positions, float temperature, int top_k, float top_p, float min_p) -> ()");
    // loss f32[], its gradients f32[N], and the metrics f32[14]: kernels/grpo_loss/function.py has their names and the order.
    m.def("grpo_loss(Tensor(a!) loss, Tensor(b!) metrics, Tensor(c!) dlogprobs, Tensor(d!) dentropy, Tensor logprobs, "
          "Tensor old_logprobs, Tensor advantages, Tensor sequence_index, Tensor? rollout_logprobs, Tensor? ref_logprobs, "
          "Tensor? entropy, int[] choices, int[] counts, float[] numbers) -> ()");

    // y = silu(gate) * up of gate_up [T, 2I].
    m.def("swiglu_fwd(Tensor(a!) y, Tensor gate_up) -> ()");
    // dgate_up, the exponentials computed anew.
    m.def("swiglu_bwd(Tensor(a!) dgate_up, Tensor dy, Tensor gate_up) -> ()");
    // expert_ids i64[T, k], weights f32[T, k] and scores f32[T, E] of logits f32[T, E]; bias f32[E] steers the choice only.
    m.def("moe_route_fwd(Tensor(a!) expert_ids, Tensor(b!) weights, Tensor(c!) scores, Tensor logits, Tensor? bias, bool sigmoid, "
          "bool normalize) -> ()");
    // dlogits from the gradients of weights and scores, either of which may be missing.
    m.def("moe_route_bwd(Tensor(a!) dlogits, Tensor? dweights, Tensor? dscores, Tensor expert_ids, Tensor scores, bool sigmoid, "
          "bool normalize) -> ()");
    // y [T, D] = each token's experts, weighted, in order of k; gate_up [E, 2I, D] and down [E, D, I] in x's dtype or f32.
    // kept: the gate_up outputs [T * k, 2I], expert by expert, for the backward pass; [0, 2I] where there is none.
    m.def("moe_experts_fwd(Tensor(a!) y, Tensor(b!) kept, Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, "
          "Tensor weights) -> ()");
    // The gradients of all that is real: dx in x's dtype, the others f32.
    m.def("moe_experts_bwd(Tensor(a!) dx, Tensor(b!) dgate_up, Tensor(c!) ddown, Tensor(d!) dweights, Tensor dy, Tensor kept, "
          "Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights) -> ()");

    // Causal attention of q [T, H, C] over k, v [T, K, C] in segments i32[S, 4], each after its prefix; stats f32[K, T, H / K, 2]:
    // a row's highest score, and the sum of exp(score - highest).
    m.def("attention_fwd(Tensor(a!) out, Tensor(b!) stats, Tensor q, Tensor k, Tensor v, Tensor segments, float scale) -> ()");
    // dq, dk, dv of dout [T, H, C], the weights computed again from stats; dk and dv of a shared prefix are sums over its readers.
    m.def("attention_bwd(Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor dout, Tensor out, Tensor stats, Tensor q, Tensor k, "
          "Tensor v, Tensor segments, float scale) -> ()");
    // Decoding rows q [R, H, C] over caches [K, num_blocks, 16, C]: row r reads prefix prefix_index[r], then its own keys.
    m.def("paged_attention(Tensor(a!) out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_table, Tensor prefix_lens, "
          "Tensor prefix_index, Tensor own_table, Tensor own_lens, float scale) -> ()");
}
