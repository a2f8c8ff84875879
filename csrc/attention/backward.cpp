// The backward pass of attention over a pack of segments, on the CPU. Siblings: cpu.cpp, kernels/attention/.
//
// The attention weights P are recomputed from q, k and each row's stats (highest score, sum of exponentials):
//
//     P = exp(q k^T * scale - highest) / total      dS = P * (dout v^T - sum(dout * out))
//     dq = scale * dS k                             dk = scale * dS^T q                      dv = P^T dout
//
// Precision: q k^T and dout v^T multiply operands in fp; P, dS and all other products are f32. dq, dk and dv
// are rounded to fp once, at the end.
//
// Parallelism: a unit is one kv head of one family, the segments that shared prefixes connect. No two units
// write the same sums. dk and dv of a shared prefix are summed over its segments in pack order. A pack with
// few families is cut further: the slices of a family have separate f32 sums, which are added in order. The
// cut depends on the pack only, not on the number of threads.
#include <memory>
#include <numeric>

#include "segments.h"

namespace reason_rl {
namespace {

constexpr int64_t BACKWARD_ROWS = 512;  // query rows per packing of a key tile
constexpr int64_t BLOCK_ROWS = 48;      // rows per block: the weights of a block with a key tile are in scratch
constexpr int64_t NUM_UNITS = 8;        // families are cut until there are as many units
constexpr int64_t SLICE_BYTES = 64 << 20;  // above this size of all slices' sums, only a single unit is cut, in two

struct FamilyChunk {
    Chunk chunk;
    int64_t own_offset, prefix_offset;  // of the segment and its prefix, in the family's tokens
    double work;
};

struct Family {
    std::vector<FamilyChunk> chunks;
    std::vector<Segment> segments;
    int64_t num_tokens = 0;
    double work = 0;
};

// Groups segments into families: a prefix joins its segment to every segment that the prefix overlaps. These
// are contiguous in the pack and in the family, so that a prefix is a contiguous range of the family's
// tokens.
std::vector<Family> find_families(const std::vector<Segment>& segments, int64_t chunk_tokens) {
    const int64_t count = segments.size();
    // Union-find over the segments; holder(token) is the segment that contains the token.
    std::vector<int64_t> root(count), starts(count), offsets(count), ids(count, -1);
    std::iota(root.begin(), root.end(), 0);
    for (int64_t i = 0; i < count; ++i) starts[i] = segments[i].start;
    const auto find = [&](int64_t i) {
        while (root[i] != i) i = root[i] = root[root[i]];
        return i;
    };
    const auto holder = [&](int64_t token) { return std::upper_bound(starts.begin(), starts.end(), token) - starts.begin() - 1; };
    for (int64_t i = 0; i < count; ++i) {
        const auto [start, length, prefix_start, prefix_length] = segments[i];
        if (prefix_length)
            for (int64_t j = holder(prefix_start); starts[j] < prefix_start + prefix_length; ++j) root[find(i)] = find(j);
    }
    // Collect each family's segments and chunks in pack order, with the work of each chunk: its number of
    // (query, key) pairs.
    std::vector<Family> families;
    for (int64_t i = 0; i < count; ++i) {
        int64_t& id = ids[find(i)];
        if (id < 0) id = families.size(), families.emplace_back();
        Family& family = families[id];
        const Segment& segment = segments[i];
        offsets[i] = family.num_tokens;
        int64_t prefix_offset = 0;
        if (segment.prefix_length) {
            const int64_t first = holder(segment.prefix_start);
            prefix_offset = offsets[first] + segment.prefix_start - starts[first];
        }
        for (const Chunk& chunk : cut({segment}, chunk_tokens)) {
            const double work = chunk.count * (segment.prefix_length + chunk.first + 0.5 * chunk.count);
            family.chunks.push_back({chunk, offsets[i], prefix_offset, work});
            family.work += work;
        }
        family.segments.push_back(segment);
        family.num_tokens += segment.length;
    }
    return families;
}

// A slice of one family's chunks, [first, last), in one kv head.
struct Unit {
    int64_t family, head, first, last;
    double work;
};

// Cuts every head of every family into slices of about equal work. The slices of head h of family f are
// units[starts[f * K + h]] up to the next start.
std::vector<Unit> cut_families(const std::vector<Family>& families, const HeadShape& shape, std::vector<int64_t>& starts) {
    const int64_t whole = families.size() * shape.num_kv_heads, token_bytes = 2 * padded(shape.head_dim) * sizeof(float);
    int64_t slices = (NUM_UNITS + whole - 1) / std::max<int64_t>(whole, 1);
    if (slices * shape.num_tokens * shape.num_kv_heads * token_bytes > SLICE_BYTES) slices = whole == 1 ? 2 : 1;
    std::vector<Unit> units;
    // unit.work and `done` count (query, key) pairs; the slice with number n ends at n / slices of the
    // family's.
    for (size_t f = 0; f < families.size(); ++f) {
        const Family& family = families[f];
        for (int64_t head = 0; head < shape.num_kv_heads; ++head) {
            starts.push_back(units.size());
            Unit unit{static_cast<int64_t>(f), head, 0, 0, 0};
            double done = 0;
            for (int64_t number = 1; unit.last < static_cast<int64_t>(family.chunks.size());) {
                unit.work += family.chunks[unit.last++].work;
                const bool is_last = unit.last == static_cast<int64_t>(family.chunks.size());
                if (!is_last && done + unit.work < family.work * number / slices) continue;
                units.push_back(unit);
                done += unit.work;
                while (done >= family.work * number / slices && number <= slices) ++number;
                unit = {unit.family, head, unit.last, unit.last, 0};
            }
        }
    }
    starts.push_back(units.size());
    return units;
}

// Packs T[count, columns], rows `stride` apart, into panels of f32, `count` rows deep.
template <class T>
void pack_f32(float* panels, const T* rows, int64_t count, int64_t columns, int64_t stride) {
    for (int64_t c = 0; c < columns; c += LANES)
        for (int64_t r = 0; r < count; ++r) store(panels + c * count + r * LANES, load(rows + r * stride + c, columns - c));
}

// C: f32[num_rows, padded(num_columns)] += A: f32[num_rows, k] @ packed B. Panels of B are stride_b apart.
void add_product(float* c, int64_t num_rows, int64_t num_columns, int64_t k, RowsOf<float> a, const float* b, int64_t stride_b) {
    const int64_t stride = padded(num_columns);
    Tile tile;
    for (int64_t n = 0; n < num_columns; n += TILE_COLUMNS) {
        const int64_t columns = std::min<int64_t>(TILE_COLUMNS, stride - n);
        const auto add = add_tile(c, stride);
        for (int64_t m = 0; m < num_rows; m += TILE_ROWS) {
            const int rows = static_cast<int>(std::min<int64_t>(TILE_ROWS, num_rows - m));
            const RowsOf<float> tile_rows{a.start + m * a.row_stride, a.row_stride, a.k_stride};
            multiply<float>(rows, static_cast<int>(columns / LANES), k, tile_rows, b + n / LANES * stride_b, stride_b, tile);
            add(m, rows, n, columns, tile);
        }
    }
}

template <class T>
struct Pointers {
    T *dq, *dk, *dv;
    const T *dout, *out, *q, *k, *v;
    const float* stats;
};

// dk and dv of one kv head of a family: the sums of its slices added in order, then rounded to T.
template <class T>
void write_keys(const HeadShape& shape, const Pointers<T>& at, float scale, const Family& family, int64_t head,
                const std::vector<const float*>& slices) {
    const int64_t head_dim = shape.head_dim, width = padded(head_dim), to_dv = family.num_tokens * width;
    int64_t offset = 0;
    for (const Segment& segment : family.segments) {
        for (int64_t t = 0; t < segment.length; ++t, offset += width) {
            const int64_t place = (segment.start + t) * shape.kv_stride() + head * head_dim;
            for (int64_t c = 0; c < head_dim; c += LANES) {
                F32x16 dk = splat(0.0f), dv = dk;
                for (const float* sums : slices) {
                    dk = dk + load(sums + offset + c);
                    dv = dv + load(sums + to_dv + offset + c);
                }
                store(at.dk + place + c, dk * scale, head_dim - c);
                store(at.dv + place + c, dv, head_dim - c);
            }
        }
    }
}

template <class T>
class Backward {
public:
    Backward(const HeadShape& shape, const Pointers<T>& at, float scale) : shape(shape), at(at), scale(scale) {}

    // Adds one unit to sums: f32[2, family's tokens, width], which holds dk / scale, then dv.
    void run(const Family& family, const Unit& unit, float* sums) {
        const int64_t to_dv = family.num_tokens * width;
        std::fill_n(sums, 2 * to_dv, 0.0f);
        for (int64_t i = unit.first; i < unit.last; ++i) {
            const auto& [chunk, own_offset, prefix_offset, work] = family.chunks[i];
            const Segment& segment = chunk.segment;
            const int64_t first = segment.start + chunk.first, rows = chunk.count * shape.repeat;
            read_rows(first, chunk.count, unit.head);
            float *prefix = sums + prefix_offset * width, *own = sums + own_offset * width;
            const KeyRange seen_by_all{segment.prefix_start, segment.prefix_length, segment.prefix_length, 0};
            const KeyRange causal{segment.start, chunk.first + chunk.count, chunk.first + 1, 1};
            add_range(seen_by_all, rows, unit.head, prefix, prefix + to_dv);
            add_range(causal, rows, unit.head, own, own + to_dv);
            write_rows(first, chunk.count, unit.head);
        }
    }

private:
    const HeadShape shape;
    const Pointers<T> at;
    const float scale;
    const int64_t max_rows = std::max(BACKWARD_ROWS, shape.repeat), head_dim = shape.head_dim, width = padded(head_dim);
    Scratch<T> queries{max_rows * head_dim}, douts{max_rows * head_dim};
    Scratch<T> key_panels{KEY_TILE * head_dim}, value_panels{KEY_TILE * head_dim};
    Scratch<float> wide_queries{max_rows * width}, wide_douts{max_rows * width}, wide_keys{KEY_TILE * width}, dq{max_rows * width};
    Scratch<float> tops{max_rows}, inverse_totals{max_rows}, deltas{max_rows};
    Scratch<float> weights{BLOCK_ROWS * KEY_TILE}, dscores{BLOCK_ROWS * KEY_TILE};

    // A contiguous range of keys. The chunk's first token sees `limit` of them, each later token `growth`
    // more.
    struct KeyRange {
        int64_t start, num_keys, limit, growth;
    };

    int64_t query_at(int64_t token, int64_t head) const { return token * shape.q_stride() + head * shape.repeat * head_dim; }

    // Reads q and dout of `count` tokens from `first`: rows in T, and blocks of BLOCK_ROWS rows as f32
    // panels.
    void read_rows(int64_t first, int64_t count, int64_t head) {
        const int64_t rows = count * shape.repeat, size = shape.repeat * head_dim;
        // q and dout in T, and delta = sum(out * dout) of each row.
        for (int64_t t = 0; t < count; ++t) {
            std::memcpy(queries + t * size, at.q + query_at(first + t, head), size * sizeof(T));
            std::memcpy(douts + t * size, at.dout + query_at(first + t, head), size * sizeof(T));
            for (int64_t r = 0; r < shape.repeat; ++r) {
                const T *out = at.out + query_at(first + t, head) + r * head_dim, *dout = douts + t * size + r * head_dim;
                F32x16 delta = splat(0.0f);
                for (int64_t c = 0; c < head_dim; c += LANES)
                    delta = fma(load(out + c, head_dim - c), load(dout + c, head_dim - c), delta);
                deltas[t * shape.repeat + r] = sum(delta);
            }
        }
        // The row's highest score and 1 / total; a zero gradient; q and dout as f32 panels.
        const float* stats = at.stats + 2 * (head * shape.num_tokens + first) * shape.repeat;
        for (int64_t row = 0; row < rows; ++row) tops[row] = stats[2 * row], inverse_totals[row] = 1.0f / stats[2 * row + 1];
        std::fill_n(static_cast<float*>(dq), rows * width, 0.0f);
        for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
            const int64_t block = std::min(BLOCK_ROWS, rows - row);
            pack_f32<T>(wide_queries + row * width, queries + row * head_dim, block, head_dim, head_dim);
            pack_f32<T>(wide_douts + row * width, douts + row * head_dim, block, head_dim, head_dim);
        }
    }

    // dq of `count` tokens from `first`, scaled and rounded to T.
    void write_rows(int64_t first, int64_t count, int64_t head) {
        for (int64_t row = 0; row < count * shape.repeat; ++row) {
            T* place = at.dq + query_at(first + row / shape.repeat, head) + row % shape.repeat * head_dim;
            for (int64_t c = 0; c < head_dim; c += LANES) store(place + c, load(dq + row * width + c) * scale, head_dim - c);
        }
    }

    // Adds the gradients of `rows` query rows with one range of keys to dq, dk and dv.
    void add_range(const KeyRange& range, int64_t rows, int64_t head, float* dk, float* dv) {
        const int64_t stride = shape.kv_stride();
        for (int64_t first = 0; first < range.num_keys; first += KEY_TILE) {
            const int64_t count = std::min(KEY_TILE, range.num_keys - first);
            const int64_t place = (range.start + first) * stride + head * head_dim;
            // Pack a key tile once for all rows: in T for the recomputed scores, in f32 for dq.
            pack_transposed<T>(key_panels, at.k + place, count, head_dim, stride);
            pack_transposed<T>(value_panels, at.v + place, count, head_dim, stride);
            pack_f32<T>(wide_keys, at.k + place, count, head_dim, stride);
            for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
                // A block of rows; causality ends its keys at those that its last row sees.
                const int64_t block = std::min(BLOCK_ROWS, rows - row);
                const int64_t limit = range.limit + (row + block - 1) / shape.repeat * range.growth;
                const int64_t num_keys = std::min(count, limit - first);
                if (num_keys <= 0) continue;
                float *to_dk = dk + first * width, *to_dv = dv + first * width;
                const int64_t depth = block * LANES;
                compute_scores(range, first, num_keys, row, block);
                add_product(to_dv, num_keys, head_dim, block, {weights, 1, KEY_TILE}, wide_douts + row * width, depth);
                add_product(to_dk, num_keys, head_dim, block, {dscores, 1, KEY_TILE}, wide_queries + row * width, depth);
                add_product(dq + row * width, block, head_dim, num_keys, {dscores, KEY_TILE, 1}, wide_keys, count * LANES);
            }
        }
    }

    // weights (P) and dscores (dS) of `count` rows from first_row with num_keys keys from first_key of the
    // range.
    void compute_scores(const KeyRange& range, int64_t first_key, int64_t num_keys, int64_t first_row, int64_t count) {
        const int64_t units = head_dim / PER_UNIT<T>, panel_size = LANES * head_dim;
        Tile scores, dweights;
        for (int64_t n = 0; n < num_keys; n += TILE_COLUMNS) {
            const int64_t columns = std::min<int64_t>(TILE_COLUMNS, padded(num_keys) - n);
            const int panels = static_cast<int>(columns / LANES);
            for (int64_t m = 0; m < count; m += TILE_ROWS) {
                const int rows = static_cast<int>(std::min<int64_t>(TILE_ROWS, count - m));
                const int64_t row = first_row + m;
                const RowsOf<T> q = rows_of<T>(queries + row * head_dim, head_dim);
                const RowsOf<T> dout = rows_of<T>(douts + row * head_dim, head_dim);
                multiply<T>(rows, panels, units, q, key_panels + n * head_dim, panel_size, scores);
                multiply<T>(rows, panels, units, dout, value_panels + n * head_dim, panel_size, dweights);
                // Keys past a row's limit get P = 0, and so dS = 0.
                for (int r = 0; r < rows; ++r) {
                    const int64_t limit = range.limit + (row + r) / shape.repeat * range.growth - first_key - n;
                    const float top = tops[row + r], inverse_total = inverse_totals[row + r], delta = deltas[row + r];
                    for (int64_t j = 0; j < columns; j += LANES) {
                        const F32x16 p = exp_below(load(scores.row(r) + j) * scale - top) * inverse_total;
                        const F32x16 weight = keep_first(p, limit - j, 0.0f);
                        store(weights + (m + r) * KEY_TILE + n + j, weight);
                        store(dscores + (m + r) * KEY_TILE + n + j, weight * (load(dweights.row(r) + j) - delta));
                    }
                }
            }
        }
    }
};

template <class T>
void run_backward(const HeadShape& shape, const std::vector<Family>& families, const Pointers<T>& at, float scale) {
    std::vector<int64_t> starts;
    const std::vector<Unit> units = cut_families(families, shape, starts);
    // The largest units first. A unit that is a whole family writes dk and dv itself.
    std::vector<int64_t> order(units.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return units[a].work > units[b].work; });
    std::vector<std::unique_ptr<Scratch<float>>> sums(units.size());
    parallel_dynamic(units.size(), [&](auto next) {
        Backward<T> worker(shape, at, scale);
        for (int64_t i; (i = next()) >= 0;) {
            const int64_t number = order[i];
            const Unit& unit = units[number];
            const Family& family = families[unit.family];
            sums[number] = std::make_unique<Scratch<float>>(2 * family.num_tokens * padded(shape.head_dim));
            worker.run(family, unit, *sums[number]);
            if (unit.last - unit.first < static_cast<int64_t>(family.chunks.size())) continue;
            write_keys<T>(shape, at, scale, family, unit.head, {*sums[number]});
            sums[number].reset();
        }
    });
    // Families that were cut: add their slices.
    parallel_for(starts.size() - 1, [&](int64_t i) {
        if (starts[i + 1] - starts[i] < 2) return;
        std::vector<const float*> slices;
        for (int64_t number = starts[i]; number < starts[i + 1]; ++number) slices.push_back(*sums[number]);
        const Unit& unit = units[starts[i]];
        write_keys<T>(shape, at, scale, families[unit.family], unit.head, slices);
    });
}

// dq, dout, out, q: fp[T, H, C]; dk, dv, k, v: fp[T, K, C]; stats: f32[K, T, H / K, 2]; segments: i32[S, 4].
void attention_bwd(Tensor dq, Tensor dk, Tensor dv, Tensor dout, Tensor out, Tensor stats, Tensor q, Tensor k, Tensor v,
                   Tensor segments, double scale) {
    const char* op = "attention_bwd";
    const HeadShape shape = head_shape(op, q, k);
    const int64_t t = shape.num_tokens, h = q.size(1), kv = shape.num_kv_heads, c = shape.head_dim;
    const int64_t chunk_tokens = std::max<int64_t>(1, BACKWARD_ROWS / shape.repeat);
    const std::vector<Family> families = find_families(read_segments(op, segments, t), chunk_tokens);
    const float* sums = data<const float>(op, "stats", stats, {kv, t, shape.repeat, 2});
    by_dtype(op, "q", q, [&](auto zero) {
        using T = decltype(zero);
        const Pointers<T> at{
            data<T>(op, "dq", dq, {t, h, c}), data<T>(op, "dk", dk, {t, kv, c}), data<T>(op, "dv", dv, {t, kv, c}),
            data<const T>(op, "dout", dout, {t, h, c}), data<const T>(op, "out", out, {t, h, c}),
            data<const T>(op, "q", q, {t, h, c}), data<const T>(op, "k", k, {t, kv, c}), data<const T>(op, "v", v, {t, kv, c}),
            sums};
        run_backward(shape, families, at, static_cast<float>(scale));
    });
}

RR_REGISTER(m) {
    m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
}

}  // namespace
}  // namespace reason_rl
