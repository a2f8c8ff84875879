// Attention on the CPU: forward over a pack of segments (training, prefill), and over a paged KV cache
// (decode op by op). The backward pass is in backward.cpp. Siblings: kernels/attention/,
// tests/kernels/test_attention.py.
//
// Both ops call `attend` (rows.h), as the native decode does, so that a token gets the same bits in all
// three.
#include "segments.h"

namespace reason_rl {
namespace {

constexpr int64_t FORWARD_ROWS = 1024;  // query rows per packing of their keys

// The arguments of one call of `attend`: query rows of one kv head that read the same prefix.
template <class T>
struct Rows {
    std::vector<const T*> q;
    std::vector<T*> out;
    std::vector<KeyBlocks<T>> own;

    // Adds a token's `repeat` query heads, which are adjacent in q and in out.
    void add(const T* token_q, T* token_out, const KeyBlocks<T>& keys, int64_t repeat, int64_t head_dim) {
        for (int64_t r = 0; r < repeat; ++r) {
            q.push_back(token_q + r * head_dim);
            out.push_back(token_out + r * head_dim);
            own.push_back(keys);
        }
    }
    void clear() { q.clear(), out.clear(), own.clear(); }
};

template <class T>
struct PackedForward {
    HeadShape shape;
    const std::vector<Chunk>& chunks;
    T* out;
    float* stats;
    const T *q, *k, *v;
    float scale;
    Scratch<AttendScratch> scratch{1};
    std::vector<T> panels{};
    Rows<T> rows{};

    // Runs one kv head of one chunk. Units run in reverse order, because later tokens of a segment take
    // longer.
    void operator()(int64_t unit) {
        unit = static_cast<int64_t>(chunks.size()) * shape.num_kv_heads - 1 - unit;
        const Chunk& chunk = chunks[unit / shape.num_kv_heads];
        const Segment& segment = chunk.segment;
        const int64_t head = unit % shape.num_kv_heads, head_dim = shape.head_dim, stride = shape.kv_stride();
        const int64_t own_at = segment.start * stride + head * head_dim, first = segment.start + chunk.first;
        const int64_t prefix_at = segment.prefix_length ? segment.prefix_start * stride + head * head_dim : 0;
        const int64_t own_keys = chunk.first + chunk.count, prefix_size = padded(segment.prefix_length) * head_dim;
        // Pack the keys of the prefix and of the segment into panels; values are read in place.
        panels.resize(prefix_size + padded(own_keys) * head_dim);
        T* own_panels = panels.data() + prefix_size;
        pack_transposed(panels.data(), k + prefix_at, segment.prefix_length, head_dim, stride);
        pack_transposed(own_panels, k + own_at, own_keys, head_dim, stride);
        rows.clear();
        // Token t of the chunk attends to the prefix and to chunk.first + t + 1 keys of its segment.
        for (int64_t t = 0; t < chunk.count; ++t) {
            const int64_t at = (first + t) * shape.q_stride() + head * shape.repeat * head_dim;
            rows.add(q + at, out + at, {own_panels, v + own_at, nullptr, chunk.first + t + 1, stride}, shape.repeat, head_dim);
        }
        const KeyBlocks<T> prefix{panels.data(), v + prefix_at, nullptr, segment.prefix_length, stride};
        attend<T>(rows.q.size(), rows.q.data(), rows.out.data(), prefix, rows.own.data(), head_dim, scale,
                  stats + 2 * (head * shape.num_tokens + first) * shape.repeat, *scratch);
    }
};

// out, q: fp[T, H, C]; k, v: fp[T, K, C]; stats: f32[K, T, H / K, 2]; segments: i32[S, 4].
void attention_fwd(Tensor out, Tensor stats, Tensor q, Tensor k, Tensor v, Tensor segments, double scale) {
    const char* op = "attention_fwd";
    const HeadShape shape = head_shape(op, q, k);
    const auto [t, num_kv_heads, repeat, c] = shape;
    // Cut the segments into chunks; a task runs one kv head of one chunk.
    const std::vector<Chunk> chunks = cut(read_segments(op, segments, t), std::max<int64_t>(1, FORWARD_ROWS / repeat));
    float* sums = data<float>(op, "stats", stats, {num_kv_heads, t, repeat, 2});
    by_dtype(op, "q", q, [&](auto zero) {
        using T = decltype(zero);
        T* result = data<T>(op, "out", out, {t, num_kv_heads * shape.repeat, c});
        const T* queries = data<const T>(op, "q", q, {t, num_kv_heads * shape.repeat, c});
        const T* keys = data<const T>(op, "k", k, {t, num_kv_heads, c});
        const T* values = data<const T>(op, "v", v, {t, num_kv_heads, c});
        parallel_dynamic(chunks.size() * shape.num_kv_heads, [&](auto next) {
            PackedForward<T> run{shape, chunks, result, sums, queries, keys, values, static_cast<float>(scale)};
            for (int64_t unit; (unit = next()) >= 0;) run(unit);
        });
    });
}

// ---- paged attention

// Block tables: blocks i64[num_rows, width]; the first lengths[r] keys of row r are valid.
struct Table {
    const int64_t *blocks, *lengths;
    int64_t num_rows, width;
    const int64_t* row(int64_t r) const { return blocks + r * width; }
};

Table read_table(const char* op, const std::string& name, const Tensor& table, const Tensor& lens, int64_t num_rows, int64_t least,
                 int64_t num_blocks) {
    const Table read{data<const int64_t>(op, (name + "_table").c_str(), table, {num_rows, ANY}),
                     data<const int64_t>(op, (name + "_lens").c_str(), lens, {num_rows}), num_rows, table.size(1)};
    for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t length = read.lengths[r];
        RR_CHECK(length >= least && length <= read.width * LANES, op, ": ", name, "_lens[", r, "] must lie in [", least, ", ",
                 read.width * LANES, "], got ", length);
        for (int64_t b = 0; b * LANES < length; ++b) {
            const int64_t block = read.row(r)[b];
            RR_CHECK(block >= 0 && block < num_blocks, op, ": ", name, "_table[", r, ", ", b, "] must lie in [0, ", num_blocks,
                     "), got ", block);
        }
    }
    return read;
}

// The rows that read each prefix: rows[starts[p]..starts[p + 1]), in ascending order.
struct Readers {
    std::vector<int64_t> starts, rows;
};

Readers sort_by_prefix(const char* op, const Tensor& prefix_index, int64_t num_rows, int64_t num_prefixes) {
    const int64_t* index = data<const int64_t>(op, "prefix_index", prefix_index, {num_rows});
    Readers readers{std::vector<int64_t>(num_prefixes + 1), std::vector<int64_t>(num_rows)};
    // A counting sort by prefix, which keeps the rows in order.
    for (int64_t r = 0; r < num_rows; ++r) {
        RR_CHECK(index[r] >= 0 && index[r] < num_prefixes, op, ": prefix_index[", r, "] must lie in [0, ", num_prefixes, "), got ",
                 index[r]);
        ++readers.starts[index[r] + 1];
    }
    for (int64_t p = 0; p < num_prefixes; ++p) readers.starts[p + 1] += readers.starts[p];
    std::vector<int64_t> next(readers.starts.begin(), readers.starts.end());
    for (int64_t r = 0; r < num_rows; ++r) readers.rows[next[index[r]]++] = r;
    return readers;
}

// The caches hold keys as rows [K, num_blocks, 16, C], so that keys are packed and values copied here. The
// native decode stores its keys as panels and skips this work.
template <class T>
struct PagedForward {
    HeadShape shape;  // num_tokens: the number of rows R
    const Table &prefixes, &own;
    const Readers& readers;
    T* out;
    const T *q, *k_cache, *v_cache;
    int64_t num_blocks;
    float scale;
    Scratch<AttendScratch> scratch{1};
    std::vector<T> prefix_memory{}, own_memory{};
    Rows<T> rows{};

    // Packs the keys, and copies the values, of one row of a block table.
    KeyBlocks<T> pack(T* memory, const Table& table, int64_t row, int64_t head) {
        const int64_t length = table.lengths[row], size = LANES * shape.head_dim, num = padded(length) / LANES;
        for (int64_t b = 0; b < num; ++b) {
            const int64_t at = (head * num_blocks + table.row(row)[b]) * size;
            const int64_t filled = std::min<int64_t>(LANES, length - b * LANES);
            pack_transposed_panel(memory + b * size, k_cache + at, filled, shape.head_dim, shape.head_dim, 0);
            std::memcpy(memory + (num + b) * size, v_cache + at, filled * shape.head_dim * sizeof(T));
        }
        return {memory, memory + num * size, nullptr, length};
    }

    // Runs one kv head of one prefix: all the rows that read it, `together` rows per call of `attend`.
    void operator()(int64_t unit) {
        const int64_t prefix = unit / shape.num_kv_heads, head = unit % shape.num_kv_heads, head_dim = shape.head_dim;
        const int64_t end = readers.starts[prefix + 1], together = std::max<int64_t>(1, QUERY_ROWS / shape.repeat);
        if (readers.starts[prefix] == end) return;
        prefix_memory.resize(2 * padded(prefixes.lengths[prefix]) * head_dim);
        own_memory.resize(2 * together * own.width * LANES * head_dim);
        const KeyBlocks<T> keys = pack(prefix_memory.data(), prefixes, prefix, head);
        for (int64_t first = readers.starts[prefix]; first < end; first += together) {
            rows.clear();
            for (int64_t i = first; i < std::min(end, first + together); ++i) {
                const int64_t row = readers.rows[i], at = row * shape.q_stride() + head * shape.repeat * head_dim;
                T* memory = own_memory.data() + 2 * (i - first) * own.width * LANES * head_dim;
                rows.add(q + at, out + at, pack(memory, own, row, head), shape.repeat, head_dim);
            }
            attend<T>(rows.q.size(), rows.q.data(), rows.out.data(), keys, rows.own.data(), head_dim, scale, nullptr, *scratch);
        }
    }
};

// out, q: fp[R, H, C]; caches: fp[K, num_blocks, 16, C]; prefix_table: i64[B, ..], prefix_lens: i64[B] for B
// prefixes; prefix_index, own_lens: i64[R]; own_table: i64[R, ..].
void paged_attention(Tensor out, Tensor q, Tensor k_cache, Tensor v_cache, Tensor prefix_table, Tensor prefix_lens,
                     Tensor prefix_index, Tensor own_table, Tensor own_lens, double scale) {
    const char* op = "paged_attention";
    RR_CHECK(q.dim() == 3 && k_cache.dim() == 4, op, ": q must have 3 dimensions and k_cache 4, got ", q.dim(), " and ",
             k_cache.dim());
    RR_CHECK(prefix_table.dim() == 2 && own_table.dim() == 2, op, ": prefix_table and own_table must have 2 dimensions, got ",
             prefix_table.dim(), " and ", own_table.dim());
    // Every block id and length is checked here, before any memory is read through it.
    const HeadShape shape = head_shape(op, "k_cache", q.size(0), q.size(1), k_cache.size(0), q.size(2));
    const int64_t num_blocks = k_cache.size(1), num_prefixes = prefix_table.size(0);
    const Table prefixes = read_table(op, "prefix", prefix_table, prefix_lens, num_prefixes, 0, num_blocks);
    const Table own = read_table(op, "own", own_table, own_lens, shape.num_tokens, 1, num_blocks);
    const Readers readers = sort_by_prefix(op, prefix_index, shape.num_tokens, num_prefixes);
    by_dtype(op, "q", q, [&](auto zero) {
        using T = decltype(zero);
        T* result = data<T>(op, "out", out, {shape.num_tokens, q.size(1), shape.head_dim});
        const T* queries = data<const T>(op, "q", q, {shape.num_tokens, q.size(1), shape.head_dim});
        const T* keys = data<const T>(op, "k_cache", k_cache, {shape.num_kv_heads, num_blocks, LANES, shape.head_dim});
        const T* values = data<const T>(op, "v_cache", v_cache, {shape.num_kv_heads, num_blocks, LANES, shape.head_dim});
        parallel_dynamic(num_prefixes * shape.num_kv_heads, [&](auto next) {
            PagedForward<T> run{shape, prefixes, own, readers, result, queries, keys, values, num_blocks,
                                static_cast<float>(scale)};
            for (int64_t unit; (unit = next()) >= 0;) run(unit);
        });
    });
}

RR_REGISTER(m) {
    m.impl("attention_fwd", TORCH_BOX(&attention_fwd));
    m.impl("paged_attention", TORCH_BOX(&paged_attention));
}

}  // namespace
}  // namespace reason_rl
