// rms_norm on one row: what csrc/rms_norm/cpu.cpp runs over a batch, and the decode step on its own rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/simd.h"

namespace reason_rl {

// body(i, n) for the row's next n elements from i on: 16 of them, which the compiler then knows, and at the end what is left.
template <class F>
[[gnu::always_inline]] inline void for_lanes(int64_t size, F&& body) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) body(i, std::integral_constant<int64_t, LANES>{});
    if (i < size) body(i, size - i);
}

// A row's sum in f32, term(sums, i, n) adding the terms from i on. Two chains of 16 lanes: the order follows from size alone.
template <class F>
[[gnu::always_inline]] inline float sum_over_row(int64_t size, F&& term) {
    F32x16 even = splat(0.0f), odd = splat(0.0f);
    int64_t i = 0;
    for (; i + 2 * LANES <= size; i += 2 * LANES) {
        even = term(even, i, std::integral_constant<int64_t, LANES>{});
        odd = term(odd, i + LANES, std::integral_constant<int64_t, LANES>{});
    }
    if (i < size) even = term(even, i, std::min<int64_t>(LANES, size - i));
    if (i + LANES < size) odd = term(odd, i + LANES, size - i - LANES);
    return sum(even + odd);
}

// 1 / sqrt(mean(x^2) + eps), rounded once: one number a row may be had in f64.
template <class T>
inline float rms_scale(const T* x, int64_t size, float eps) {
    const float squares = sum_over_row(size, [x](F32x16 acc, int64_t i, auto n) {
        const F32x16 value = load(x + i, n);
        return fma(value, value, acc);
    });
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares) / static_cast<double>(size) + static_cast<double>(eps)));
}

// y = x * scale * weight, rounded once; y may be x.
template <class T>
inline void rms_norm_row(T* y, const T* x, const float* weight, int64_t size, float eps) {
    const F32x16 scale = splat(rms_scale(x, size, eps));
    for_lanes(size, [&](int64_t i, auto n) { store(y + i, load(x + i, n) * scale * load(weight + i, n), n); });
}

}  // namespace reason_rl
