// Attention of query rows of one kv head over keys in blocks of 16: what training, paged attention and the decode step share.
//
// One row's result is a sum over key tiles of 128 counted from the start of each part (the prefix, then its own keys), with a
// running maximum: nothing in it knows the rows beside it, the number of threads, or where a block lies. Keys past a row's limit
// weigh exactly 0. Scores, weights and sums are f32, from operands in T; rounded once, at the end.
//
// Layout: block b holds 16 tokens. Its keys are one panel of gemm.h (head_dim x 16 keys), so that q @ k^T is `multiply`; its values
// are 16 rows as they come, read as the rows of B in weights @ V. Values past `num_keys` are never read.
#pragma once

#include <limits>

#include "../common/gemm.h"

namespace reason_rl {

constexpr int64_t KEY_TILE = 128, TILE_BLOCKS = KEY_TILE / LANES, TILE_CHUNKS = KEY_TILE / TILE_COLUMNS, MAX_HEAD_DIM = 256;
constexpr int64_t QUERY_ROWS = 24;  // rows that pass over a key tile while it is in the first cache

// The keys of one kv head: block b stands at keys + b * 16 * head_dim and values + b * 16 * (value_stride or head_dim); with a
// table, block table[b] does. The caller has checked the table.
template <class T>
struct KeyBlocks {
    const T* keys;
    const T* values;
    const int64_t* table;
    int64_t num_keys;
    int64_t value_stride = 0;  // elements from one token's values to the next one's; 0: head_dim

    int64_t block(int64_t b) const { return table ? table[b] : b; }
    bool same_as(const KeyBlocks& other) const { return keys == other.keys && values == other.values && table == other.table; }
};

// What `attend` works in, one for each thread: some 55 KB.
struct AttendScratch {
    alignas(64) Tile scores[TILE_CHUNKS];  // of TILE_ROWS rows with one key tile; then their weights
    alignas(64) unsigned char queries[QUERY_ROWS * MAX_HEAD_DIM * sizeof(float)];
    alignas(64) float sums[QUERY_ROWS * MAX_HEAD_DIM];  // of weight * value
    alignas(64) float totals[QUERY_ROWS * LANES];       // of the weights, by lane
    float tops[QUERY_ROWS + LANES];                     // the highest score so far
    int64_t limits[QUERY_ROWS];                         // how many keys of the part in hand a row may see
};

// One token's key and value into its slot (block * 16 + place in the block).
template <class T>
void put_key(T* keys, T* values, int64_t slot, const T* k, const T* v, int64_t head_dim) {
    constexpr int64_t UNIT = PER_UNIT<T>;
    const int64_t block = slot / LANES * LANES * head_dim, lane = slot % LANES;
    T* place = keys + block + lane * UNIT;
    for (int64_t c = 0; c < head_dim; c += UNIT, place += LANES * UNIT) std::memcpy(place, k + c, UNIT * sizeof(T));
    std::memcpy(values + block + lane * head_dim, v, head_dim * sizeof(T));
}

inline float* score_at(Tile* scores, int r, int64_t key) { return scores[key / TILE_COLUMNS].row(r) + key % TILE_COLUMNS; }

// scores[r][0..num_keys) = q[r] . key, for the keys from block `first` on. Blocks at even distances go through one call.
template <class T>
void multiply_keys(int rows, RowsOf<T> q, const KeyBlocks<T>& part, int64_t first, int64_t num_keys, int64_t head_dim,
                   Tile* scores) {
    const int64_t size = LANES * head_dim, units = head_dim / PER_UNIT<T>, num_blocks = (num_keys + LANES - 1) / LANES;
    for (int64_t b = 0, panels; b < num_blocks; b += panels) {
        const int64_t place = b % TILE_PANELS, room = std::min<int64_t>(TILE_PANELS - place, num_blocks - b);
        const int64_t id = part.block(first + b), step = room > 1 ? part.block(first + b + 1) - id : 0;
        panels = std::min<int64_t>(room, 2);
        while (panels < room && part.block(first + b + panels) == id + panels * step) ++panels;
        Tile part_of_chunk, &chunk = scores[b / TILE_PANELS], &tile = place ? part_of_chunk : chunk;
        multiply(rows, static_cast<int>(panels), units, q, part.keys + id * size, step * size, tile);
        for (int r = 0; place && r < rows; ++r)
            std::memcpy(chunk.row(r) + place * LANES, tile.row(r), panels * LANES * sizeof(float));
    }
}

// Scores -> weights, in place: exp(score * scale - the row's highest so far); from key `limits[r] - first` on they are 0. A row
// that sees none of these keys is left as it is. The highest scores of the rows rise together, as lanes.
inline void weigh(Tile* scores, int rows, int64_t first, int64_t num_keys, const int64_t* limits, float scale, float* tops,
                  float* shrinks, float* totals) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    float highs[LANES];
    store(highs, splat(LOWEST));
    for (int r = 0; r < rows; ++r) {
        if (limits[r] <= first) continue;
        F32x16 high = splat(LOWEST);
        for (int64_t j = 0; j < num_keys; j += LANES) {
            float* place = score_at(scores, r, j);
            const F32x16 score = keep_first(load(place) * scale, limits[r] - first - j, LOWEST);
            store(place, score);
            high = max(score, high);
        }
        highs[r] = highest(high);
    }
    const F32x16 before = load(tops), top = max(load(highs), before);  // the lanes past `rows` stay as they are
    store(tops, top);
    store(shrinks, exp_below(before - top));
    for (int r = 0; r < rows; ++r) {
        if (limits[r] <= first) continue;
        F32x16 sum = splat(0.0f);
        for (int64_t j = 0; j < num_keys; j += LANES) {
            float* place = score_at(scores, r, j);
            const F32x16 weight = exp_below(load(place) - tops[r]);
            store(place, weight);
            sum = sum + weight;
        }
        store(totals + r * LANES, fma(load(totals + r * LANES), splat(shrinks[r]), sum));
    }
}

// One tile's values for some rows, and where their sums go.
template <class T>
struct ValueTile {
    const Tile* weights;
    int64_t num_keys;
    const T* blocks[TILE_BLOCKS];
    int64_t stride, columns;  // columns: how many of the last panel's are real
    const float* shrinks;
    const bool* has_keys;
    float* sums;
    int64_t sums_stride;
};

// sums[r] = sums[r] * shrinks[r] + sum_k weights[r][k] * values[k], in PANELS panels; a row without keys here keeps its sums.
template <class T, int ROWS, int PANELS, bool IS_NARROW>
void add_values(const ValueTile<T>& tile) {
    F32x16 acc[ROWS][PANELS];
    for (auto& row : acc)
        for (auto& value : row) value = splat(0.0f);
    for (int64_t j = 0; j < tile.num_keys; j += LANES) {
        const T* row = tile.blocks[j / LANES];
        const float* weight = tile.weights[j / TILE_COLUMNS].values + j % TILE_COLUMNS;
        const int64_t last = std::min<int64_t>(LANES, tile.num_keys - j);
        for (int64_t k = 0; k < last; ++k, row += tile.stride) {
            F32x16 value[PANELS];
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) value[p] = IS_NARROW ? load(row, tile.columns) : load(row + p * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; ++p) acc[r][p] = fma(splat(weight[r * TILE_COLUMNS + k]), value[p], acc[r][p]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
        if (!tile.has_keys[r]) continue;
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) {
            float* place = tile.sums + r * tile.sums_stride + p * LANES;
            // + 0: a sum of -0 becomes +0, as it does for a row that goes on to weights of 0.
            store(place, fma(load(place), splat(tile.shrinks[r]), acc[r][p] + 0.0f));
        }
    }
}

template <class T, int PANELS, bool IS_NARROW = false>
void add_values_rows(int rows, const ValueTile<T>& tile) {
    if constexpr (TILE_ROWS > 2) {
        switch (rows) {
            case 3: return add_values<T, 3, PANELS, IS_NARROW>(tile);
            case 4: return add_values<T, 4, PANELS, IS_NARROW>(tile);
            case 5: return add_values<T, 5, PANELS, IS_NARROW>(tile);
            case 6: return add_values<T, 6, PANELS, IS_NARROW>(tile);
        }
    }
    if (rows == 2) return add_values<T, 2, PANELS, IS_NARROW>(tile);
    add_values<T, 1, PANELS, IS_NARROW>(tile);
}

template <class T>
void add_all_values(int rows, ValueTile<T>& tile, const KeyBlocks<T>& part, int64_t first, int64_t head_dim) {
    for (int64_t b = 0; b * LANES < tile.num_keys; ++b) tile.blocks[b] = part.values + part.block(first + b) * LANES * tile.stride;
    for (int64_t c = 0, step; c < head_dim; c += step) {
        const int64_t panels = std::min<int64_t>(TILE_PANELS, (head_dim - c) / LANES);
        tile.columns = std::min<int64_t>(LANES, head_dim - c);
        step = std::max<int64_t>(panels, 1) * LANES;
        if (panels == 0) add_values_rows<T, 1, true>(rows, tile);
        else if (panels == 1) add_values_rows<T, 1>(rows, tile);
        else if constexpr (TILE_PANELS > 1) {
            if (panels == 2) add_values_rows<T, 2>(rows, tile);
            else if (panels == 3) add_values_rows<T, 3>(rows, tile);
            else add_values_rows<T, 4>(rows, tile);
        }
        tile.sums += step;
        for (const T*& block : tile.blocks) block += step;
    }
}

// Rows [begin, end) of the block in hand over one part; scratch.limits says how many of its keys each may see.
template <class T>
void attend_part(int64_t begin, int64_t end, const KeyBlocks<T>& part, int64_t head_dim, float scale, AttendScratch& scratch) {
    const int64_t sums_stride = padded(head_dim), most = *std::max_element(scratch.limits + begin, scratch.limits + end);
    for (int64_t first = 0; first < most; first += KEY_TILE) {
        for (int64_t m = begin; m < end; m += TILE_ROWS) {
            const int rows = static_cast<int>(std::min<int64_t>(TILE_ROWS, end - m));
            const int64_t* limits = scratch.limits + m;
            const int64_t num_keys = std::min(KEY_TILE, *std::max_element(limits, limits + rows) - first);
            if (num_keys <= 0) continue;
            const RowsOf<T> q = rows_of(reinterpret_cast<const T*>(scratch.queries) + m * head_dim, head_dim);
            multiply_keys(rows, q, part, first / LANES, num_keys, head_dim, scratch.scores);
            float shrinks[LANES];  // what the rise of the highest score makes of earlier sums
            weigh(scratch.scores, rows, first, num_keys, limits, scale, scratch.tops + m, shrinks, scratch.totals + m * LANES);
            bool has_keys[TILE_ROWS];
            for (int r = 0; r < rows; ++r) has_keys[r] = limits[r] > first;
            ValueTile<T> tile{scratch.scores, num_keys, {}, part.value_stride ? part.value_stride : head_dim, 0,
                              shrinks, has_keys, scratch.sums + m * sums_stride, sums_stride};
            add_all_values(rows, tile, part, first / LANES, head_dim);
        }
    }
}

// out[i] = attention of q[i] over `prefix`, then own[i] (its num_keys is the row's limit), for `count` rows of one kv head: all its
// query heads, of one token or of many. Neighbouring rows with the same own keys are computed together. stats[i] = (highest score,
// sum of exp(score - highest)), which backward wants; may be null. head_dim even, 2..256.
template <class T>
void attend(int64_t count, const T* const* q, T* const* out, const KeyBlocks<T>& prefix, const KeyBlocks<T>* own, int64_t head_dim,
            float scale, float* stats, AttendScratch& scratch) {
    const int64_t sums_stride = padded(head_dim);
    for (int64_t start = 0; start < count; start += QUERY_ROWS) {
        const int64_t rows = std::min(QUERY_ROWS, count - start);
        const KeyBlocks<T>* keys = own + start;
        std::fill_n(scratch.sums, rows * sums_stride, 0.0f);
        std::fill_n(scratch.totals, rows * LANES, 0.0f);
        std::fill_n(scratch.tops, rows, -std::numeric_limits<float>::infinity());
        T* queries = reinterpret_cast<T*>(scratch.queries);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < head_dim; c += LANES)
                store(queries + r * head_dim + c, load(q[start + r] + c, head_dim - c), head_dim - c);
        std::fill_n(scratch.limits, rows, prefix.num_keys);
        attend_part(0, rows, prefix, head_dim, scale, scratch);
        for (int64_t r = 0; r < rows; ++r) scratch.limits[r] = keys[r].num_keys;
        for (int64_t begin = 0, end; begin < rows; begin = end) {
            for (end = begin + 1; end < rows && keys[end].same_as(keys[begin]);) ++end;
            attend_part(begin, end, keys[begin], head_dim, scale, scratch);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const float total = sum(load(scratch.totals + r * LANES));
            for (int64_t c = 0; c < head_dim; c += LANES)
                store(out[start + r] + c, load(scratch.sums + r * sums_stride + c) / total, head_dim - c);
            if (stats) stats[2 * (start + r)] = scratch.tops[r], stats[2 * (start + r) + 1] = total;
        }
    }
}

}  // namespace reason_rl
