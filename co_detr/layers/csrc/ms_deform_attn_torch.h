// The few things of PyTorch that the host code does with tensors, in both of the forms that
// ms_deform_attn_types.h explains.
#pragma once

#include "ms_deform_attn_types.h"

#ifdef TORCH_TARGET_VERSION
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#else
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace co_detr {

#ifdef TORCH_TARGET_VERSION

using Tensor = torch::stable::Tensor;
using Ints = torch::headeronly::IntHeaderOnlyArrayRef;
using torch::stable::parallel_for;

inline Tensor copy_of(const Tensor& tensor) {
  return torch::stable::clone(tensor);
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor in_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// Dense, on the device of ``like``.
inline Tensor empty(Ints sizes, const Tensor& like, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

inline Tensor zeros(Ints sizes, const Tensor& like, ScalarType type) {
  return torch::stable::new_zeros(like, sizes, type);
}

// Every row, equal keys in their order; the sorted keys and where they were.
inline std::pair<Tensor, Tensor> sort_rows(const Tensor& keys) {
  namespace detail = torch::stable::detail;
  StableIValue stack[] = {
      detail::from(keys), detail::from(std::optional<bool>(true)), detail::from(int64_t{-1}),
      detail::from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack, TORCH_ABI_VERSION));
  return {detail::to<Tensor>(stack[0]), detail::to<Tensor>(stack[1])};
}

#define CO_DETR_LIBRARY STABLE_TORCH_LIBRARY
#define CO_DETR_LIBRARY_IMPL STABLE_TORCH_LIBRARY_IMPL
#define CO_DETR_KERNEL(function) TORCH_BOX(&function)

#else

using Tensor = at::Tensor;
using Ints = at::IntArrayRef;
using at::parallel_for;

inline Tensor copy_of(const Tensor& tensor) {
  return tensor.clone();
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.contiguous();
}

inline Tensor in_type(const Tensor& tensor, ScalarType type) {
  return tensor.to(type);
}

inline Tensor empty(Ints sizes, const Tensor& like, ScalarType type) {
  return at::empty(sizes, like.options().dtype(type));
}

inline Tensor zeros(Ints sizes, const Tensor& like, ScalarType type) {
  return at::zeros(sizes, like.options().dtype(type));
}

inline std::pair<Tensor, Tensor> sort_rows(const Tensor& keys) {
  auto [sorted, order] = at::sort(keys, /*stable=*/true, /*dim=*/-1, /*descending=*/false);
  return {sorted, order};
}

#define CO_DETR_LIBRARY TORCH_LIBRARY
#define CO_DETR_LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define CO_DETR_KERNEL(function) function

#endif

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline std::string listed(Ints numbers) {
  std::string text = "[";
  for (size_t i = 0; i < numbers.size(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(numbers[i]);
  }
  return text + "]";
}

}  // namespace co_detr
