// Host side of the CUDA kernels: checks, memory, device and stream.

#include "ms_deform_attn_common.h"
#include "ms_deform_attn_cuda.h"

#ifdef TORCH_TARGET_VERSION
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#else
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <tuple>

namespace co_detr {
namespace {

#ifdef TORCH_TARGET_VERSION

// While it lives, the device of a tensor is the current one.
struct CurrentDevice {
  explicit CurrentDevice(const Tensor& tensor)
      : index(tensor.get_device_index()), guard(index) {}

  cudaStream_t stream() const {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    return static_cast<cudaStream_t>(stream);
  }

  const int32_t index;
  const torch::stable::accelerator::DeviceGuard guard;
};

#else

struct CurrentDevice {
  explicit CurrentDevice(const Tensor& tensor) : guard(tensor.device()) {}

  cudaStream_t stream() const {
    return c10::cuda::getCurrentCUDAStream();
  }

  const c10::cuda::CUDAGuard guard;
};

#endif

CudaProblem describe(const Sizes& sizes, Ints level_shapes, int64_t element_size) {
  constexpr int64_t limit = std::numeric_limits<int32_t>::max();
  CO_DETR_CHECK(
      sizes.levels <= max_cuda_levels, "level_shapes: at most ", max_cuda_levels,
      " levels on CUDA, got ", sizes.levels);
  CO_DETR_CHECK(
      sizes.channels <= limit && sizes.points <= limit &&
          (sizes.queries == 0 || sizes.heads <= limit / sizes.queries),
      "sampling_locations: Q * H must be below 2^31 on CUDA, got ", sizes.queries, " * ",
      sizes.heads);
  CO_DETR_CHECK(
      sizes.heads <= limit / 8 / std::max<int64_t>(sizes.channels, 1),
      "value: one pixel must take less than 2^31 bytes on CUDA, got shape ", sizes.heads, " x ",
      sizes.channels);
  CO_DETR_CHECK(
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
Tensor aligned(const Tensor& tensor) {
  const Tensor result = dense(tensor);
  return reinterpret_cast<uintptr_t>(result.const_data_ptr()) % 16 == 0 ? result : copy_of(result);
}

Tensor forward_cuda(
    const Tensor& value, Ints level_shapes, const Tensor& locations,
    const Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  const CurrentDevice device(value);
  const Tensor dense_value = aligned(value), dense_locations = aligned(locations),
                   dense_weights = aligned(weights);
  Tensor output =
      empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value, value.scalar_type());
  if (output.numel() > 0) {
    launch_forward(
        value.scalar_type(), describe(sizes, level_shapes, element_size(value.scalar_type())),
        {dense_value.const_data_ptr(), dense_locations.const_data_ptr(),
         dense_weights.const_data_ptr(), output.mutable_data_ptr()},
        device.stream());
  }
  return output;
}

// The deterministic gradient of the value is made for as many heads at a time as have this many
// points, one at least: lists and sorting take about 40 bytes for a point, 170 MB for this many.
constexpr int64_t listed_points = int64_t{1} << 22;

Tensor gather_gradient(
    const CudaProblem& problem, const Tensor& grad_output, const Tensor& value,
    const Tensor& locations, const Tensor& weights, cudaStream_t stream) {
  Tensor grad_value = empty(value.sizes(), value, value.scalar_type());
  const int64_t pair_points = weights.numel() / (problem.batch * problem.heads);
  const int64_t all_pairs = problem.batch * problem.heads;
  const int64_t most_pairs = std::max<int64_t>(1, listed_points / pair_points);
  for (int64_t first = 0; first < all_pairs; first += most_pairs) {
    const int64_t pairs = std::min(most_pairs, all_pairs - first);
    const Tensor keys = empty({pairs, pair_points}, value, ScalarType::Int);
    launch_list_points(
        value.scalar_type(), problem,
        {locations.const_data_ptr(), weights.const_data_ptr(), first, pairs,
         write<int32_t>(keys)},
        stream);
    const auto [sorted, order] = sort_rows(keys);
    launch_gather_gradient(
        value.scalar_type(), problem,
        {{locations.const_data_ptr(), weights.const_data_ptr(), first, pairs,
          write<int32_t>(sorted)},
         read<int64_t>(order), grad_output.const_data_ptr(),
         grad_value.mutable_data_ptr()},
        stream);
  }
  return grad_value;
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& grad_output, const Tensor& value, Ints level_shapes,
    const Tensor& locations, const Tensor& weights, bool deterministic) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const CurrentDevice device(value);
  const Tensor dense_grad = aligned(grad_output), dense_value = aligned(value),
                   dense_locations = aligned(locations), dense_weights = aligned(weights);
  const auto type = value.scalar_type(), sum_type = accumulation_type(type);
  if (weights.numel() == 0 || value.numel() == 0) {
    return {
        zeros(value.sizes(), value, type), zeros(locations.sizes(), locations, sum_type),
        zeros(weights.sizes(), weights, sum_type)};
  }
  Tensor grad_locations = empty(locations.sizes(), locations, sum_type);
  Tensor grad_weights = empty(weights.sizes(), weights, sum_type);
  const CudaProblem problem = describe(sizes, level_shapes, element_size(value.scalar_type()));
  // Half precision is summed in fp32: adding many small parts in bf16 would lose most of them.
  Tensor grad_value = deterministic
      ? gather_gradient(
            problem, dense_grad, dense_value, dense_locations, dense_weights, device.stream())
      : zeros(value.sizes(), value, sum_type);
  launch_backward(
      type, problem,
      {dense_grad.const_data_ptr(), dense_value.const_data_ptr(),
       dense_locations.const_data_ptr(), dense_weights.const_data_ptr(),
       deterministic ? nullptr : grad_value.mutable_data_ptr(),
       grad_locations.mutable_data_ptr(), grad_weights.mutable_data_ptr()},
      device.stream());
  return {in_type(grad_value, type), grad_locations, grad_weights};
}

}  // namespace

CO_DETR_LIBRARY_IMPL(co_detr, CUDA, m) {
  m.impl("ms_deform_attn", CO_DETR_KERNEL(forward_cuda));
  m.impl("ms_deform_attn_backward", CO_DETR_KERNEL(backward_cuda));
}

}  // namespace co_detr
