// Everything that the op files need of torch: tensors as checked raw pointers, threads, scratch memory, op
// registration.
//
// Only torch's stable ABI (torch/csrc/stable) is used, so that one build serves many torch versions.
// kernels/<op>/__init__.py checks its arguments first, with more helpful messages. The checks here also
// protect direct calls of torch.ops.reason_rl.*: no argument may make an op read or write outside a tensor.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "simd.h"

namespace reason_rl {

using torch::stable::Tensor;

// RR_CHECK(condition, words...) raises a RuntimeError in Python. The message is built only when the check
// fails.
template <class... Words>
[[noreturn]] inline void fail(const Words&... words) {
    std::ostringstream text;
    (text << ... << words);
    throw std::runtime_error(text.str());
}
#define RR_CHECK(condition, ...) \
    do { \
        if (!(condition)) [[unlikely]] \
            ::reason_rl::fail(__VA_ARGS__); \
    } while (false)

// Registers the functions of one file: RR_REGISTER(m) { m.impl("linear_fwd", TORCH_BOX(&linear_fwd)); }
#define RR_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(reason_rl, CPU, m)

using torch::headeronly::ScalarType;

template <class T> inline constexpr ScalarType scalar_type = ScalarType::Undefined;
template <> inline constexpr ScalarType scalar_type<float> = ScalarType::Float;
template <> inline constexpr ScalarType scalar_type<bf16> = ScalarType::BFloat16;
template <> inline constexpr ScalarType scalar_type<int64_t> = ScalarType::Long;
template <> inline constexpr ScalarType scalar_type<int32_t> = ScalarType::Int;
template <> inline constexpr ScalarType scalar_type<bool> = ScalarType::Bool;

inline std::string type_name(ScalarType type) {
    switch (type) {
        case ScalarType::Float: return "f32";
        case ScalarType::BFloat16: return "bf16";
        case ScalarType::Long: return "i64";
        case ScalarType::Int: return "i32";
        case ScalarType::Bool: return "bool";
        default: return "another dtype";
    }
}

constexpr int64_t ANY = -1;  // in a shape: a dimension of any size

inline std::string shape_text(const std::vector<int64_t>& shape) {
    std::ostringstream text;
    for (size_t i = 0; i < shape.size(); ++i) {
        text << (i ? ", " : "[") << (shape[i] == ANY ? std::string("?") : std::to_string(shape[i]));
    }
    text << (shape.empty() ? "[]" : "]");
    return text.str();
}

// The memory of a contiguous CPU tensor of dtype T and this shape; fails with "linear_fwd: x must be f32[?,
// 8], got ..." otherwise.
template <class T>
T* data(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
    bool is_right = tensor.dim() == static_cast<int64_t>(shape.size()) && tensor.is_contiguous() && tensor.is_cpu() &&
                    tensor.scalar_type() == scalar_type<std::remove_const_t<T>>;
    for (int64_t i = 0; is_right && i < tensor.dim(); ++i) {
        const int64_t wanted = shape.begin()[i];
        is_right = wanted == ANY || wanted == tensor.size(i);
    }
    if (!is_right) [[unlikely]] {
        std::vector<int64_t> have(tensor.dim());
        for (int64_t i = 0; i < tensor.dim(); ++i) have[i] = tensor.size(i);
        fail(op, ": ", name, " must be ", type_name(scalar_type<std::remove_const_t<T>>), shape_text(shape),
             " contiguous on cpu, got ", type_name(tensor.scalar_type()), shape_text(have),
             tensor.is_contiguous() ? "" : " not contiguous", tensor.is_cpu() ? "" : " on another device");
    }
    return static_cast<T*>(tensor.data_ptr());
}

// The same for an optional tensor; null if it is None.
template <class T>
T* optional_data(const char* op, const char* name, const std::optional<Tensor>& tensor, std::initializer_list<int64_t> shape) {
    return tensor ? data<T>(op, name, *tensor, shape) : nullptr;
}

// by_dtype(op, name, x, [&](auto zero) { using T = decltype(zero); ... }) runs the body with T = float or
// bf16, x's dtype.
template <class F>
void by_dtype(const char* op, const char* name, const Tensor& tensor, F&& body) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return body(float{});
        case ScalarType::BFloat16: return body(bf16{});
        default: fail(op, ": ", name, " must be f32 or bf16, got ", type_name(tensor.scalar_type()));
    }
}

// body(pointer) for a weight stored in the compute dtype T, or as an f32 master weight (rounded to T when
// packed).
template <class T, class F>
void by_master(const char* op, const char* name, const Tensor& weight, std::initializer_list<int64_t> shape, F&& body) {
    if (weight.scalar_type() == ScalarType::Float) body(data<const float>(op, name, weight, shape));
    else body(data<const T>(op, name, weight, shape));
}

// body(i) for i in [0, count), spread over torch's threads in contiguous ranges. If several ranges throw, the
// caller gets the exception of the first range; without this, torch would replace it by an exception that
// names no cause.
template <class F>
void parallel_for(int64_t count, F&& body) {
    if (count <= 0) return;
    std::mutex mutex;
    std::exception_ptr error;
    int64_t error_begin = count;
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        try {
            for (int64_t i = begin; i < end; ++i) body(i);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (begin < error_begin) error = std::current_exception(), error_begin = begin;
        }
    });
    if (error) std::rethrow_exception(error);
}

// body(first, size) for the blocks of [0, count), `block` items each and fewer in the last, spread over
// torch's threads.
template <class F>
void parallel_blocks(int64_t count, int64_t block, F&& body) {
    parallel_for((count + block - 1) / block, [&](int64_t i) { body(i * block, std::min(block, count - i * block)); });
}

// Dynamic scheduling: calls work(next) once per thread, and each next() returns the next index of [0, count),
// or -1 at the end. Tasks of unequal size keep all threads busy. The results must not depend on which thread
// runs which task.
template <class F>
void parallel_dynamic(int64_t count, F&& work) {
    std::atomic<int64_t> taken{0};
    parallel_for(std::min<int64_t>(count, torch::stable::get_num_threads()), [&](int64_t) {
        work([&]() -> int64_t {
            const int64_t i = taken.fetch_add(1, std::memory_order_relaxed);
            return i < count ? i : -1;
        });
    });
}

// The number of items per task when `count` items are cut into tasks: a multiple of `step`, about `most` at
// the most, and such that every thread gets the same number of tasks. For work whose results do not depend on
// the cut.
inline int64_t items_per_task(int64_t count, int64_t step, int64_t most) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t parts = threads * std::max<int64_t>(1, (count + threads * most - 1) / (threads * most));
    return std::max<int64_t>(1, (count + parts * step - 1) / (parts * step)) * step;
}

// Uninitialised memory, 64-byte aligned, freed at the end of the scope.
template <class T>
class Scratch {
public:
    explicit Scratch(int64_t count)
        : memory_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t(64)))) {}
    ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() const { return memory_; }  // NOLINT: implicit, so that a Scratch is passed like a pointer

private:
    T* memory_;
};

}  // namespace reason_rl
