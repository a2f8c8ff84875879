// swiglu on the CPU, forward and backward. Siblings: rows.h, kernels/swiglu/, tests/kernels/test_swiglu.py.
#include "../common/tensor.h"
#include "rows.h"

namespace reason_rl {
namespace {

// Rows per task: about 8192 elements of y, so that a task is worth starting.
int64_t rows_per_task(int64_t inner) { return std::max<int64_t>(1, 8192 / std::max<int64_t>(inner, 1)); }

// y: fp[T, I]; gate_up: fp[T, 2I].
void swiglu_fwd(Tensor y, Tensor gate_up) {
    const char* op = "swiglu_fwd";
    RR_CHECK(y.dim() == 2, op, ": y must have 2 dimensions, got ", y.dim());
    const int64_t num_rows = y.size(0), inner = y.size(1);
    by_dtype(op, "gate_up", gate_up, [&](auto zero) {
        using T = decltype(zero);
        const T* in = data<const T>(op, "gate_up", gate_up, {num_rows, 2 * inner});
        T* out = data<T>(op, "y", y, {num_rows, inner});
        parallel_blocks(num_rows, rows_per_task(inner), [&](int64_t first, int64_t num) {
            for (int64_t row = first; row < first + num; ++row) swiglu_row(out + row * inner, in + row * 2 * inner, inner);
        });
    });
}

// dgate_up, gate_up: fp[T, 2I]; dy: fp[T, I].
void swiglu_bwd(Tensor dgate_up, Tensor dy, Tensor gate_up) {
    const char* op = "swiglu_bwd";
    RR_CHECK(dy.dim() == 2, op, ": dy must have 2 dimensions, got ", dy.dim());
    const int64_t num_rows = dy.size(0), inner = dy.size(1);
    by_dtype(op, "gate_up", gate_up, [&](auto zero) {
        using T = decltype(zero);
        const T* in = data<const T>(op, "gate_up", gate_up, {num_rows, 2 * inner});
        const T* upstream = data<const T>(op, "dy", dy, {num_rows, inner});
        T* out = data<T>(op, "dgate_up", dgate_up, {num_rows, 2 * inner});
        parallel_blocks(num_rows, rows_per_task(inner), [&](int64_t first, int64_t num) {
            for (int64_t row = first; row < first + num; ++row)
                swiglu_backward_row(out + row * 2 * inner, upstream + row * inner, in + row * 2 * inner, inner);
        });
    });
}

RR_REGISTER(m) {
    m.impl("swiglu_fwd", TORCH_BOX(&swiglu_fwd));
    m.impl("swiglu_bwd", TORCH_BOX(&swiglu_bwd));
}

}  // namespace
}  // namespace reason_rl
