// The inner loops of gemm.h: tiles of C in registers, and the packing of B.
#include "gemm.h"

namespace reason_rl {
namespace {

// The tile is written in single registers: GCC 12 keeps an array of them where they belong, but puts an array of F32x16 of several
// registers in memory, at a fifth of the speed.
using Part = F32x16::Part;
using WholePart = U32x16::Part;

template <class To, class T>
inline To load_part(const T* p) {
    To x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

// acc + a unit of A (the same for all columns) times a unit of B for each column. A pair of bf16 takes one step where the CPU has
// their dot product, else two: first the even halves, then the odd ones.
#if defined(__AVX512BF16__)
template <class T> constexpr int STEPS = 1;
template <int STEP>
inline Part step(Part acc, const bf16* a, const bf16* b) {
    const WholePart pair = load_part<uint32_t>(a) - WholePart{};  // x - 0 is x, and no instruction
    return (Part)_mm512_dpbf16_ps((__m512)acc, bits_of<__m512bh>(pair), load_part<__m512bh>(b));
}
#else
template <class T> constexpr int STEPS = PER_UNIT<T>;
template <int STEP>
inline Part step(Part acc, const bf16* a, const bf16* b) {
    typedef uint16_t Halves __attribute__((vector_size(REGISTER_BYTES)));
    const WholePart same = (WholePart)(a[STEP].bits - Halves{}) << 16, pairs = load_part<WholePart>(b);
    return fma((Part)same, (Part)(STEP ? pairs & 0xffff0000u : pairs << 16), acc);
}
#endif
template <int STEP>
inline Part step(Part acc, const float* a, const float* b) { return fma(*a - Part{}, load_part<Part>(b), acc); }

// One step for the whole tile: acc[r][i] holds row r's columns from i * PART_LANES on.
template <int STEP, class T, int ROWS, int WIDTH>
inline void step_tile(Part (&acc)[ROWS][WIDTH], const T* a, int64_t row_stride, const T* b, int64_t panel_stride) {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < WIDTH; ++i)
            acc[r][i] = step<STEP>(acc[r][i], a + r * row_stride,
                                   b + i / PARTS * panel_stride + i % PARTS * PART_LANES * PER_UNIT<T>);
}

template <class T, int ROWS, int PANELS>
void multiply_fixed(int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile) {
    constexpr int64_t UNIT = PER_UNIT<T>, BLOCK = K_BLOCK / UNIT;
    constexpr int WIDTH = PANELS * PARTS;
    for (int64_t first = 0; first == 0 || first < units; first += BLOCK) {
        const int64_t last = std::min(units, first + BLOCK);
        Part acc[ROWS][WIDTH] = {};
        const T* a_at = a.start + first * a.k_stride * UNIT;
        const T* b_at = b + first * UNIT * LANES;
        for (int64_t u = first; u < last; ++u, a_at += a.k_stride * UNIT, b_at += UNIT * LANES) {
            step_tile<0>(acc, a_at, a.row_stride * UNIT, b_at, panel_stride);
            if constexpr (STEPS<T> == 2) step_tile<1>(acc, a_at, a.row_stride * UNIT, b_at, panel_stride);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < WIDTH; ++i) {
                float* place = tile.row(r) + i * PART_LANES;
                const Part sum = first ? load_part<Part>(place) + acc[r][i] : acc[r][i];
                std::memcpy(place, &sum, sizeof sum);
            }
    }
}

template <class T, int ROWS>
void multiply_rows(int panels, int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile) {
    if constexpr (TILE_PANELS > 1) {
        switch (panels) {
            case 2: return multiply_fixed<T, ROWS, 2>(units, a, b, panel_stride, tile);
            case 3: return multiply_fixed<T, ROWS, 3>(units, a, b, panel_stride, tile);
            case 4: return multiply_fixed<T, ROWS, 4>(units, a, b, panel_stride, tile);
        }
    }
    multiply_fixed<T, ROWS, 1>(units, a, b, panel_stride, tile);
}

}  // namespace

template <class T>
void multiply(int rows, int panels, int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile) {
    if constexpr (TILE_ROWS > 2) {
        switch (rows) {
            case 3: return multiply_rows<T, 3>(panels, units, a, b, panel_stride, tile);
            case 4: return multiply_rows<T, 4>(panels, units, a, b, panel_stride, tile);
            case 5: return multiply_rows<T, 5>(panels, units, a, b, panel_stride, tile);
            case 6: return multiply_rows<T, 6>(panels, units, a, b, panel_stride, tile);
        }
    }
    if (rows == 2) return multiply_rows<T, 2>(panels, units, a, b, panel_stride, tile);
    multiply_rows<T, 1>(panels, units, a, b, panel_stride, tile);
}
template void multiply(int, int, int64_t, RowsOf<float>, const float*, int64_t, Tile&);
template void multiply(int, int, int64_t, RowsOf<bf16>, const bf16*, int64_t, Tile&);

template <class T, class S>
void pack_transposed_panel(T* panel, const S* matrix, int64_t num_columns, int64_t k, int64_t stride, int64_t n) {
    constexpr int64_t UNIT = PER_UNIT<T>, BLOCK_UNITS = LANES / UNIT;
    const int64_t units = num_units<T>(k), lanes = std::min<int64_t>(LANES, num_columns - n);
    // A square of 16 x 16 at a time: rounded row by row, turned in the first cache. A row of the matrix becomes a lane.
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
