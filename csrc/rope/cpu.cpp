// rope on the CPU, forward and backward. Siblings: rows.h, kernels/rope/, tests/kernels/test_rope.py.
#include "rows.h"

#include "../common/strided.h"

namespace reason_rl {
namespace {

constexpr int64_t BLOCK = 256;  // heads per task

// y, x: fp[T, H, C], y contiguous; cos, sin: f32[T, C/2]. SIGN = 1: forward, -1: backward. `to` and `from`
// are the names of y and x in error messages.
template <int SIGN>
void rotate(const char* op, const char* to, const char* from, Tensor y, Tensor x, Tensor cos, Tensor sin) {
    RR_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, op, ": ", from, " must be [T, H, C] with an even C, got ", x.dim(), " dimensions",
             x.dim() == 3 ? " and C = " + std::to_string(x.size(2)) : "");
    by_dtype(op, from, x, [&](auto zero) {
        using T = decltype(zero);
        const auto rows = strided_rows<const T>(op, from, x);
        T* out = rows_like<T>(op, to, y, x, rows);
        // A row is one head of one token: row r belongs to token r / H.
        const int64_t head_dim = rows.size, half = head_dim / 2;
        const float* cosines = data<const float>(op, "cos", cos, {x.size(0), half});
        const float* sines = data<const float>(op, "sin", sin, {x.size(0), half});
        parallel_blocks(rows.count, BLOCK, [&](int64_t first, int64_t num) {
            for (int64_t r = first; r < first + num; ++r) {
                const int64_t angle = r / rows.inner * half;
                rope_row<SIGN>(out + r * head_dim, rows.at(r), cosines + angle, sines + angle, head_dim);
            }
        });
    });
}

void rope_fwd(Tensor y, Tensor x, Tensor cos, Tensor sin) { rotate<1>("rope_fwd", "y", "x", y, x, cos, sin); }
void rope_bwd(Tensor dx, Tensor dy, Tensor cos, Tensor sin) { rotate<-1>("rope_bwd", "dx", "dy", dx, dy, cos, sin); }

RR_REGISTER(m) {
    m.impl("rope_fwd", TORCH_BOX(&rope_fwd));
    m.impl("rope_bwd", TORCH_BOX(&rope_bwd));
}

}  // namespace
}  // namespace reason_rl
