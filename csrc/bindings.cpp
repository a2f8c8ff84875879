// The list of native ops: each schema with one line of purpose. The functions stand in <op>/cpu.cpp and register themselves.
//
// Ops write into tensors marked (x!) that the caller made, and return nothing: no allocation here, and torch.compile sees the writes.
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(reason_rl, m) {
    // y = x @ weight^T: x [M, K] f32|bf16, weight [N, K] in x's dtype or f32 (then rounded to it).
    m.def("linear_fwd(Tensor(a!) y, Tensor x, Tensor weight) -> ()");
    // dx = dy @ weight.
    m.def("linear_dgrad(Tensor(a!) dx, Tensor dy, Tensor weight) -> ()");
    // dweight = dy^T @ x, summed over the rows in f32 whatever x's dtype; dweight f32.
    m.def("linear_wgrad(Tensor(a!) dweight, Tensor dy, Tensor x) -> ()");
}
