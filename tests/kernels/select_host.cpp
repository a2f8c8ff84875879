// csrc/sample/select.h on the host: std::threads stand in for the threads of a GPU block. For tests/kernels/test_sample_select.py.
#include <atomic>
#include <barrier>
#include <cstddef>
#include <memory>
#include <thread>
#include <vector>

#include "sample/select.h"

namespace reason_rl {

struct Meeting {
    explicit Meeting(int size) : barrier(size), slots(size) {}
    std::barrier<> barrier;
    struct alignas(64) Slot {
        unsigned char bytes[16];
    };
    std::vector<Slot> slots;
};

struct HostBlock {
    Meeting& meeting;
    int own_rank, num;

    int rank() const { return own_rank; }
    int size() const { return num; }
    void sync() { meeting.barrier.arrive_and_wait(); }

    template <class T, class F>
    T all(T own, int end, F combine) {
        std::memcpy(meeting.slots[own_rank].bytes, &own, sizeof own);
        sync();
        T sum{};
        for (int i = 0; i < end; ++i) {
            T part;
            std::memcpy(&part, meeting.slots[i].bytes, sizeof part);
            sum = i ? combine(sum, part) : part;
        }
        sync();
        return sum;
    }
    float highest(float x) { return all(x, num, [](float a, float b) { return fmaxf(a, b); }); }
    double sum(double x) { return all(x, num, [](double a, double b) { return a + b; }); }
    uint64_t sum(uint64_t x) { return all(x, num, [](uint64_t a, uint64_t b) { return a + b; }); }
    Score winner(Score x) { return all(x, num, [](Score a, Score b) { return a.better(b); }); }
    Tally before(Tally x) { return all(x, own_rank, [](Tally a, Tally b) { return a + b; }); }
    void add(Tally& bin, uint32_t count, uint64_t mass) {
        std::atomic_ref(bin.count) += count;
        std::atomic_ref(bin.mass) += mass;
    }
};

}  // namespace reason_rl

extern "C" void sample_on_host(
    const float* logits, int64_t rows, int64_t vocab, const int64_t* keys, const int64_t* positions, double temperature,
    int64_t top_k, double top_p, double min_p, int64_t num_threads, int64_t* token, float* logprob, float* kept_logmass) {
    using namespace reason_rl;
    const CutSpec spec = cut_spec(temperature, top_k, top_p, min_p);
    Meeting meeting(static_cast<int>(num_threads));
    const auto shared = std::make_unique<Shared>();
    std::vector<std::thread> threads;
    for (int rank = 0; rank < num_threads; ++rank)
        threads.emplace_back([&, rank] {
            HostBlock block{meeting, rank, static_cast<int>(num_threads)};
            for (int64_t r = 0; r < rows; ++r) {
                const Drawn drawn = sample_row(block, *shared, logits + r * vocab, static_cast<int32_t>(vocab), spec,
                                               static_cast<uint64_t>(keys[r]), static_cast<uint32_t>(positions[r]));
                if (rank == 0) token[r] = drawn.token, logprob[r] = drawn.logprob, kept_logmass[r] = drawn.kept_logmass;
            }
        });
    for (std::thread& thread : threads) thread.join();
}
