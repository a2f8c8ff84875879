// swiglu on one row, without torch: y = silu(gate) * up in f32, rounded to T once. Shared by the op, the
// experts (csrc/moe) and the native decode.
#pragma once

#include "../common/simd.h"

namespace reason_rl {

// e^-gate of silu(gate) = gate / (1 + e^-gate). The exponent is capped at 80, where silu is 0 for all
// purposes: an infinite e^-gate would make the gradient inf * 0 = NaN.
inline F32x16 swiglu_exp(F32x16 gate) { return exp(min(gate * -1.0f, splat(80.0f))); }

// y: T[inner_size]; gate_up: T[2 * inner_size], the gate first.
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
// y, and the gradients for dy: silu' = s * (1 + gate * (1 - s)) with s = sigmoid(gate) and 1 - s = e^-gate *
// s.
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
