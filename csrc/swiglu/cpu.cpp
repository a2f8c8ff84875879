// swiglu on the CPU, forward and backward, row by row. Siblings: rows.h, kernels/swiglu/, tests/kernels/test_swiglu.py.
#include "../common/tensor.h"
#include "rows.h"

namespace reason_rl {
namespace {

// body(first, last) over blocks of rows that are large enough to be worth a thread.
template <class F>
void for_row_blocks(int64_t num_rows, int64_t width, F&& body) {
    const int64_t block = std::max<int64_t>(1, 8192 / std::max<int64_t>(width, 1));
    parallel_for((num_rows + block - 1) / block, [&](int64_t i) { body(i * block, std::min(num_rows, (i + 1) * block)); });
}

void swiglu_fwd(Tensor y, Tensor gate_up) {
    const char* op = "swiglu_fwd";
    RR_CHECK(y.dim() == 2, op, ": y must have 2 dimensions, got ", y.dim());
    const int64_t num_rows = y.size(0), inner = y.size(1);
    by_dtype(op, "gate_up", gate_up, [&](auto zero) {
        using T = decltype(zero);
        const T* in = data<const T>(op, "gate_up", gate_up, {num_rows, 2 * inner});
        T* out = data<T>(op, "y", y, {num_rows, inner});
        for_row_blocks(num_rows, inner, [&](int64_t row, int64_t last) {
            for (; row < last; ++row) swiglu_row(out + row * inner, in + row * 2 * inner, inner);
        });
    });
}

void swiglu_bwd(Tensor dgate_up, Tensor dy, Tensor gate_up) {
    const char* op = "swiglu_bwd";
    RR_CHECK(dy.dim() == 2, op, ": dy must have 2 dimensions, got ", dy.dim());
    const int64_t num_rows = dy.size(0), inner = dy.size(1);
    by_dtype(op, "gate_up", gate_up, [&](auto zero) {
        using T = decltype(zero);
        const T* in = data<const T>(op, "gate_up", gate_up, {num_rows, 2 * inner});
        const T* upstream = data<const T>(op, "dy", dy, {num_rows, inner});
        T* out = data<T>(op, "dgate_up", dgate_up, {num_rows, 2 * inner});
        for_row_blocks(num_rows, inner, [&](int64_t row, int64_t last) {
            for (; row < last; ++row)
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
