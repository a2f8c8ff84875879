// csrc/sample/select.h on the host, with std::threads as the threads of a GPU block. Loaded by
// tests/kernels/test_sample_select.py.
#include <atomic>
#include <barrier>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

#include "sample/select.h"

namespace reason_rl {

// What the threads of a block share: a barrier, and a slot per thread for reductions.
struct BlockMemory {
    explicit BlockMemory(int size) : barrier(size), slots(size) {}
    std::barrier<> barrier;
    struct alignas(64) Slot {
        unsigned char bytes[16];
    };
    std::vector<Slot> slots;
};

// The Block of select.h for one thread.
struct HostBlock {
    BlockMemory& memory;
    int own_rank, num;

    int rank() const { return own_rank; }
    int size() const { return num; }
    void sync() { memory.barrier.arrive_and_wait(); }

    // Combines the values of ranks 0..end - 1 in order; every thread gets the result.
    template <class T, class F>
    T all(T own, int end, F combine) {
        std::memcpy(memory.slots[own_rank].bytes, &own, sizeof own);
        sync();
        T sum{};
        for (int i = 0; i < end; ++i) {
            T other;
            std::memcpy(&other, memory.slots[i].bytes, sizeof other);
            sum = i ? combine(sum, other) : other;
        }
        sync();
        return sum;
    }
    float highest(float x) { return all(x, num, [](float a, float b) { return fmaxf(a, b); }); }
    double sum(double x) { return all(x, num, [](double a, double b) { return a + b; }); }
    uint64_t sum(uint64_t x) { return all(x, num, [](uint64_t a, uint64_t b) { return a + b; }); }
    Score winner(Score x) { return all(x, num, [](Score a, Score b) { return a.better(b); }); }
    Tally exclusive_sum(Tally x) { return all(x, own_rank, [](Tally a, Tally b) { return a + b; }); }
    void add(Tally& bin, uint32_t count, uint64_t mass) {
        std::atomic_ref(bin.count) += count;
        std::atomic_ref(bin.mass) += mass;
    }
};

}  // namespace reason_rl

// logits: f32[rows, vocab]; keys, positions, token: i64[rows]; logprob, kept_logmass: f32[rows].
extern "C" void sample_on_host(
    const float* logits, int64_t rows, int64_t vocab, const int64_t* keys, const int64_t* positions, double temperature,
    int64_t top_k, double top_p, double min_p, int64_t num_threads, int64_t* token, float* logprob, float* kept_logmass) {
    using namespace reason_rl;
    const CutSpec spec = cut_spec(temperature, top_k, top_p, min_p);
    BlockMemory memory(static_cast<int>(num_threads));
    const auto shared = std::make_unique<Shared>();
    std::vector<std::thread> threads;
    for (int rank = 0; rank < num_threads; ++rank)
        threads.emplace_back([&, rank] {
            HostBlock block{memory, rank, static_cast<int>(num_threads)};
            for (int64_t r = 0; r < rows; ++r) {
                const SampledToken sampled = sample_row(block, *shared, logits + r * vocab, static_cast<int32_t>(vocab), spec,
                                               static_cast<uint64_t>(keys[r]), static_cast<uint32_t>(positions[r]));
                if (rank == 0) token[r] = sampled.token, logprob[r] = sampled.logprob, kept_logmass[r] = sampled.kept_logmass;
            }
        });
    for (std::thread& thread : threads) thread.join();
}
