// rms_norm on the CPU, forward and backward. Siblings: kernels/rms_norm/, tests/kernels/test_rms_norm.py.
//
// Precision: each row is computed in f32 and rounded to fp once. dweight is summed in f32 over blocks of
// BLOCK rows, then over the blocks in f64, in order: the number of threads does not change its bits.
#include "rows.h"

#include "../common/strided.h"

namespace reason_rl {
namespace {

constexpr int64_t BLOCK = 32;  // rows per task

// y, x: fp[.., D] or fp[.., .., D], y contiguous; weight: f32[D].
void rms_norm_fwd(Tensor y, Tensor x, Tensor weight, double eps) {
    const char* op = "rms_norm_fwd";
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const auto rows = strided_rows<const T>(op, "x", x);
        T* out = rows_like<T>(op, "y", y, x, rows);
        const float* factors = data<const float>(op, "weight", weight, {rows.size});
        parallel_blocks(rows.count, BLOCK, [&](int64_t first, int64_t num) {
            for (int64_t r = first; r < first + num; ++r)
                rms_norm_row(out + r * rows.size, rows.at(r), factors, rows.size, static_cast<float>(eps));
        });
    });
}

// With s = rms_scale(x) and g = dy * weight: dx = s * (g - x * s^2 * mean(g * x)); dweight += dy * x * s.
template <class T>
void backward_row(T* dx, float* dweight, const T* dy, const T* x, const float* weight, int64_t size, float eps) {
    const float scale = rms_scale(x, size, eps);
    const float dot = sum_over_row(size, [&](F32x16 acc, int64_t i, auto n) {
        return fma(load(dy + i, n) * load(weight + i, n), load(x + i, n), acc);
    });
    const F32x16 back = splat(scale * scale * (dot / static_cast<float>(size)));
    for_lanes(size, [&](int64_t i, auto n) {
        const F32x16 value = load(x + i, n), gradient = load(dy + i, n);
        store(dx + i, (gradient * load(weight + i, n) - value * back) * scale, n);
        store(dweight + i, fma(gradient, value * scale, load(dweight + i, n)), n);
    });
}

// dx, dy, x: fp[.., D] or fp[.., .., D], dx contiguous; dweight, weight: f32[D].
void rms_norm_bwd(Tensor dx, Tensor dweight, Tensor dy, Tensor x, Tensor weight, double eps) {
    const char* op = "rms_norm_bwd";
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const auto rows = strided_rows<const T>(op, "x", x), upstream = strided_rows<const T>(op, "dy", dy);
        RR_CHECK(upstream.count == rows.count && upstream.inner == rows.inner && upstream.size == rows.size, op,
                 ": dy must have x's shape of ", rows.count, " rows of ", rows.size, ", got ", upstream.count, " of ",
                 upstream.size);
        T* out = rows_like<T>(op, "dx", dx, x, rows);
        const float* factors = data<const float>(op, "weight", weight, {rows.size});
        float* sums = data<float>(op, "dweight", dweight, {rows.size});
        // The rows of each block, and the block's sum for dweight.
        const int64_t blocks = (rows.count + BLOCK - 1) / BLOCK, size = rows.size;
        Scratch<float> block_sums(blocks * size);
        parallel_blocks(rows.count, BLOCK, [&](int64_t first, int64_t num) {
            float* sum = block_sums + first / BLOCK * size;
            std::fill(sum, sum + size, 0.0f);
            for (int64_t r = first; r < first + num; ++r)
                backward_row(out + r * size, sum, upstream.at(r), rows.at(r), factors, size, static_cast<float>(eps));
        });
        // The blocks in order, in f64.
        std::vector<double> total(size, 0.0);
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = 0; i < size; ++i) total[i] += static_cast<double>(block_sums[block * size + i]);
        std::copy(total.begin(), total.end(), sums);
    });
}

RR_REGISTER(m) {
    m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
    m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace
}  // namespace reason_rl
