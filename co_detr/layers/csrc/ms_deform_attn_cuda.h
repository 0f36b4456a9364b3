// The border between the host code (tensors, C++ compiler) and the kernels (pointers, nvcc).
// Keeping tensors out of the .cu file is what makes it quick to compile.
#pragma once

#include <c10/core/ScalarType.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace co_detr {

constexpr int max_cuda_levels = 64;

// Passed to kernels by value, so that level shapes never live in (nor come from) device memory.
struct CudaProblem {
  int64_t batch, pixels;
  int32_t heads, channels, queries, levels, points;
  int32_t height[max_cuda_levels], width[max_cuda_levels], start[max_cuda_levels];
};

// Dense, 16-byte aligned. Accumulation type: fp64 for fp64 values, else fp32.
struct CudaForward {
  const void *value, *locations, *weights;
  void* output;
};

struct CudaBackward {
  const void *grad_output, *value, *locations, *weights;
  void *grad_value;  // accumulation type, zeroed
  void *grad_locations, *grad_weights;
};

void launch_forward(
    c10::ScalarType type, const CudaProblem& problem, const CudaForward& tensors,
    cudaStream_t stream);
void launch_backward(
    c10::ScalarType type, const CudaProblem& problem, const CudaBackward& tensors,
    cudaStream_t stream);

}  // namespace co_detr
