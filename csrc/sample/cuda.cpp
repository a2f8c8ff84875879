// torch.ops.reason_rl.sample_cuda: checks the arguments and launches cuda.cu's kernel. It is built into a
// separate library, so that the CPU libraries do not need CUDA.
#include "cuda.h"

#include "../common/tensor.h"
#include "check.h"

namespace reason_rl {
namespace {

// Loop indices pass the end of a row by up to 4 columns for each of 1024 threads and must still fit an int32.
constexpr int64_t MAX_COLUMNS = INT32_MAX - 4096;

// The memory of a contiguous tensor of this dtype and shape on the GPU of `logits`; fails otherwise.
template <class T>
T* on_gpu(const char* name, const Tensor& tensor, const Tensor& logits, ScalarType type, std::initializer_list<int64_t> shape) {
    const int64_t gpu = logits.get_device_index();
    const bool is_there = tensor.is_cuda() && tensor.get_device_index() == gpu;
    bool is_right = is_there && tensor.is_contiguous() && tensor.scalar_type() == type && tensor.dim() == std::ssize(shape);
    for (int64_t i = 0; is_right && i < tensor.dim(); ++i) is_right = tensor.size(i) == shape.begin()[i];
    RR_CHECK(is_right, "sample_cuda: ", name, " must be ", type_name(type), shape_text(shape), " contiguous on cuda:", gpu,
             ", got ", type_name(tensor.scalar_type()), " with ", tensor.dim(), " dimensions and ", tensor.numel(), " elements",
             is_there ? "" : " on another device");
    return static_cast<T*>(tensor.data_ptr());
}

// token, keys, positions: i64[R]; logprob, kept_logmass: f32[R]; is_broken: bool[R]; logits: f32[R, V].
// `stream` is torch's current cudaStream_t on the logits' GPU, as a number. It cannot be checked.
void sample_cuda(Tensor token, Tensor logprob, Tensor kept_logmass, Tensor is_broken, Tensor logits, Tensor keys, Tensor positions,
                 double temperature, int64_t top_k, double top_p, double min_p, int64_t stream) {
    RR_CHECK(logits.dim() == 2, "sample_cuda: logits must have 2 dimensions, got ", logits.dim());
    const int64_t rows = logits.size(0), vocab = logits.size(1);
    RR_CHECK(rows <= INT32_MAX && vocab > 0 && vocab <= MAX_COLUMNS, "sample_cuda: logits have ", rows, " rows of ", vocab,
             ": needs 1 to ", MAX_COLUMNS, " columns and less than 2^31 rows");
    check_sampling("sample_cuda", temperature, top_k, top_p, min_p);
    const char* error = launch_sample({
        .logits = on_gpu<const float>("logits", logits, logits, ScalarType::Float, {rows, vocab}),
        .keys = on_gpu<const int64_t>("keys", keys, logits, ScalarType::Long, {rows}),
        .positions = on_gpu<const int64_t>("positions", positions, logits, ScalarType::Long, {rows}),
        .token = on_gpu<int64_t>("token", token, logits, ScalarType::Long, {rows}),
        .logprob = on_gpu<float>("logprob", logprob, logits, ScalarType::Float, {rows}),
        .kept_logmass = on_gpu<float>("kept_logmass", kept_logmass, logits, ScalarType::Float, {rows}),
        .is_broken = on_gpu<bool>("is_broken", is_broken, logits, ScalarType::Bool, {rows}),
        .rows = static_cast<int32_t>(rows), .vocab = static_cast<int32_t>(vocab),
        .temperature = temperature, .top_p = top_p, .min_p = min_p, .top_k = top_k,
    }, reinterpret_cast<void*>(stream));
    RR_CHECK(!error, "sample_cuda: ", error);
}

STABLE_TORCH_LIBRARY_FRAGMENT(reason_rl, m) {
    // Samples a token for each row of logits: f32[R, V], with its logprob and kept_logmass.
    m.def("sample_cuda(Tensor(a!) token, Tensor(b!) logprob, Tensor(c!) kept_logmass, Tensor(d!) is_broken, Tensor logits, "
          "Tensor keys, Tensor positions, float temperature, int top_k, float top_p, float min_p, int stream) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(reason_rl, CUDA, m) { m.impl("sample_cuda", TORCH_BOX(&sample_cuda)); }

}  // namespace
}  // namespace reason_rl
