// swiglu on one row: y = silu(gate) * up, computed in f32 and rounded once. Shared by the op, the experts and the decode step.
#pragma once

#include "../common/simd.h"

namespace reason_rl {

// silu(gate) = gate / (1 + e^-gate). The exponent stops at 80, where silu is 0 beside 1: inf * 0 would reach the gradient.
inline F32x16 swiglu_exp(F32x16 gate) { return exp(min(gate * -1.0f, splat(80.0f))); }

// y [inner_size] = silu(gate) * up; gate_up holds the gate's inner_size values, then those of up.
template <class T>
void swiglu_row(T* y, const T* gate_up, int64_t inner_size) {
    for (int64_t j = 0; j < inner_size; j += LANES) {
        const int64_t n = inner_size - j;
        const F32x16 gate = load(gate_up + j, n), up = load(gate_up + inner_size + j, n);
        store(y + j, gate / (swiglu_exp(gate) + 1.0f) * up, n);
    }
}

struct SwigluGradient {
    F32x16 y, dgate, dup;
};
// y as above, and what dy becomes on the way back: silu' = s * (1 + gate * (1 - s)) with s = sigmoid(gate), 1 - s = e^-gate * s.
inline SwigluGradient swiglu_gradient(F32x16 gate, F32x16 up, F32x16 dy) {
    const F32x16 e = swiglu_exp(gate), sigmoid = splat(1.0f) / (e + 1.0f), silu = gate / (e + 1.0f);
    return {silu * up, dy * up * (sigmoid * fma(gate, e * sigmoid, splat(1.0f))), dy * silu};
}

template <class T>
void swiglu_backward_row(T* dgate_up, const T* dy, const T* gate_up, int64_t inner_size) {
    for (int64_t j = 0; j < inner_size; j += LANES) {
        const int64_t n = inner_size - j;
        const auto gradient = swiglu_gradient(load(gate_up + j, n), load(gate_up + inner_size + j, n), load(dy + j, n));
        store(dgate_up + j, gradient.dgate, n);
        store(dgate_up + inner_size + j, gradient.dup, n);
    }
}

}  // namespace reason_rl
