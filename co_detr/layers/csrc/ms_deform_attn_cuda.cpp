// Host side of the CUDA kernels: checks, memory, device and stream.

#include "ms_deform_attn_common.h"
#include "ms_deform_attn_cuda.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace co_detr {
namespace {

CudaProblem describe(const Sizes& sizes, at::IntArrayRef level_shapes, int64_t element_size) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK_VALUE(
      sizes.levels <= max_cuda_levels, "level_shapes: at most ", max_cuda_levels,
      " levels on CUDA, got ", sizes.levels);
  TORCH_CHECK_VALUE(
      sizes.channels <= limit && sizes.points <= limit &&
          (sizes.queries == 0 || sizes.heads <= limit / sizes.queries),
      "sampling_locations: Q * H must be below 2^31 on CUDA, got ", sizes.queries, " * ",
      sizes.heads);
  TORCH_CHECK_VALUE(
      sizes.heads <= limit / 8 / std::max<int64_t>(sizes.channels, 1),
      "value: one pixel must take less than 2^31 bytes on CUDA, got shape ", sizes.heads, " x ",
      sizes.channels);
  TORCH_CHECK_VALUE(
      sizes.points == 0 || sizes.levels <= limit / sizes.points,
      "sampling_locations: L * P must be below 2^31 on CUDA, got ", sizes.levels, " * ",
      sizes.points);
  CudaProblem problem{};
  problem.batch = sizes.batch;
  problem.pixels = sizes.pixels;
  problem.heads = static_cast<int32_t>(sizes.heads);
  problem.channels = static_cast<int32_t>(sizes.channels);
  problem.queries = static_cast<int32_t>(sizes.queries);
  problem.levels = static_cast<int32_t>(sizes.levels);
  problem.points = static_cast<int32_t>(sizes.points);
  problem.pixel_bytes = static_cast<uint32_t>(sizes.heads * sizes.channels * element_size);
  problem.grad_pixel_bytes = problem.pixel_bytes * (element_size == 2 ? 2 : 1);
  uint32_t first_pixel = 0;
  for (int64_t i = 0; i < sizes.levels; ++i) {
    CudaLevel& level = problem.level[i];
    level.height = static_cast<int32_t>(level_shapes[2 * i]);
    level.width = static_cast<int32_t>(level_shapes[2 * i + 1]);
    level.start = first_pixel;
    level.right = level.width > 1 ? 1 : 0;
    level.down = level.height > 1 ? level.width : 0;
    first_pixel += level.height * level.width;
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
        value.scalar_type(), describe(sizes, level_shapes, value.element_size()),
        {dense_value.const_data_ptr(), dense_locations.const_data_ptr(),
         dense_weights.const_data_ptr(), output.mutable_data_ptr()},
        c10::cuda::getCurrentCUDAStream());
  }
  return output;
}

// The deterministic gradient of the value is made for as many heads at a time as have this many
// points, one at least: lists and sorting take about 40 bytes for a point, 170 MB for this many.
constexpr int64_t listed_points = int64_t{1} << 22;

at::Tensor gather_gradient(
    const CudaProblem& problem, const at::Tensor& grad_output, const at::Tensor& value,
    const at::Tensor& locations, const at::Tensor& weights) {
  at::Tensor grad_value = at::empty_like(value);
  const int64_t pair_points = weights.numel() / (problem.batch * problem.heads);
  const int64_t all_pairs = problem.batch * problem.heads;
  const int64_t most_pairs = std::max<int64_t>(1, listed_points / pair_points);
  for (int64_t first = 0; first < all_pairs; first += most_pairs) {
    const int64_t pairs = std::min(most_pairs, all_pairs - first);
    const at::Tensor keys = at::empty({pairs, pair_points}, value.options().dtype(at::kInt));
    const auto stream = c10::cuda::getCurrentCUDAStream();
    launch_list_points(
        value.scalar_type(), problem,
        {locations.const_data_ptr(), weights.const_data_ptr(), first, pairs,
         keys.mutable_data_ptr<int32_t>()},
        stream);
    const auto [sorted, order] = at::sort(keys, /*stable=*/true, /*dim=*/-1, /*descending=*/false);
    launch_gather_gradient(
        value.scalar_type(), problem,
        {{locations.const_data_ptr(), weights.const_data_ptr(), first, pairs,
          sorted.mutable_data_ptr<int32_t>()},
         order.const_data_ptr<int64_t>(), grad_output.const_data_ptr(),
         grad_value.mutable_data_ptr()},
        stream);
  }
  return grad_value;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef level_shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  const at::Tensor dense_grad = aligned(grad_output), dense_value = aligned(value),
                   dense_locations = aligned(locations), dense_weights = aligned(weights);
  at::Tensor grad_locations = at::empty_like(dense_locations);
  at::Tensor grad_weights = at::empty_like(dense_weights);
  if (grad_weights.numel() == 0 || value.numel() == 0) {
    return {at::zeros_like(dense_value), grad_locations.zero_(), grad_weights.zero_()};
  }
  const CudaProblem problem = describe(sizes, level_shapes, value.element_size());
  // Half precision is summed in fp32: adding many small parts in bf16 would lose most of them.
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  at::Tensor grad_value = deterministic
      ? gather_gradient(problem, dense_grad, dense_value, dense_locations, dense_weights)
      : at::zeros_like(dense_value, accumulation_type(value.scalar_type()));
  launch_backward(
      value.scalar_type(), problem,
      {dense_grad.const_data_ptr(), dense_value.const_data_ptr(),
       dense_locations.const_data_ptr(), dense_weights.const_data_ptr(),
       deterministic ? nullptr : grad_value.mutable_data_ptr(),
       grad_locations.mutable_data_ptr(), grad_weights.mutable_data_ptr()},
      c10::cuda::getCurrentCUDAStream());
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(co_detr, CUDA, m) {
  m.impl("ms_deform_attn", forward_cuda);
  m.impl("ms_deform_attn_backward", backward_cuda);
}

}  // namespace co_detr
