// Attention of query rows of one kv head over keys in blocks of 16: shared by training, prefill, paged
// attention and the native decode.
//
// A row attends to its prefix, then to its own keys. It visits key tiles of 128, counted from the start of
// each range, with a running maximum. Its result does not depend on the other rows, on the number of threads,
// or on which blocks hold the keys. Keys past a row's limit get a weight of exactly 0. Operands are T;
// scores, weights and sums are f32; the output is rounded to T once, at the end.
//
// Layout: a block holds 16 tokens. Its keys are one panel of gemm.h (C x 16 keys), so that q @ k^T is
// `multiply`. Its values are 16 rows, read as the rows of B in weights @ V. Values past num_keys are not
// read.
#pragma once

#include <limits>

#include "../common/gemm.h"

namespace reason_rl {

constexpr int64_t KEY_TILE = 128, TILE_BLOCKS = KEY_TILE / LANES, TILE_CHUNKS = KEY_TILE / TILE_COLUMNS, MAX_HEAD_DIM = 256;
constexpr int64_t QUERY_ROWS = 24;  // rows per pass over a key tile while it is in the first-level cache

// The keys of one kv head: block b is at keys + b * 16 * C and values + b * 16 * (value_stride or C). With a
// block table, block b is table[b], which the caller has checked.
template <class T>
struct KeyBlocks {
    const T* keys;
    const T* values;
    const int64_t* table;
    int64_t num_keys;
    int64_t value_stride = 0;  // elements between the values of two tokens; 0: C

    int64_t block(int64_t b) const { return table ? table[b] : b; }
    bool same_as(const KeyBlocks& other) const { return keys == other.keys && values == other.values && table == other.table; }
};

// The scratch memory of `attend`, one per thread, about 55 KB.
struct AttendScratch {
    alignas(64) Tile scores[TILE_CHUNKS];  // of TILE_ROWS rows with one key tile; overwritten by their weights
    alignas(64) unsigned char queries[QUERY_ROWS * MAX_HEAD_DIM * sizeof(float)];
    alignas(64) float sums[QUERY_ROWS * MAX_HEAD_DIM];  // sum of weight * value
    alignas(64) float totals[QUERY_ROWS * LANES];       // sum of weights, per lane
    float tops[QUERY_ROWS + LANES];                     // the running maximum of the scores
    int64_t limits[QUERY_ROWS];                         // how many keys of the current range a row sees
};

// Stores one token's k, v: T[C] in its slot (block * 16 + position in the block).
template <class T>
void put_key(T* keys, T* values, int64_t slot, const T* k, const T* v, int64_t head_dim) {
    constexpr int64_t UNIT = PER_UNIT<T>;
    const int64_t block = slot / LANES * LANES * head_dim, lane = slot % LANES;
    T* place = keys + block + lane * UNIT;
    for (int64_t c = 0; c < head_dim; c += UNIT, place += LANES * UNIT) std::memcpy(place, k + c, UNIT * sizeof(T));
    std::memcpy(values + block + lane * head_dim, v, head_dim * sizeof(T));
}

// The scores of a key tile take TILE_CHUNKS tiles; this is row r's score with key `key` of the key tile.
inline float* score_at(Tile* scores, int r, int64_t key) { return scores[key / TILE_COLUMNS].row(r) + key % TILE_COLUMNS; }

// scores[r][j] = q[r] . key j, j < num_keys, for the keys from block `first`. Blocks at equal distances are
// multiplied in one call.
template <class T>
void multiply_keys(int rows, RowsOf<T> q, const KeyBlocks<T>& range, int64_t first, int64_t num_keys, int64_t head_dim,
                   Tile* scores) {
    const int64_t size = LANES * head_dim, units = head_dim / PER_UNIT<T>, num_blocks = (num_keys + LANES - 1) / LANES;
    for (int64_t b = 0, panels; b < num_blocks; b += panels) {
        // The longest run of blocks at equal distances that fits the current tile of scores.
        const int64_t place = b % TILE_PANELS, room = std::min<int64_t>(TILE_PANELS - place, num_blocks - b);
        const int64_t id = range.block(first + b), step = room > 1 ? range.block(first + b + 1) - id : 0;
        panels = std::min<int64_t>(room, 2);
        while (panels < room && range.block(first + b + panels) == id + panels * step) ++panels;
        // A run that starts inside the tile is computed in another tile and copied.
        Tile partial, &chunk = scores[b / TILE_PANELS], &tile = place ? partial : chunk;
        multiply(rows, static_cast<int>(panels), units, q, range.keys + id * size, step * size, tile);
        for (int r = 0; place && r < rows; ++r)
            std::memcpy(chunk.row(r) + place * LANES, tile.row(r), panels * LANES * sizeof(float));
    }
}

// Scores -> weights, in place: exp(score * scale - running maximum). Keys from index limits[r] - first get
// weight 0. A row that sees none of these keys is skipped. tops and rescale of all rows are updated as lanes
// of one vector.
inline void softmax_tile(Tile* scores, int rows, int64_t first, int64_t num_keys, const int64_t* limits, float scale, float* tops,
                         float* rescale, float* totals) {
    constexpr float LOWEST = -std::numeric_limits<float>::infinity();
    float highs[LANES];
    store(highs, splat(LOWEST));
    // The maximum of each row's visible scores.
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
    // Raise the running maxima; `rescale` corrects the earlier sums. Lanes past `rows` keep their values.
    const F32x16 before = load(tops), top = max(load(highs), before);
    store(tops, top);
    store(rescale, exp_below(before - top));
    // The weights, and their sum per lane.
    for (int r = 0; r < rows; ++r) {
        if (limits[r] <= first) continue;
        F32x16 sum = splat(0.0f);
        for (int64_t j = 0; j < num_keys; j += LANES) {
            float* place = score_at(scores, r, j);
            const F32x16 weight = exp_below(load(place) - tops[r]);
            store(place, weight);
            sum = sum + weight;
        }
        store(totals + r * LANES, fma(load(totals + r * LANES), splat(rescale[r]), sum));
    }
}

// One key tile's weights and values, and the sums they are added to.
template <class T>
struct ValueTile {
    const Tile* weights;
    int64_t num_keys;
    const T* blocks[TILE_BLOCKS];
    int64_t stride, columns;  // columns: the valid ones of the last panel
    const float* rescale;
    const bool* has_keys;
    float* sums;
    int64_t sums_stride;
};

// sums[r] = sums[r] * rescale[r] + sum_k weights[r][k] * values[k], for PANELS panels. A row that sees no key
// here keeps its sums.
template <class T, int ROWS, int PANELS, bool IS_NARROW>
void add_values(const ValueTile<T>& tile) {
    // Accumulate in registers, key by key.
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
    // Add to the sums, rescaled to the new maximum.
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
        if (!tile.has_keys[r]) continue;
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) {
            float* place = tile.sums + r * tile.sums_stride + p * LANES;
            // + 0 turns a sum of -0 into +0, as adding a later weight of 0 would.
            store(place, fma(load(place), splat(tile.rescale[r]), acc[r][p] + 0.0f));
        }
    }
}

// add_values for all C columns of the values. The last C % 16 columns are one panel, which is loaded in part.
template <class T>
void add_all_values(int rows, ValueTile<T>& tile, const KeyBlocks<T>& range, int64_t first, int64_t head_dim) {
    for (int64_t b = 0; b * LANES < tile.num_keys; ++b)
        tile.blocks[b] = range.values + range.block(first + b) * LANES * tile.stride;
    for (int64_t c = 0, step; c < head_dim; c += step) {
        const int64_t panels = std::min<int64_t>(TILE_PANELS, (head_dim - c) / LANES);
        tile.columns = std::min<int64_t>(LANES, head_dim - c);
        step = std::max<int64_t>(panels, 1) * LANES;
        with_constant<TILE_ROWS>(rows, [&](auto num_rows) {
            constexpr int ROWS = decltype(num_rows)::value;
            if (panels == 0) return add_values<T, ROWS, 1, true>(tile);
            with_constant<TILE_PANELS>(panels, [&](auto num) { add_values<T, ROWS, decltype(num)::value, false>(tile); });
        });
        tile.sums += step;
        for (const T*& block : tile.blocks) block += step;
    }
}

// Rows [begin, end) of scratch over one range; row r sees the first scratch.limits[r] of its keys.
template <class T>
void attend_range(int64_t begin, int64_t end, const KeyBlocks<T>& range, int64_t head_dim, float scale, AttendScratch& scratch) {
    const int64_t sums_stride = padded(head_dim), most = *std::max_element(scratch.limits + begin, scratch.limits + end);
    for (int64_t first = 0; first < most; first += KEY_TILE) {
        for (int64_t m = begin; m < end; m += TILE_ROWS) {
            const int rows = static_cast<int>(std::min<int64_t>(TILE_ROWS, end - m));
            const int64_t* limits = scratch.limits + m;
            const int64_t num_keys = std::min(KEY_TILE, *std::max_element(limits, limits + rows) - first);
            if (num_keys <= 0) continue;
            // Scores, then weights in their place.
            const RowsOf<T> q = rows_of(reinterpret_cast<const T*>(scratch.queries) + m * head_dim, head_dim);
            multiply_keys(rows, q, range, first / LANES, num_keys, head_dim, scratch.scores);
            float rescale[LANES];  // exp(old maximum - new maximum)
            softmax_tile(scratch.scores, rows, first, num_keys, limits, scale, scratch.tops + m, rescale,
                         scratch.totals + m * LANES);
            // sums = sums * rescale + weights @ V.
            bool has_keys[TILE_ROWS];
            for (int r = 0; r < rows; ++r) has_keys[r] = limits[r] > first;
            ValueTile<T> tile{scratch.scores, num_keys, {}, range.value_stride ? range.value_stride : head_dim, 0,
                              rescale, has_keys, scratch.sums + m * sums_stride, sums_stride};
            add_all_values(rows, tile, range, first / LANES, head_dim);
        }
    }
}

// out[i] = attention of q[i] over `prefix`, then over own[i], whose num_keys is the row's limit. The `count`
// rows belong to one kv head: all its query heads, of one or more tokens. Neighbouring rows with the same own
// keys are computed together. stats[i] = (highest score, sum of exp(score - highest)) for backward; null: not
// needed. C is even, 2..256.
template <class T>
void attend(int64_t count, const T* const* q, T* const* out, const KeyBlocks<T>& prefix, const KeyBlocks<T>* own, int64_t head_dim,
            float scale, float* stats, AttendScratch& scratch) {
    const int64_t sums_stride = padded(head_dim);
    for (int64_t start = 0; start < count; start += QUERY_ROWS) {
        const int64_t rows = std::min(QUERY_ROWS, count - start);
        const KeyBlocks<T>* keys = own + start;
        // Start a block of rows: empty sums, and a copy of the queries.
        std::fill_n(scratch.sums, rows * sums_stride, 0.0f);
        std::fill_n(scratch.totals, rows * LANES, 0.0f);
        std::fill_n(scratch.tops, rows, -std::numeric_limits<float>::infinity());
        T* queries = reinterpret_cast<T*>(scratch.queries);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < head_dim; c += LANES)
                store(queries + r * head_dim + c, load(q[start + r] + c, head_dim - c), head_dim - c);
        // The prefix, which all rows share, then the own keys of each run of rows that share them.
        std::fill_n(scratch.limits, rows, prefix.num_keys);
        attend_range(0, rows, prefix, head_dim, scale, scratch);
        for (int64_t r = 0; r < rows; ++r) scratch.limits[r] = keys[r].num_keys;
        for (int64_t begin = 0, end; begin < rows; begin = end) {
            for (end = begin + 1; end < rows && keys[end].same_as(keys[begin]);) ++end;
            attend_range(begin, end, keys[begin], head_dim, scale, scratch);
        }
        // Divide by the sum of weights and round to T.
        for (int64_t r = 0; r < rows; ++r) {
            const float total = sum(load(scratch.totals + r * LANES));
            for (int64_t c = 0; c < head_dim; c += LANES)
                store(out[start + r] + c, load(scratch.sums + r * sums_stride + c) / total, head_dim - c);
            if (stats) stats[2 * (start + r)] = scratch.tops[r], stats[2 * (start + r) + 1] = total;
        }
    }
}

}  // namespace reason_rl
