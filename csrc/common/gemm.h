// The matrix product that every kernel shares: C[m, n] = sum_k A[m, k] * B[k, n], accumulated in f32.
//
// One rule makes the whole project's bits: an element of C is summed over k in order, in blocks of K_BLOCK terms whose sums are
// added in order, by the same instruction at every step. Neither the number of rows, nor a tile's place, nor the threads enter.
// bf16 operands are taken in pairs (k, k + 1) by the dot-product instruction where there is one (its products are exact and its
// sums f32), and by two multiply-adds elsewhere.
//
// B is packed in panels of 16 columns, so that the inner loop reads it straight through:
//     f32    [N/16][K][16]          bf16    [N/16][ceil(K/2)][16][2]          (zeros beyond N and K)
// A is read where it lies, with a row stride and a k stride in units (a float, or a pair of bf16). An A whose rows are an odd
// number of bf16 long is copied first (`even_rows`).
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace reason_rl {

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_PANELS = 4;  // 24 accumulators, 4 of B, and A broadcast from memory: 29 of 32 registers
#elif defined(__AVX2__)
constexpr int TILE_ROWS = 6, TILE_PANELS = 1;  // 12 of 16 registers
#else
constexpr int TILE_ROWS = 2, TILE_PANELS = 1;
#endif
constexpr int TILE_COLUMNS = TILE_PANELS * LANES;
constexpr int64_t K_BLOCK = 128;  // short sums, added up: the error of a long dot product stays that of a good BLAS
constexpr int64_t ROW_BLOCK = 96;  // rows that a thread takes at a time: their A stays in the first cache

// A tile of C in f32, TILE_COLUMNS floats a row.
struct Tile {
    alignas(64) float values[TILE_ROWS * TILE_COLUMNS];
    const float* row(int64_t m) const { return values + m * TILE_COLUMNS; }
    float* row(int64_t m) { return values + m * TILE_COLUMNS; }
};

// Units of k: a float, or a pair of bf16.
template <class T> constexpr int64_t PER_UNIT = sizeof(T) == 4 ? 1 : 2;
template <class T> constexpr int64_t num_units(int64_t k) { return (k + PER_UNIT<T> - 1) / PER_UNIT<T>; }
// Elements of T in a packed B of K rows and N columns.
template <class T> constexpr int64_t packed_size(int64_t n, int64_t k) {
    return padded(n) * num_units<T>(k) * PER_UNIT<T>;
}

template <class T>
struct RowsOf {  // A, strides in units
    const T* start;
    int64_t row_stride, k_stride;
};
// Rows that lie one after the other, K elements each (K even for bf16).
template <class T> RowsOf<T> rows_of(const T* start, int64_t row_length) { return {start, row_length / PER_UNIT<T>, 1}; }

// tile[0..rows)[0..panels * 16) = A's rows times the panels at `b`, over `units` units of k; panel_stride in elements of T.
template <class T>
void multiply(int rows, int panels, int64_t units, RowsOf<T> a, const T* b, int64_t panel_stride, Tile& tile);

// for_tiles(M, N, ...): body(m, rows, n, columns, tile) for every tile of C; the rows of one tile end at M, the columns at N.
template <class T, class F>
void for_tiles(int64_t num_rows, int64_t num_columns, int64_t k, RowsOf<T> a, const T* packed_b, F&& body) {
    const int64_t units = num_units<T>(k), panel_stride = units * PER_UNIT<T> * LANES;
    Tile tile;
    for (int64_t n = 0; n < num_columns; n += TILE_COLUMNS) {
        const int64_t columns = std::min<int64_t>(TILE_COLUMNS, num_columns - n);
        const int panels = static_cast<int>((columns + LANES - 1) / LANES);
        for (int64_t m = 0; m < num_rows; m += TILE_ROWS) {
            const int rows = static_cast<int>(std::min<int64_t>(TILE_ROWS, num_rows - m));
            const RowsOf<T> part{a.start + m * a.row_stride * PER_UNIT<T>, a.row_stride, a.k_stride};
            multiply(rows, panels, units, part, packed_b + n / LANES * panel_stride, panel_stride, tile);
            body(m, rows, n, columns, tile);
        }
    }
}

// The usual body: C in T, row-major, `stride` elements a row.
template <class T>
auto store_tile(T* c, int64_t stride) {
    return [c, stride](int64_t m, int rows, int64_t n, int64_t columns, const Tile& tile) {
        for (int r = 0; r < rows; ++r)
            for (int64_t j = 0; j < columns; j += LANES) store(c + (m + r) * stride + n + j, load(tile.row(r) + j), columns - j);
    };
}
// C += tile, in f32.
inline auto add_tile(float* c, int64_t stride) {
    return [c, stride](int64_t m, int rows, int64_t n, int64_t columns, const Tile& tile) {
        for (int r = 0; r < rows; ++r)
            for (int64_t j = 0; j < columns; j += LANES) {
                float* place = c + (m + r) * stride + n + j;
                store(place, load(place, columns - j) + load(tile.row(r) + j), columns - j);
            }
    };
}

// ---- packing. T is what the product computes in, S what the matrix is stored in (f32 masters are rounded to bf16 on the way).

// One panel (16 columns from n on) of B = matrix^T, matrix [N, K] row-major: the panel of a weight in a forward product.
template <class T, class S>
void pack_transposed_panel(T* panel, const S* matrix, int64_t num_columns, int64_t k, int64_t stride, int64_t n);

// One panel of B = matrix, matrix [K, N] row-major: a weight in dgrad, the inputs in wgrad.
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

// The number of columns as A's rows: A = matrix^T, matrix [K, M] row-major. f32 is read in place; bf16 rows are interleaved into
// `pairs` (num_units(K) * M * 2 elements) so that the two of a pair lie side by side.
template <class T>
RowsOf<T> columns_of(const T* matrix, int64_t k, int64_t num_columns, int64_t stride, T* pairs);

// Elements that each row of K takes in the `pairs` of even_rows: none where the rows are read in place.
template <class T> constexpr int64_t odd_row(int64_t k) { return k % PER_UNIT<T> ? k + 1 : 0; }

// Rows of K elements as A wants them: in place, or, where K is odd and T bf16, copied to `pairs` [num_rows, K + 1] with a zero
// behind each.
template <class T>
RowsOf<T> even_rows(const T* rows, int64_t num_rows, int64_t k, T* pairs) {
    if (k % PER_UNIT<T> == 0) return rows_of(rows, k);
    for (int64_t m = 0; m < num_rows; ++m) {
        std::memcpy(pairs + m * (k + 1), rows + m * k, k * sizeof(T));
        pairs[m * (k + 1) + k] = T{};
    }
    return rows_of<T>(pairs, k + 1);
}

// C [M, N] = A [M, K] @ packed B, C and A in T, on this thread; pairs [M, odd_row(K)].
template <class T>
void product(T* c, const T* a, const T* packed_b, int64_t num_rows, int64_t num_columns, int64_t k, T* pairs) {
    for_tiles(num_rows, num_columns, k, even_rows(a, num_rows, k, pairs), packed_b, store_tile(c, num_columns));
}

}  // namespace reason_rl
