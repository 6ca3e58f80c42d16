// What the bindings of all ops share: checks that keep a wrong call of a raw op from touching
// memory that is not there, and new tensors. fastflow.functional has prepared the arguments of
// right calls.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <initializer_list>

#ifndef FASTFLOW_CUDA
#include "recycled.h"
#endif

namespace fastflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::initializer_list<int64_t>;

inline void check_place(const char* op, const Tensor& tensor, const char* name,
                        const Tensor& first) {
  STD_TORCH_CHECK(
      tensor.get_device_index() == first.get_device_index() && tensor.is_cpu() == first.is_cpu(),
      op, ": ", name, " must be on the device of the first argument");
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " must be contiguous");
}

inline void check_like(const char* op, const Tensor& tensor, const char* name, const Tensor& first,
                       Shape shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": ", name,
                  " must have the dtype of the first argument");
  check_place(op, tensor, name, first);
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == shape.begin()[i];
  STD_TORCH_CHECK(same, op, ": ", name, " has the wrong shape");
}

// Of at most three dimensions.
inline Tensor empty(Shape shape, const Tensor& like, ScalarType dtype) {
  const int64_t dims = int64_t(shape.size());
  const size_t element = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 1;
  int64_t strides[3] = {1, 1, 1};
  size_t bytes = element;
  for (int64_t i = dims - 1; i >= 0; --i) {
    if (i + 1 < dims) strides[i] = strides[i + 1] * shape.begin()[i + 1];
    bytes *= size_t(shape.begin()[i]);
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t type = element == 8   ? aoti_torch_dtype_float64()
                       : element == 4 ? aoti_torch_dtype_float32()
                                      : aoti_torch_dtype_uint8();
  AtenTensorHandle handle;
#ifndef FASTFLOW_CUDA
  if (Recycled::all().keeps(bytes)) {
    void* data = Recycled::all().take(bytes);
    const auto give = [](void* block, void* size) {
      Recycled::all().give(block, reinterpret_cast<size_t>(size));
    };
    const auto error = torch_from_blob(
        data, dims, shape.begin(), strides, 0, type, device_type, like.get_device_index(), &handle,
        aoti_torch_layout_strided(), nullptr, 0, give, reinterpret_cast<void*>(bytes));
    if (error != AOTI_TORCH_SUCCESS) Recycled::all().give(data, bytes);
    TORCH_ERROR_CODE_CHECK(error);
    return Tensor(handle);
  }
#endif
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, shape.begin(), strides, type, device_type,
                                                  like.get_device_index(), &handle));
  return Tensor(handle);
}
inline Tensor empty(Shape shape, const Tensor& like) {
  return empty(shape, like, like.scalar_type());
}

}  // namespace fastflow
