// The border between cuda.cu, which nvcc compiles without torch, and cuda.cpp, which knows torch and not CUDA.
#pragma once

#include <cstdint>

namespace reason_rl {

struct SampleArguments {
    const float* logits;  // [rows, vocab]
    const int64_t *keys, *positions;
    int64_t* token;
    float *logprob, *kept_logmass;
    bool* is_broken;  // the row's logits hold NaN or inf, and its results nothing
    int32_t rows, vocab;
    double temperature, top_p, min_p;
    int64_t top_k;
};

// Starts the kernel on a cudaStream_t of the current device; nullptr, or what went wrong.
const char* launch_sample(const SampleArguments& arguments, void* stream);

}  // namespace reason_rl
