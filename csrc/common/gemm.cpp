// gemm.h's inner loops: the register block that computes one tile of C, and the packing of B.
#include "gemm.h"

namespace reason_rl {
namespace {

// The accumulators are an array of single registers. GCC 12 keeps such an array in registers, but puts an
// array of F32x16 of several registers into memory, at a fifth of the speed.
using Register = F32x16::Register;
using WordRegister = U32x16::Register;

template <class To, class T>
inline To load_register(const T* p) {
    To x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// acc += a * b for one unit of k: `a` is one unit, broadcast to all columns, `b` a unit per column. A pair of
// bf16 takes one step with the dot-product instruction, else two: the even element of each pair, then the odd
// one.
#if defined(__AVX512BF16__)
template <class T> constexpr int STEPS = 1;
template <int STEP>
inline Register step(Register acc, const bf16* a, const bf16* b) {
    const WordRegister pair = load_register<uint32_t>(a) - WordRegister{};  // x - 0 is x, and no instruction
    return (Register)_mm512_dpbf16_ps((__m512)acc, bits_of<__m512bh>(pair), load_register<__m512bh>(b));
}
#else
template <class T> constexpr int STEPS = PER_UNIT<T>;
template <int STEP>
inline Register step(Register acc, const bf16* a, const bf16* b) {
    typedef uint16_t Halves __attribute__((vector_size(REGISTER_BYTES)));
    const WordRegister same = (WordRegister)(a[STEP].bits - Halves{}) << 16, pairs = load_register<WordRegister>(b);
    return fma((Register)same, (Register)(STEP ? pairs & 0xffff0000u : pairs << 16), acc);
}
#endif
template <int STEP>
inline Register step(Register acc, const float* a, const float* b) { return fma(*a - Register{}, load_register<Register>(b), acc); }

// One step for the whole tile: acc[r][i] holds the columns from i * REGISTER_LANES of row r.
template <int STEP, class T, int ROWS, int WIDTH>
inline void step_tile(Register (&acc)[ROWS][WIDTH], const T* a, int64_t row_stride, const T* b, int64_t panel_stride) {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i)
            acc[r][i] = step<STEP>(acc[r][i], a + r * row_stride,
                                   b + i / REGISTERS * panel_stride + i % REGISTERS * REGISTER_LANES * PER_UNIT<T>);
}

// `multiply` for a tile whose size the compiler knows, so that the accumulators stay in registers.
template <class T, int ROWS, int PANELS>
void multiply_fixed(int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile) {
    constexpr int64_t UNIT = PER_UNIT<T>, BLOCK = K_BLOCK / UNIT;
    constexpr int WIDTH = PANELS * REGISTERS;
    for (int64_t first = 0; first == 0 || first < units; first += BLOCK) {
        const int64_t last = std::min(units, first + BLOCK);
        Register acc[ROWS][WIDTH] = {};
        const T* a_at = a.start + first * a.k_stride * UNIT;
        const T* b_at = b + first * UNIT * LANES;
        // The sum of this block of K_BLOCK terms, in registers.
        for (int64_t u = first; u < last; ++u, a_at += a.k_stride * UNIT, b_at += UNIT * LANES) {
            step_tile<0>(acc, a_at, a.row_stride * UNIT, b_at, panel_stride);
            if constexpr (STEPS<T> == 2) step_tile<1>(acc, a_at, a.row_stride * UNIT, b_at, panel_stride);
        }
        // Store the first block's sum; add the later ones to it, in order.
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; ++i) {
                float* place = tile.row(r) + i * REGISTER_LANES;
                const Register sum = first ? load_register<Register>(place) + acc[r][i] : acc[r][i];
                std::memcpy(place, &sum, sizeof sum);
            }
    }
}

}  // namespace

template <class T>
void multiply(int rows, int panels, int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile) {
    with_constant<TILE_ROWS>(rows, [&](auto num_rows) {
        with_constant<TILE_PANELS>(panels, [&](auto num_panels) {
            multiply_fixed<T, decltype(num_rows)::value, decltype(num_panels)::value>(units, a, b, panel_stride, tile);
        });
    });
}
template void multiply(int, int, int64_t, RowsOf<float>, const float*, int64_t, Tile&);
template void multiply(int, int, int64_t, RowsOf<bf16>, const bf16*, int64_t, Tile&);

template <class T, class S>
void pack_transposed_panel(T* panel, const S* matrix, int64_t num_columns, int64_t k, int64_t stride, int64_t n) {
    constexpr int64_t UNIT = PER_UNIT<T>, BLOCK_UNITS = LANES / UNIT;
    const int64_t units = num_units<T>(k), lanes = std::min<int64_t>(LANES, num_columns - n);
    // Transposes 16 x 16 elements at a time: rows of the matrix are rounded into `square`, then read as
    // lanes.
    T square[LANES * LANES] = {};
    for (int64_t first = 0; first < units; first += BLOCK_UNITS) {
        const int64_t column = first * UNIT, count = std::min(BLOCK_UNITS, units - first);
        for (int64_t lane = 0; lane < lanes; ++lane)
            store(square + lane * LANES, load(matrix + (n + lane) * stride + column, std::min<int64_t>(LANES, k - column)));
        T* place = panel + first * UNIT * LANES;
        for (int64_t u = 0; u < count; ++u)
            for (int64_t lane = 0; lane < LANES; ++lane, place += UNIT)
                std::memcpy(place, square + lane * LANES + u * UNIT, UNIT * sizeof(T));
    }
}

template <class T, class S>
void pack_panel(T* panel, const S* matrix, int64_t k, int64_t num_columns, int64_t stride, int64_t n) {
    const int64_t columns = std::min<int64_t>(LANES, num_columns - n);
    const S* row = matrix + n;
    if constexpr (sizeof(T) == 4) {
        for (int64_t i = 0; i < k; ++i, row += stride) store(panel + i * LANES, load(row, columns));
    } else {
        for (int64_t i = 0; i < k; i += 2, row += 2 * stride, panel += 2 * LANES) {
            const U32x16 even = bits_of<U32x16>(round_to<bf16>(load(row, columns))) >> 16;
            const U32x16 odd = i + 1 < k ? bits_of<U32x16>(round_to<bf16>(load(row + stride, columns))) & 0xffff0000u : splat(0u);
            const U32x16 pairs = even | odd;
            std::memcpy(panel, &pairs, sizeof pairs);
        }
    }
}

#define RR_PACK(T, S) \
    template void pack_transposed_panel(T*, const S*, int64_t, int64_t, int64_t, int64_t); \
    template void pack_panel(T*, const S*, int64_t, int64_t, int64_t, int64_t);
RR_PACK(float, float)
RR_PACK(bf16, bf16)
RR_PACK(bf16, float)
#undef RR_PACK

template <>
RowsOf<float> columns_of(const float* matrix, int64_t, int64_t, int64_t stride, float*) {
    return {matrix, 1, stride};
}
template <>
RowsOf<bf16> columns_of(const bf16* matrix, int64_t k, int64_t num_columns, int64_t stride, bf16* pairs) {
    for (int64_t i = 0; i < k; i += 2) {
        const bf16* row = matrix + i * stride;
        bf16* place = pairs + i * num_columns;
        for (int64_t j = 0; j < num_columns; j += LANES) {
            const int64_t count = std::min<int64_t>(LANES, num_columns - j);
            const U32x16 even = bits_of<U32x16>(load(row + j, count)) >> 16;
            const U32x16 odd = i + 1 < k ? bits_of<U32x16>(load(row + stride + j, count)) : splat(0u);
            const U32x16 both = even | odd;
            std::memcpy(place + 2 * j, &both, count * sizeof(uint32_t));
        }
    }
    return {pairs, 1, num_columns};
}

}  // namespace reason_rl
