// The matrix product of all CPU kernels: C[m, n] = sum_k A[m, k] * B[k, n], accumulated in f32.
//
// Batch invariance comes from one rule: an element of C is summed over k in order, in blocks of K_BLOCK terms
// whose sums are added in order, with the same instructions at every step. The number of rows, the position
// of a tile and the number of threads do not change its bits. bf16 operands are multiplied in pairs (k, k +
// 1): with AVX512_BF16 by the dot-product instruction, elsewhere by two multiply-adds in f32.
//
// B is packed into panels of 16 columns, which the inner loop reads sequentially (zeros beyond N and K):
//     f32    [N/16][K][16]          bf16    [N/16][ceil(K/2)][16][2]
// A is read in place, with a row stride and a k stride in units (one f32, or a pair of bf16). Rows with an
// odd number of bf16 are copied first (`even_rows`).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "simd.h"

namespace reason_rl {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_PANELS = 4;  // 24 accumulators, 4 registers of B, 1 of A: 29 of 32
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;  // 12 of 16 registers
#else
constexpr int TILE_ROWS = 2, TILE_PANELS = 1;
#endif
constexpr int TILE_COLUMNS = TILE_PANELS * LANES;
constexpr int64_t K_BLOCK = 128;  // sums of short sums: a smaller rounding error than one long sum
constexpr int64_t ROW_BLOCK = 96;  // rows per task: their A stays in the first-level cache

// A tile of C in f32; rows are TILE_COLUMNS apart.
struct Tile {
    alignas(64) float values[TILE_ROWS * TILE_COLUMNS];
    const float* row(int64_t m) const { return values + m * TILE_COLUMNS; }
    float* row(int64_t m) { return values + m * TILE_COLUMNS; }
};

// Elements per unit of k: one f32, or a pair of bf16.
template <class T> constexpr int64_t PER_UNIT = sizeof(T) == 4 ? 1 : 2;
template <class T> constexpr int64_t num_units(int64_t k) { return (k + PER_UNIT<T> - 1) / PER_UNIT<T>; }
// Elements of T in a packed B [K, N].
template <class T> constexpr int64_t packed_size(int64_t n, int64_t k) {
    return padded(n) * num_units<T>(k) * PER_UNIT<T>;
}

template <class T>
struct RowsOf {  // A; strides in units
    const T* start;
    int64_t row_stride, k_stride;
};
// Contiguous rows of `row_length` elements (even for bf16).
template <class T> RowsOf<T> rows_of(const T* start, int64_t row_length) { return {start, row_length / PER_UNIT<T>, 1}; }

// Calls body(std::integral_constant<int, n>{}) for an n in 1..MOST that is known at run time only.
template <int MOST, class F>
inline void with_constant(int n, F&& body) {
    if constexpr (MOST > 1)
        if (n < MOST) return with_constant<MOST - 1>(n, body);
    body(std::integral_constant<int, MOST>{});
}
// tile[r][c] = sum over `units` units of k of A[r] times the panels at `b`, for r < rows and c < 16 * panels.
// panel_stride is in elements of T.
template <class T>
void multiply(int rows, int panels, int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile);

// Calls body(m, rows, n, columns, tile) for every tile of C [num_rows, num_columns]: `rows` rows from m,
// `columns` columns from n.
template <class T, class F>
void for_tiles(int64_t num_rows, int64_t num_columns, int64_t k, RowsOf<T> a, const T* packed_b, F&& body) {
    const int64_t units = num_units<T>(k), panel_stride = units * PER_UNIT<T> * LANES;
    Tile tile;
    for (int64_t n = 0; n < num_columns; n += TILE_COLUMNS) {
        const int64_t columns = std::min<int64_t>(TILE_COLUMNS, num_columns - n);
        const int panels = static_cast<int>((columns + LANES - 1) / LANES);
        for (int64_t m = 0; m < num_rows; m += TILE_ROWS) {
            const int rows = static_cast<int>(std::min<int64_t>(TILE_ROWS, num_rows - m));
            const RowsOf<T> tile_rows{a.start + m * a.row_stride * PER_UNIT<T>, a.row_stride, a.k_stride};
            multiply(rows, panels, units, tile_rows, packed_b + n / LANES * panel_stride, panel_stride, tile);
            body(m, rows, n, columns, tile);
        }
    }
}

// A body that stores C in T, row-major with `stride` elements a row. bf16 is rounded here, once.
template <class T>
auto store_tile(T* c, int64_t stride) {
    return [c, stride](int64_t m, int rows, int64_t n, int64_t columns, const Tile& tile) {
        for (int r = 0; r < rows; ++r)
            for (int64_t j = 0; j < columns; j += LANES) store(c + (m + r) * stride + n + j, load(tile.row(r) + j), columns - j);
    };
}
// A body that adds the tile to C in f32.
inline auto add_tile(float* c, int64_t stride) {
    return [c, stride](int64_t m, int rows, int64_t n, int64_t columns, const Tile& tile) {
        for (int r = 0; r < rows; ++r)
            for (int64_t j = 0; j < columns; j += LANES) {
                float* place = c + (m + r) * stride + n + j;
                store(place, load(place, columns - j) + load(tile.row(r) + j), columns - j);
            }
    };
}

// ---- packing. T: the dtype of the product. S: the stored dtype; an f32 master weight is rounded to bf16 here.

// One panel (16 columns from n) of B = matrix^T, matrix: S[N, K] with rows `stride` apart: a weight in
// forward.
template <class T, class S>
void pack_transposed_panel(T* panel, const S* matrix, int64_t num_columns, int64_t k, int64_t stride, int64_t n);

// One panel of B = matrix, matrix: S[K, N]: a weight in dgrad, the inputs in wgrad.
template <class T, class S>
void pack_panel(T* panel, const S* matrix, int64_t k, int64_t num_columns, int64_t stride, int64_t n);

template <class T, class S>
void pack_transposed(T* packed, const S* matrix, int64_t num_columns, int64_t k, int64_t stride) {
    for (int64_t n = 0; n < num_columns; n += LANES)
        pack_transposed_panel(packed + packed_size<T>(n, k), matrix, num_columns, k, stride, n);
}
template <class T, class S>
void pack_plain(T* packed, const S* matrix, int64_t k, int64_t num_columns, int64_t stride) {
    for (int64_t n = 0; n < num_columns; n += LANES)
        pack_panel(packed + packed_size<T>(n, k), matrix, k, num_columns, stride, n);
}

// The columns of `matrix` as rows of A: A = matrix^T, matrix: T[K, num_columns]. f32 is read in place. bf16
// is interleaved into `pairs` [num_units(K), num_columns, 2], which puts the two elements of a pair next to
// each other.
template <class T>
RowsOf<T> columns_of(const T* matrix, int64_t k, int64_t num_columns, int64_t stride, T* pairs);

// Elements per row of `pairs` in even_rows: 0 if the rows are read in place.
template <class T> constexpr int64_t odd_row(int64_t k) { return k % PER_UNIT<T> ? k + 1 : 0; }

// num_rows rows of K elements as A: read in place, or, for bf16 with an odd K, copied to `pairs` [num_rows, K
// + 1] with a zero after each row.
template <class T>
RowsOf<T> even_rows(const T* rows, int64_t num_rows, int64_t k, T* pairs) {
    if (k % PER_UNIT<T> == 0) return rows_of(rows, k);
    for (int64_t m = 0; m < num_rows; ++m) {
        std::memcpy(pairs + m * (k + 1), rows + m * k, k * sizeof(T));
        pairs[m * (k + 1) + k] = T{};
    }
    return rows_of<T>(pairs, k + 1);
}

// C: T[num_rows, num_columns] = A: T[num_rows, K] @ packed B, on this thread. pairs: T[num_rows, odd_row(K)].
template <class T>
void product(T* c, const T* a, const T* packed_b, int64_t num_rows, int64_t num_columns, int64_t k, T* pairs) {
    for_tiles(num_rows, num_columns, k, even_rows(a, num_rows, k, pairs), packed_b, store_tile(c, num_columns));
}

}  // namespace reason_rl
