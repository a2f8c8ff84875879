// rms_norm on one row, without torch: shared by the op (cpu.cpp) and the native decode.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/simd.h"

namespace reason_rl {

// body(i, n) for the row's elements [i, i + n): n is the constant 16, and the remainder in the last call.
template <class F>
[[gnu::always_inline]] inline void for_lanes(int64_t size, F&& body) {
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) body(i, std::integral_constant<int64_t, LANES>{});
    if (i < size) body(i, size - i);
}

// The sum over a row in f32; term(acc, i, n) adds the terms of elements [i, i + n) to acc. Two accumulators
// of 16 lanes take turns, in an order that depends on `size` only.
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

// 1 / sqrt(mean(x^2) + eps): the squares are summed in f32, the rest is f64, rounded to f32 at the end.
template <class T>
inline float rms_scale(const T* x, int64_t size, float eps) {
    const float squares = sum_over_row(size, [x](F32x16 acc, int64_t i, auto n) {
        const F32x16 value = load(x + i, n);
        return fma(value, value, acc);
    });
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(squares) / static_cast<double>(size) + static_cast<double>(eps)));
}

// y = x * scale * weight in f32, rounded to T once. y may be x. x, y: T[size]; weight: f32[size].
template <class T>
inline void rms_norm_row(T* y, const T* x, const float* weight, int64_t size, float eps) {
    const F32x16 scale = splat(rms_scale(x, size, eps));
    for_lanes(size, [&](int64_t i, auto n) { store(y + i, load(x + i, n) * scale * load(weight + i, n), n); });
}

}  // namespace reason_rl
