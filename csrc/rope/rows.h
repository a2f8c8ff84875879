// rope on one head of one token: what csrc/rope/cpu.cpp runs over a batch, and the decode step on its own rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../common/simd.h"

namespace reason_rl {

// The pairs (x[c], x[c + half]) turned by their angles, or, with SIGN = -1, turned back (the gradient). y may be x.
template <int SIGN = 1, class T>
inline void rope_row(T* y, const T* x, const float* cos, const float* sin, int64_t head_dim) {
    const int64_t half = head_dim / 2;
    const auto turn = [=](int64_t c, auto n) {
        const F32x16 first = load(x + c, n), second = load(x + half + c, n);
        const F32x16 across = load(cos + c, n), along = load(sin + c, n) * static_cast<float>(SIGN);
        store(y + c, first * across - second * along, n);
        store(y + half + c, second * across + first * along, n);
    };
    int64_t c = 0;
    for (; c + LANES <= half; c += LANES) turn(c, std::integral_constant<int64_t, LANES>{});
    if (c < half) turn(c, half - c);
}

}  // namespace reason_rl
