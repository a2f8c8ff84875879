// linear on the CPU: forward, dgrad and wgrad. Siblings: kernels/linear/, tests/kernels/test_linear.py.
//
// Each op packs one operand into panels, then multiplies blocks of rows on torch's threads. An element is
// summed over its reduction dimension in a fixed order (gemm.h), so that a row has the same bits in any batch
// and with any number of threads.
#include "../common/gemm.h"
#include "../common/pack.h"
#include "../common/tensor.h"

namespace reason_rl {
namespace {

// C: T[num_rows, num_columns] = A: T[num_rows, k] @ packed B, on torch's threads.
template <class T>
void parallel_product(T* c, const T* a, const T* packed, int64_t num_rows, int64_t num_columns, int64_t k) {
    parallel_blocks(num_rows, ROW_BLOCK, [&](int64_t first, int64_t rows) {
        Scratch<T> pairs(rows * odd_row<T>(k));
        product<T>(c + first * num_columns, a + first * k, packed, rows, num_columns, k, pairs);
    });
}

// y: fp[M, N]; x: fp[M, K]; weight: fp|f32[N, K].
void linear_fwd(Tensor y, Tensor x, Tensor weight) {
    const char* op = "linear_fwd";
    RR_CHECK(x.dim() == 2 && weight.dim() == 2, op, ": x and weight must have 2 dimensions, got ", x.dim(), " and ", weight.dim());
    const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const T* rows = data<const T>(op, "x", x, {m, k});
        T* out = data<T>(op, "y", y, {m, n});
        Scratch<T> packed(packed_size<T>(n, k));
        by_master<T>(op, "weight", weight, {n, k},
                     [&](const auto* matrix) { pack_matrices<true, T>(packed, matrix, 1, n, k); });
        parallel_product<T>(out, rows, packed, m, n, k);
    });
}

// dx: fp[M, K]; dy: fp[M, N]; weight: fp|f32[N, K]. The reduction runs over N.
void linear_dgrad(Tensor dx, Tensor dy, Tensor weight) {
    const char* op = "linear_dgrad";
    RR_CHECK(dy.dim() == 2 && weight.dim() == 2, op, ": dy and weight must have 2 dimensions, got ", dy.dim(), " and ",
             weight.dim());
    const int64_t m = dy.size(0), n = dy.size(1), k = weight.size(1);
    by_dtype(op, "dy", dy, [&](auto zero) {
        using T = decltype(zero);
        const T* rows = data<const T>(op, "dy", dy, {m, n});
        T* out = data<T>(op, "dx", dx, {m, k});
        Scratch<T> packed(packed_size<T>(k, n));
        by_master<T>(op, "weight", weight, {n, k},
                     [&](const auto* matrix) { pack_matrices<false, T>(packed, matrix, 1, k, n); });
        parallel_product<T>(out, rows, packed, m, k, n);
    });
}

// dweight: f32[N, K], also for bf16 operands; dy: fp[M, N]; x: fp[M, K].
void linear_wgrad(Tensor dweight, Tensor dy, Tensor x) {
    const char* op = "linear_wgrad";
    RR_CHECK(dy.dim() == 2 && x.dim() == 2, op, ": dy and x must have 2 dimensions, got ", dy.dim(), " and ", x.dim());
    const int64_t m = x.size(0), k = x.size(1), n = dy.size(1);
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const T* inputs = data<const T>(op, "x", x, {m, k});
        const T* gradients = data<const T>(op, "dy", dy, {m, n});
        float* out = data<float>(op, "dweight", dweight, {n, k});
        // A task owns `num` columns of dy, which are rows of dweight. It adds up their sums over M in f32,
        // ROWS rows of dy and x at a time, in order.
        constexpr int64_t ROWS = 4 * K_BLOCK;
        parallel_blocks(n, items_per_task(n, TILE_ROWS, ROW_BLOCK), [&](int64_t first, int64_t num) {
            std::fill(out + first * k, out + (first + num) * k, 0.0f);
            Scratch<T> packed(packed_size<T>(k, ROWS)), pairs(ROWS * num);
            for (int64_t row = 0; row < m; row += ROWS) {
                const int64_t count = std::min(ROWS, m - row);
                pack_plain<T>(packed, inputs + row * k, count, k, k);
                const auto a = columns_of<T>(gradients + row * n + first, count, num, n, pairs);
                for_tiles<T>(num, k, count, a, packed, add_tile(out + first * k, k));
            }
        });
    });
}

RR_REGISTER(m) {
    m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
    m.impl("linear_dgrad", TORCH_BOX(&linear_dgrad));
    m.impl("linear_wgrad", TORCH_BOX(&linear_wgrad));
}

}  // namespace
}  // namespace reason_rl
