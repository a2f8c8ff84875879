// The segments of a pack, read from i32[S, 4] and checked, for forward and backward.
#pragma once

#include <vector>

#include "../common/tensor.h"
#include "rows.h"

namespace reason_rl {

struct Segment {
    int64_t start, length, prefix_start, prefix_length;
};

// q: [T, H, C]; k and v: [T, K, C]. kv head h serves the query heads [h * repeat, (h + 1) * repeat), repeat =
// H / K.
struct HeadShape {
    int64_t num_tokens, num_kv_heads, repeat, head_dim;
    int64_t q_stride() const { return num_kv_heads * repeat * head_dim; }
    int64_t kv_stride() const { return num_kv_heads * head_dim; }
};

inline HeadShape head_shape(const char* op, const char* k_name, int64_t num_tokens, int64_t num_heads, int64_t num_kv_heads,
                            int64_t head_dim) {
    RR_CHECK(num_kv_heads > 0 && num_heads > 0 && num_heads % num_kv_heads == 0, op, ": the heads of q must be a multiple of those",
             " of ", k_name, ", got ", num_heads, " and ", num_kv_heads);
    RR_CHECK(head_dim >= 2 && head_dim % 2 == 0 && head_dim <= MAX_HEAD_DIM, op, ": q's head dim must be even, from 2 to ",
             MAX_HEAD_DIM, ", got ", head_dim, " (impl=\"reference\" takes any)");
    return {num_tokens, num_kv_heads, num_heads / num_kv_heads, head_dim};
}

inline HeadShape head_shape(const char* op, const Tensor& q, const Tensor& k) {
    RR_CHECK(q.dim() == 3 && k.dim() == 3, op, ": q and k must have 3 dimensions, got ", q.dim(), " and ", k.dim());
    return head_shape(op, "k", q.size(0), q.size(1), k.size(1), q.size(2));
}

// segments: i32[S, 4]. They must cover [0, T) in order, and each prefix must end at or before its segment's
// start.
inline std::vector<Segment> read_segments(const char* op, const Tensor& tensor, int64_t num_tokens) {
    const int32_t* rows = data<const int32_t>(op, "segments", tensor, {ANY, 4});
    std::vector<Segment> segments(tensor.size(0));
    int64_t position = 0;
    for (size_t i = 0; i < segments.size(); ++i) {
        const Segment s = segments[i] = {rows[4 * i], rows[4 * i + 1], rows[4 * i + 2], rows[4 * i + 3]};
        RR_CHECK(s.start == position && s.length >= 1, op, ": segments must tile the pack: row ", i, " must start at ", position,
                 " with length >= 1, got start ", s.start, ", length ", s.length);
        const bool is_before = s.prefix_length == 0 || (s.prefix_start >= 0 && s.prefix_start + s.prefix_length <= s.start);
        RR_CHECK(s.prefix_length >= 0 && is_before, op, ": segments: the prefix of row ", i, " must lie in [0, ", s.start,
                 "), got start ", s.prefix_start, ", length ", s.prefix_length);
        position += s.length;
    }
    RR_CHECK(position == num_tokens, op, ": segments cover ", position, " tokens, the pack holds ", num_tokens);
    return segments;
}

// `count` consecutive tokens of one segment, from token `first` of the segment.
struct Chunk {
    Segment segment;
    int64_t first, count;
};

inline std::vector<Chunk> cut(const std::vector<Segment>& segments, int64_t most) {
    std::vector<Chunk> chunks;
    for (const Segment& segment : segments)
        for (int64_t first = 0; first < segment.length; first += most)
            chunks.push_back({segment, first, std::min(most, segment.length - first)});
    return chunks;
}

}  // namespace reason_rl
