// Rows of a tensor that need not be contiguous, such as q as heads [T, H, C] inside a qkv matrix: read in
// place, not copied.
#pragma once

#include "tensor.h"

namespace reason_rl {

template <class T>
struct StridedRows {  // [count, size]; row r is [r / inner, r % inner] of the tensor
    T* start;
    int64_t count, size, inner, outer_stride, inner_stride;
    T* at(int64_t r) const {
        if (outer_stride == inner * inner_stride) return start + r * inner_stride;
        return start + r / inner * outer_stride + r % inner * inner_stride;
    }
};

// The rows of T[.., ..] or T[.., .., ..]; the last dimension must be contiguous.
template <class T>
StridedRows<T> strided_rows(const char* op, const char* name, const Tensor& tensor) {
    constexpr ScalarType wanted = scalar_type<std::remove_const_t<T>>;
    const int64_t dim = tensor.dim();
    RR_CHECK((dim == 2 || dim == 3) && tensor.is_cpu() && tensor.scalar_type() == wanted &&
                 (tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1),
             op, ": ", name, " must be ", type_name(wanted), "[?, ?] or [?, ?, ?] with a last stride of 1 on cpu, got ",
             type_name(tensor.scalar_type()), " of ", dim, " dimensions",
             dim ? " and last stride " + std::to_string(tensor.stride(dim - 1)) : "");
    T* start = static_cast<T*>(tensor.data_ptr());
    if (dim == 2) return {start, tensor.size(0), tensor.size(1), 1, tensor.stride(0), tensor.stride(0)};
    return {start, tensor.size(0) * tensor.size(1), tensor.size(2), tensor.size(1), tensor.stride(0), tensor.stride(1)};
}

// The memory of the contiguous tensor that has the shape of `like`.
template <class T, class U>
T* rows_like(const char* op, const char* name, const Tensor& tensor, const Tensor& like, const StridedRows<U>& rows) {
    if (like.dim() == 2) return data<T>(op, name, tensor, {rows.count, rows.size});
    return data<T>(op, name, tensor, {like.size(0), rows.inner, rows.size});
}

}  // namespace reason_rl
