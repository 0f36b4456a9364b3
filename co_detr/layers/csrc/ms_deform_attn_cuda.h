// The border between the host code (tensors, C++ compiler) and the kernels (pointers, nvcc).
// Keeping tensors out of the .cu file is what makes it quick to compile.
#pragma once

#include "ms_deform_attn_types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace co_detr {

constexpr int max_cuda_levels = 64;

struct CudaLevel {
  int32_t height, width;
  uint32_t start;        // its first pixel
  uint32_t right, down;  // from a pixel to its neighbors; 0 in a level one pixel wide or high
};

// Passed to kernels by value, so that level shapes never live in (nor come from) device memory.
struct CudaProblem {
  int64_t batch, pixels;
  int32_t heads, channels, queries, levels, points;
  uint32_t pixel_bytes, grad_pixel_bytes;  // between neighboring pixels of value, of grad_value
  CudaLevel level[max_cuda_levels];
};

// Dense, 16-byte aligned. Accumulation type: fp64 for fp64 values, else fp32.
struct CudaForward {
  const void *value, *locations, *weights;
  void* output;
};

struct CudaBackward {
  const void *grad_output, *value, *locations, *weights;
  void *grad_value;  // accumulation type, zeroed; null: not wanted
  void *grad_locations, *grad_weights;
};

// Deterministic gradient of the value. It is made for a few pairs (image, head) at a time, because
// the lists take memory; pair = image * heads + head.
struct CudaPointList {
  const void *locations, *weights;
  int64_t first_pair, pairs;
  int32_t* keys;  // (pairs, Q * L * P): the first pixel that each point touches
};

struct CudaGather {
  CudaPointList list;    // keys sorted
  const int64_t* order;  // (pairs, Q * L * P): the points that the sorted keys belong to
  const void* grad_output;
  void* grad_value;  // type of value; every number of the pairs is written
};

void launch_forward(
    ScalarType type, const CudaProblem& problem, const CudaForward& tensors,
    cudaStream_t stream);
void launch_backward(
    ScalarType type, const CudaProblem& problem, const CudaBackward& tensors,
    cudaStream_t stream);
void launch_list_points(
    ScalarType type, const CudaProblem& problem, const CudaPointList& list,
    cudaStream_t stream);
void launch_gather_gradient(
    ScalarType type, const CudaProblem& problem, const CudaGather& tensors,
    cudaStream_t stream);

}  // namespace co_detr
