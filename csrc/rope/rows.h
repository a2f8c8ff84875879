// rope on one head of one token, without torch: shared by the op (cpu.cpp) and the native decode.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/simd.h"

namespace reason_rl {

// Rotates each pair (x[c], x[c + C/2]) by its angle in f32 and rounds once; SIGN = -1 rotates back (the
// gradient). y, x: T[C], y may be x; cos, sin: f32[C/2].
template <int SIGN = 1, class T>
inline void rope_row(T* y, const T* x, const float* cos, const float* sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    const auto rotate = [=](int64_t c, auto n) {
        const F32x16 first = load(x + c, n), second = load(x + half + c, n);
        const F32x16 cosine = load(cos + c, n), sine = load(sin + c, n) * static_cast<float>(SIGN);
        store(y + c, first * cosine - second * sine, n);
        store(y + half + c, second * cosine + first * sine, n);
    };
    int64_t c = 0;
    for (; c + LANES <= half; c += LANES) rotate(c, std::integral_constant<int64_t, LANES>{});
    if (c < half) rotate(c, half - c);
}

}  // namespace reason_rl
