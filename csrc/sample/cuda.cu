// `sample` on a GPU: one thread block per row runs select.h's algorithm. Siblings: kernels/sample/cuda.py;
// tests/kernels/test_sample_cuda.py, and test_sample_select.py, which needs no GPU.
//
// A row is read three times, and up to four times more for a cut. After the first time it is expected in the
// L2 cache.
#include "cuda.h"
#include "select.h"

namespace reason_rl {
namespace {

constexpr int THREADS = 1024, WARPS = THREADS / 32;
constexpr unsigned ALL = 0xffffffffu;

template <class T> __device__ T from_lane(T x, int other) { return __shfl_xor_sync(ALL, x, other); }
template <> __device__ Score from_lane(Score x, int other) { return {from_lane(x.value, other), from_lane(x.token, other)}; }

// The Block of select.h for the threads of one thread block.
struct CudaBlock {
    struct alignas(16) Slot {
        char bytes[16];
        template <class T> __device__ T& as() { return *reinterpret_cast<T*>(bytes); }
    };
    Slot* slots;  // shared memory, one per warp

    __device__ int rank() const { return threadIdx.x; }
    __device__ static constexpr int size() { return THREADS; }
    __device__ void sync() const { __syncthreads(); }

    // Combines all threads' x as a fixed tree over the lanes, then over the warps: all threads get the same
    // bits.
    template <class T, class F>
    __device__ T all(T x, F combine) {
        for (int other = 16; other; other /= 2) x = combine(x, from_lane(x, other));
        sync();  // threads may still read the slots of an earlier call
        if (threadIdx.x % 32 == 0) slots[threadIdx.x / 32].as<T>() = x;
        sync();
        x = slots[threadIdx.x % WARPS].as<T>();
        for (int other = WARPS / 2; other; other /= 2) x = combine(x, from_lane(x, other));
        return x;
    }
    __device__ float highest(float x) { return all(x, [](float a, float b) { return fmaxf(a, b); }); }
    __device__ double sum(double x) { return all(x, [](double a, double b) { return a + b; }); }
    __device__ uint64_t sum(uint64_t x) { return all(x, [](uint64_t a, uint64_t b) { return a + b; }); }
    __device__ Score winner(Score x) { return all(x, [](Score a, Score b) { return a.better(b); }); }

    __device__ Tally exclusive_sum(Tally own) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        // An inclusive scan over the warp's lanes.
        Tally to_here = own;
        for (int step = 1; step < 32; step *= 2) {
            const Tally lower{__shfl_up_sync(ALL, to_here.mass, step), __shfl_up_sync(ALL, to_here.count, step)};
            if (lane >= step) to_here = to_here + lower;
        }
        sync();
        // The totals of the lower warps.
        if (lane == 31) slots[warp].as<Tally>() = to_here;
        sync();
        Tally sum{to_here.mass - own.mass, to_here.count - own.count};
        for (int i = 0; i < warp; ++i) sum = sum + slots[i].as<Tally>();
        return sum;
    }
    __device__ void add(Tally& bin, uint32_t count, uint64_t mass) const {
        atomicAdd(&bin.count, count);
        if (mass) atomicAdd(reinterpret_cast<unsigned long long*>(&bin.mass), static_cast<unsigned long long>(mass));
    }
};

// One block per row of a.logits: f32[rows, vocab].
__global__ void __launch_bounds__(THREADS) sample_kernel(SampleArguments a, CutSpec spec) {
    __shared__ Shared shared;
    __shared__ CudaBlock::Slot slots[WARPS];
    CudaBlock block{slots};
    const int64_t row = blockIdx.x;
    const SampledToken sampled = sample_row(block, shared, a.logits + row * a.vocab, a.vocab, spec,
                                            static_cast<uint64_t>(a.keys[row]), static_cast<uint32_t>(a.positions[row]));
    if (threadIdx.x) return;
    a.is_broken[row] = sampled.token < 0;
    a.token[row] = sampled.token, a.logprob[row] = sampled.logprob, a.kept_logmass[row] = sampled.kept_logmass;
}

}  // namespace

const char* launch_sample(const SampleArguments& a, void* stream) {
    if (!a.rows) return nullptr;
    sample_kernel<<<a.rows, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(a, cut_spec(a.temperature, a.top_k, a.top_p, a.min_p));
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace reason_rl
