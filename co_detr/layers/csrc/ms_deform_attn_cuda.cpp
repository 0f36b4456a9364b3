// Host side of the CUDA kernels: checks, memory, device and stream.

#include "ms_deform_attn_common.h"
#include "ms_deform_attn_cuda.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <tuple>

namespace co_detr {
namespace {

CudaProblem describe(const Sizes& sizes, at::IntArrayRef level_shapes) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      sizes.levels <= max_cuda_levels, "level_shapes: at most ", max_cuda_levels,
      " levels on CUDA, got ", sizes.levels);
  TORCH_CHECK_VALUE(
      sizes.channels <= limit && sizes.points <= limit &&
          (sizes.queries == 0 || sizes.heads <= limit / sizes.queries),
      "sampling_locations: Q * H must be below 2^31 on CUDA, got ", sizes.queries, " * ",
      sizes.heads);
  CudaProblem problem{};
  problem.batch = sizes.batch;
  problem.pixels = sizes.pixels;
  problem.heads = static_cast<int32_t>(sizes.heads);
  problem.channels = static_cast<int32_t>(sizes.channels);
  problem.queries = static_cast<int32_t>(sizes.queries);
  problem.levels = static_cast<int32_t>(sizes.levels);
  problem.points = static_cast<int32_t>(sizes.points);
  int32_t first_pixel = 0;
  for (int64_t level = 0; level < sizes.levels; ++level) {
    problem.height[level] = static_cast<int32_t>(level_shapes[2 * level]);
    problem.width[level] = static_cast<int32_t>(level_shapes[2 * level + 1]);
    problem.start[level] = first_pixel;
    first_pixel += problem.height[level] * problem.width[level];
  }
  return problem;
}

// Kernels load 16 bytes at once; a dense view may still start at an odd address.
at::Tensor aligned(const at::Tensor& tensor) {
  const at::Tensor dense = tensor.contiguous();
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : dense.clone();
}

at::Tensor forward_cuda(
    const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor dense_value = aligned(value), dense_locations = aligned(locations),
                   dense_weights = aligned(weights);
  at::Tensor output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  if (output.numel() > 0) {
    launch_forward(
        value.scalar_type(), describe(sizes, level_shapes),
        {dense_value.const_data_ptr(), dense_locations.const_data_ptr(),
         dense_weights.const_data_ptr(), output.mutable_data_ptr()},
        c10::cuda::getCurrentCUDAStream());
  }
  return output;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef level_shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  // Threads add to shared pixels in any order.
  at::globalContext().alertNotDeterministic("co_detr::ms_deform_attn_backward on CUDA");
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor dense_grad = aligned(grad_output), dense_value = aligned(value),
                   dense_locations = aligned(locations), dense_weights = aligned(weights);
  // Half precision is summed in fp32: adding many small parts in bf16 would lose most of them.
  at::Tensor grad_value =
      at::zeros_like(dense_value, accumulation_type(value.scalar_type()));
  at::Tensor grad_locations = at::empty_like(dense_locations);
  at::Tensor grad_weights = at::empty_like(dense_weights);
  if (grad_weights.numel() > 0) {
    launch_backward(
        value.scalar_type(), describe(sizes, level_shapes),
        {dense_grad.const_data_ptr(), dense_value.const_data_ptr(),
         dense_locations.const_data_ptr(), dense_weights.const_data_ptr(),
         grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
         grad_weights.mutable_data_ptr()},
        c10::cuda::getCurrentCUDAStream());
  }
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(co_detr, CUDA, m) {
  m.impl("ms_deform_attn", forward_cuda);
  m.impl("ms_deform_attn_backward", backward_cuda);
}

}  // namespace co_detr
