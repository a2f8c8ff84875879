// Packs whole matrices into the panels of gemm.h on torch's threads, one panel per task.
#pragma once

#include "gemm.h"
#include "tensor.h"

namespace reason_rl {

// packed: T[count, packed_size(N, K)]: the panels of `count` matrices B [K, N]. IS_TRANSPOSED: `matrices`
// holds B^T, S[count, N, K]; else B, S[count, K, N]. The memory of a matrix i with !is_needed(i) is left as
// it is.
template <bool IS_TRANSPOSED, class T, class S, class F>
void pack_matrices(T* packed, const S* matrices, int64_t count, int64_t n, int64_t k, F&& is_needed) {
    const int64_t num_panels = (n + LANES - 1) / LANES;
    parallel_for(count * num_panels, [&](int64_t task) {
        const int64_t i = task / num_panels, column = task % num_panels * LANES;
        if (!is_needed(i)) return;
        T* panel = packed + i * packed_size<T>(n, k) + packed_size<T>(column, k);
        if constexpr (IS_TRANSPOSED) pack_transposed_panel<T>(panel, matrices + i * n * k, n, k, k, column);
        else pack_panel<T>(panel, matrices + i * n * k, k, n, n, column);
    });
}
template <bool IS_TRANSPOSED, class T, class S>
void pack_matrices(T* packed, const S* matrices, int64_t count, int64_t n, int64_t k) {
    pack_matrices<IS_TRANSPOSED>(packed, matrices, count, n, k, [](int64_t) { return true; });
}

}  // namespace reason_rl
