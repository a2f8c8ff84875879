// The inner loops of gemm.h: tiles of C in registers, and the packing of B.
#include "gemm.h"

namespace reason_rl {
namespace {

// acc + a pair of A (the same for all columns) times a pair of B for each of 16 columns.
inline F32x16 dot_pairs(F32x16 acc, const bf16* a, const bf16* b) {
    uint32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    U32x16 columns;
    std::memcpy(&columns, b, sizeof columns);
#if defined(__AVX512BF16__)
    const __m512 sum = _mm512_dpbf16_ps((__m512)acc.part[0], bits_of<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))), bits_of<__m512bh>(columns));
    return bits_of<F32x16>(sum);
#else
    acc = fma(splat(bits_of<float>(pair << 16)), bits_of<F32x16>(columns << 16), acc);
    return fma(splat(bits_of<float>(pair & 0xffff0000u)), bits_of<F32x16>(columns & 0xffff0000u), acc);
#endif
}
inline F32x16 step(F32x16 acc, const float* a, const float* b) { return fma(splat(*a), load(b), acc); }
inline F32x16 step(F32x16 acc, const bf16* a, const bf16* b) { return dot_pairs(acc, a, b); }

template <class T, int ROWS, int PANELS>
void multiply_fixed(int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile) {
    constexpr int64_t UNIT = PER_UNIT<T>, BLOCK = K_BLOCK / UNIT;
    for (int64_t first = 0; first == 0 || first < units; first += BLOCK) {
        const int64_t last = std::min(units, first + BLOCK);
        F32x16 acc[ROWS][PANELS];
        for (auto& row : acc)
            for (auto& value : row) value = splat(0.0f);
        const T* a_at = a.start + first * a.k_stride * UNIT;
        const T* b_at = b + first * UNIT * LANES;
        for (int64_t u = first; u < last; ++u, a_at += a.k_stride * UNIT, b_at += UNIT * LANES) {
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; ++p)
                    acc[r][p] = step(acc[r][p], a_at + r * a.row_stride * UNIT, b_at + p * panel_stride);
        }
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) {
                float* place = tile.row(r) + p * LANES;
                store(place, first ? load(place) + acc[r][p] : acc[r][p]);
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
    constexpr int64_t UNIT = PER_UNIT<T>;
    const int64_t units = num_units<T>(k);
    for (int64_t lane = 0; lane < LANES; ++lane) {
        T* place = panel + lane * UNIT;
        if (n + lane >= num_columns) {
            for (int64_t u = 0; u < units; ++u, place += LANES * UNIT) std::memset(place, 0, UNIT * sizeof(T));
            continue;
        }
        const S* row = matrix + (n + lane) * stride;
        // A column of the matrix is one lane of the panel: rounded 16 at a time, scattered one by one.
        T block[LANES];
        for (int64_t first = 0; first < units * UNIT; first += LANES) {
            store(block, load(row + first, std::min<int64_t>(LANES, k - first)));
            const int64_t count = std::min<int64_t>(LANES, units * UNIT - first);
            for (int64_t i = 0; i < count; i += UNIT, place += LANES * UNIT) std::memcpy(place, block + i, UNIT * sizeof(T));
        }
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
