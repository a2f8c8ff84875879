// rms_norm on the CPU, forward and backward. Siblings: kernels/rms_norm/, tests/kernels/test_rms_norm.py.
//
// A row is one thread's; dweight is summed in blocks of BLOCK rows, and the blocks in order and in f64, whatever the threads.
#include "rows.h"

#include "../common/strided.h"

namespace reason_rl {
namespace {

constexpr int64_t BLOCK = 32;

void rms_norm_fwd(Tensor y, Tensor x, Tensor weight, double eps) {
    const char* op = "rms_norm_fwd";
    by_dtype(op, "x", x, [&](auto zero) {
        using T = decltype(zero);
        const auto rows = strided_rows<const T>(op, "x", x);
        T* out = rows_like<T>(op, "y", y, x, rows);
        const float* factors = data<const float>(op, "weight", weight, {rows.size});
        parallel_for((rows.count + BLOCK - 1) / BLOCK, [&](int64_t block) {
            for (int64_t r = block * BLOCK; r < std::min(rows.count, (block + 1) * BLOCK); ++r)
                rms_norm_row(out + r * rows.size, rows.at(r), factors, rows.size, static_cast<float>(eps));
        });
    });
}

// With s the row's scale and g = dy * weight: dx = s * (g - x * s^2 * mean(g * x)), and dweight gets dy * x * s.
template <class T>
void backward_row(T* dx, float* dweight, const T* dy, const T* x, const float* weight, int64_t size, float eps) {
    const float scale = rms_scale(x, size, eps);
    const float along = sum_over_row(size, [&](F32x16 acc, int64_t i, auto n) {
        return fma(load(dy + i, n) * load(weight + i, n), load(x + i, n), acc);
    });
    const F32x16 back = splat(scale * scale * (along / static_cast<float>(size)));
    for_lanes(size, [&](int64_t i, auto n) {
        const F32x16 value = load(x + i, n), gradient = load(dy + i, n);
        store(dx + i, (gradient * load(weight + i, n) - value * back) * scale, n);
        store(dweight + i, fma(gradient, value * scale, load(dweight + i, n)), n);
    });
}

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
        const int64_t blocks = (rows.count + BLOCK - 1) / BLOCK, size = rows.size;
        Scratch<float> parts(blocks * size);
        parallel_for(blocks, [&](int64_t block) {
            float* part = parts + block * size;
            std::fill(part, part + size, 0.0f);
            for (int64_t r = block * BLOCK; r < std::min(rows.count, (block + 1) * BLOCK); ++r)
                backward_row(out + r * size, part, upstream.at(r), rows.at(r), factors, size, static_cast<float>(eps));
        });
        std::vector<double> total(size, 0.0);
        for (int64_t block = 0; block < blocks; ++block)
            for (int64_t i = 0; i < size; ++i) total[i] += static_cast<double>(parts[block * size + i]);
        std::copy(total.begin(), total.end(), sums);
    });
}

RR_REGISTER(m) {
    m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
    m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}

}  // namespace
}  // namespace reason_rl
