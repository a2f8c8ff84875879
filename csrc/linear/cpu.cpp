// linear on the CPU: forward, dgrad, wgrad. Siblings: kernels/linear/, tests/kernels/test_linear.py.
//
// Rows are spread over the threads in blocks; each element's sum runs over k in one order (gemm.h), so that a row has the same
// bits in any batch and with any number of threads.
#include "../common/gemm.h"
#include "../common/tensor.h"

namespace reason_rl {
namespace {

// `product`, its rows spread over the threads.
template <class T>
void spread_product(T* c, const T* a, const T* packed, int64_t num_rows, int64_t num_columns, int64_t k) {
    const int64_t blocks = (num_rows + ROW_BLOCK - 1) / ROW_BLOCK;
    parallel_for(blocks, [&](int64_t block) {
        const int64_t first = block * ROW_BLOCK, rows = std::min(ROW_BLOCK, num_rows - first);
        Scratch<T> pairs(rows * odd_row<T>(k));
        product<T>(c + first * num_columns, a + first * k, packed, rows, num_columns, k, pairs);
    });
}

void linear_fwd(Tensor y, Tensor x, Tensor weight) {
    const char* op = "linear_fwd";
    RR_CHECK(x.dim() == 2 && weight.dim() == 2, op, ": x and weight must have 2 dimensions, got ", x.dim(), " and ", weight.dim());
    const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const T* rows = data<const T>(op, "x", x, {m, k});
        T* out = data<T>(op, "y", y, {m, n});
        Scratch<T> packed(packed_size<T>(n, k));
        by_master<T>(op, "weight", weight, {n, k}, [&](const auto* matrix) {
            parallel_for((n + LANES - 1) / LANES, [&](int64_t panel) {
                pack_transposed_panel<T>(packed + packed_size<T>(panel * LANES, k), matrix, n, k, k, panel * LANES);
            });
        });
        spread_product<T>(out, rows, packed, m, n, k);
    });
}

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
        by_master<T>(op, "weight", weight, {n, k}, [&](const auto* matrix) {
            parallel_for((k + LANES - 1) / LANES, [&](int64_t panel) {
                pack_panel<T>(packed + packed_size<T>(panel * LANES, n), matrix, n, k, k, panel * LANES);
            });
        });
        spread_product<T>(out, rows, packed, m, k, n);
    });
}

void linear_wgrad(Tensor dweight, Tensor dy, Tensor x) {
    const char* op = "linear_wgrad";
    RR_CHECK(dy.dim() == 2 && x.dim() == 2, op, ": dy and x must have 2 dimensions, got ", dy.dim(), " and ", x.dim());
    const int64_t m = x.size(0), k = x.size(1), n = dy.size(1);
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const T* inputs = data<const T>(op, "x", x, {m, k});
        const T* gradients = data<const T>(op, "dy", dy, {m, n});
        float* out = data<float>(op, "dweight", dweight, {n, k});
        // A thread owns columns of dy, that is rows of dweight; the sum over the M rows runs in order, ROWS of them at a time.
        constexpr int64_t ROWS = 4 * K_BLOCK;
        const int64_t width = share(n, TILE_ROWS, ROW_BLOCK);
        parallel_for((n + width - 1) / width, [&](int64_t block) {
            const int64_t first = block * width, columns = std::min(width, n - first);
            std::fill(out + first * k, out + (first + columns) * k, 0.0f);
            Scratch<T> packed(packed_size<T>(k, ROWS)), pairs(ROWS * columns);
            for (int64_t row = 0; row < m; row += ROWS) {
                const int64_t count = std::min(ROWS, m - row);
                pack_plain<T>(packed, inputs + row * k, count, k, k);
                const auto a = columns_of<T>(gradients + row * n + first, count, columns, n, pairs);
                for_tiles<T>(columns, k, count, a, packed, add_tile(out + first * k, k));
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
