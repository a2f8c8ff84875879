// The check of the sampling parameters that all three native samplers take: sample, sample_cuda and decode.
#pragma once

#include "../common/tensor.h"

namespace reason_rl {

inline void check_sampling(const char* op, double temperature, int64_t top_k, double top_p, double min_p) {
    RR_CHECK(temperature >= 0 && top_k >= 0 && top_p > 0 && top_p <= 1 && min_p >= 0 && min_p <= 1, op,
             ": needs temperature >= 0, top_k >= 0, 0 < top_p <= 1, 0 <= min_p <= 1, got ", temperature, ", ", top_k, ", ", top_p,
             ", ", min_p);
}

}  // namespace reason_rl
