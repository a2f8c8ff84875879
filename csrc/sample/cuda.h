// The interface between cuda.cpp, which includes torch but not CUDA, and cuda.cu, which nvcc compiles without
// torch.
#pragma once

#include <cstdint>

namespace reason_rl {

struct SampleArguments {
    const float* logits;  // [rows, vocab]
    const int64_t *keys, *positions;  // [rows]
    int64_t* token;                   // [rows]
    float *logprob, *kept_logmass;    // [rows]
    bool* is_broken;                  // [rows]: the logits hold NaN or inf, and the row's results are not valid
    int32_t rows, vocab;
    double temperature, top_p, min_p;
    int64_t top_k;
};

// Launches the kernel on `stream`, a cudaStream_t of the current device. Returns nullptr, or CUDA's error
// message.
const char* launch_sample(const SampleArguments& arguments, void* stream);

}  // namespace reason_rl
