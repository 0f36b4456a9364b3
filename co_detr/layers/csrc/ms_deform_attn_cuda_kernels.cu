// Multi-scale deformable attention on CUDA.
//
// A row = one (query, head) of one image. A row has a power of two of lanes inside one warp, each
// lane carries 16 bytes of channels; a block holds many rows of neighbouring queries, whose corners
// overlap and meet in L1. A corner outside of its level is a valid pixel with weight zero.

#include "ms_deform_attn_cuda.h"

#include <c10/cuda/CUDAException.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

namespace co_detr {
namespace {

constexpr int block_threads = 256;
constexpr int warp_lanes = 32;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T items[count];
};

template <typename T, int count>
__device__ __forceinline__ Pack<Accumulate<T>, count> load(const T* from) {
  const Pack<T, count> packed = *reinterpret_cast<const Pack<T, count>*>(from);
  Pack<Accumulate<T>, count> result;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    result.items[i] = static_cast<Accumulate<T>>(packed.items[i]);
  }
  return result;
}

// Adding 16 bytes at once came with compute capability 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define CO_DETR_VECTOR_ATOMICS 1
#else
#define CO_DETR_VECTOR_ATOMICS 0
#endif

template <typename A, int count>
__device__ __forceinline__ void atomic_add(A* to, const Pack<A, count>& added, A factor) {
  if constexpr (CO_DETR_VECTOR_ATOMICS && std::is_same_v<A, float> && count % 4 == 0) {
#if CO_DETR_VECTOR_ATOMICS
#pragma unroll
    for (int i = 0; i < count; i += 4) {  // one reduction for 16 bytes
      atomicAdd(
          reinterpret_cast<float4*>(to + i),
          make_float4(
              added.items[i] * factor, added.items[i + 1] * factor, added.items[i + 2] * factor,
              added.items[i + 3] * factor));
    }
#endif
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      atomicAdd(to + i, added.items[i] * factor);
    }
  }
}

// One axis of a point: the two neighbouring pixels, clamped, and how much each counts.
template <typename A>
struct Axis {
  bool inside;
  int low, high;
  A low_part, high_part;  // 0 when that pixel is outside
  A has_low, has_high;    // 1 when that pixel is inside
};

template <typename A>
__device__ __forceinline__ Axis<A> split_axis(A location, int size) {
  const A wanted = location * static_cast<A>(size) - A(0.5);
  Axis<A> axis;
  // NaN compares false, so it never becomes an index.
  axis.inside = wanted > A(-1) && wanted < static_cast<A>(size);
  const A pixel = axis.inside ? wanted : A(0);
  const A floor_pixel = floor(pixel);
  const int low = static_cast<int>(floor_pixel), high = low + 1;
  const A fraction = pixel - floor_pixel;
  axis.has_low = axis.inside && low >= 0 ? A(1) : A(0);
  axis.has_high = axis.inside && high < size ? A(1) : A(0);
  axis.low_part = axis.has_low * (A(1) - fraction);
  axis.high_part = axis.has_high * fraction;
  axis.low = max(low, 0);
  axis.high = min(high, size - 1);
  return axis;
}

// Corners are ordered by row, then column.
template <typename A>
struct Point {
  Axis<A> column, row;
  A attention;
  int pixel[4];

  __device__ __forceinline__ Point(
      const Pack<A, 2>& location, A weight, int height, int width, int start)
      : column(split_axis(location.items[0], width)), row(split_axis(location.items[1], height)) {
    // Selected, not multiplied: a point outside is worth zero whatever its weight is.
    attention = column.inside && row.inside ? weight : A(0);
    pixel[0] = start + row.low * width + column.low;
    pixel[1] = start + row.low * width + column.high;
    pixel[2] = start + row.high * width + column.low;
    pixel[3] = start + row.high * width + column.high;
  }

  __device__ __forceinline__ A bilinear(int corner) const {
    return (corner < 2 ? row.low_part : row.high_part) *
        (corner % 2 == 0 ? column.low_part : column.high_part);
  }
};

// Where one thread works. fixed_points: points per level when known to the compiler, else 0.
template <int fixed_points>
struct Work {
  int levels, points;
  int64_t stride;  // elements between neighbouring pixels
  int row, head;   // row = query * heads + head
  bool active;     // the last block may have rows too many: they compute but do not write

  __device__ __forceinline__ explicit Work(const CudaProblem& problem)
      : levels(problem.levels),
        points(fixed_points > 0 ? fixed_points : problem.points),
        stride(static_cast<int64_t>(problem.heads) * problem.channels) {
    const int64_t wanted = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
    const int rows = problem.queries * problem.heads;
    active = wanted < rows;
    row = active ? static_cast<int>(wanted) : rows - 1;
    head = row % problem.heads;
  }
};

template <typename T, int count, int fixed_points>
__global__ void __launch_bounds__(block_threads) forward_kernel(
    const __grid_constant__ CudaProblem problem, const T* __restrict__ value,
    const Accumulate<T>* __restrict__ locations, const Accumulate<T>* __restrict__ weights,
    T* __restrict__ output) {
  typedef Accumulate<T> A;
  const Work<fixed_points> work(problem);
  if (!work.active) {
    return;
  }
  for (int64_t image = blockIdx.y; image < problem.batch; image += gridDim.y) {
    const int64_t row = image * problem.queries * problem.heads + work.row;
    const int64_t first_point = row * work.levels * work.points;
    const T* image_value =
        value + image * problem.pixels * work.stride + work.head * problem.channels;
    for (int channel = threadIdx.x * count; channel < problem.channels;
         channel += blockDim.x * count) {
      A sums[count] = {};
      int64_t point_index = first_point;
#pragma unroll 1  // all points of one level in flight are enough, those of all levels spill
      for (int level = 0; level < work.levels; ++level) {
        const int height = problem.height[level], width = problem.width[level];
#pragma unroll
        for (int i = 0; i < work.points; ++i, ++point_index) {
          const Point<A> point(
              load<A, 2>(locations + 2 * point_index), weights[point_index], height, width,
              problem.start[level]);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const auto pixel =
                load<T, count>(image_value + point.pixel[corner] * work.stride + channel);
            const A weight = point.attention * point.bilinear(corner);
#pragma unroll
            for (int c = 0; c < count; ++c) {
              sums[c] += weight * pixel.items[c];
            }
          }
        }
      }
      Pack<T, count> result;
#pragma unroll
      for (int c = 0; c < count; ++c) {
        result.items[c] = static_cast<T>(sums[c]);
      }
      *reinterpret_cast<Pack<T, count>*>(output + row * problem.channels + channel) = result;
    }
  }
}

template <typename T, int count, int fixed_points>
__global__ void __launch_bounds__(block_threads) backward_kernel(
    const __grid_constant__ CudaProblem problem, const T* __restrict__ grad_output,
    const T* __restrict__ value, const Accumulate<T>* __restrict__ locations,
    const Accumulate<T>* __restrict__ weights, Accumulate<T>* __restrict__ grad_value,
    Accumulate<T>* __restrict__ grad_locations, Accumulate<T>* __restrict__ grad_weights) {
  typedef Accumulate<T> A;
  const Work<fixed_points> work(problem);
  const int first_channel = threadIdx.x * count;
  for (int64_t image = blockIdx.y; image < problem.batch; image += gridDim.y) {
    const int64_t row = image * problem.queries * problem.heads + work.row;
    const int64_t origin = image * problem.pixels * work.stride + work.head * problem.channels;
    const T* row_grad = grad_output + row * problem.channels;
    // Nearly always all the channels there are: kept in registers for all points.
    Pack<A, count> first_grad = {};
    if (first_channel < problem.channels) {
      first_grad = load<T, count>(row_grad + first_channel);
    }
    int64_t point_index = row * work.levels * work.points;
#pragma unroll 1
    for (int level = 0; level < work.levels; ++level) {
      const int height = problem.height[level], width = problem.width[level];
#pragma unroll
      for (int i = 0; i < work.points; ++i, ++point_index) {
        const Point<A> point(
            load<A, 2>(locations + 2 * point_index), weights[point_index], height, width,
            problem.start[level]);
        A dots[4] = {};  // this lane's part of grad_output . corner
        for (int channel = first_channel; channel < problem.channels;
             channel += blockDim.x * count) {
          const auto grad =
              channel == first_channel ? first_grad : load<T, count>(row_grad + channel);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const int64_t offset = origin + point.pixel[corner] * work.stride + channel;
            const auto pixel = load<T, count>(value + offset);
#pragma unroll
            for (int c = 0; c < count; ++c) {
              dots[corner] += grad.items[c] * pixel.items[c];
            }
            const A weight = point.attention * point.bilinear(corner);
            if (work.active && weight != A(0)) {
              atomic_add<A, count>(grad_value + offset, grad, weight);
            }
          }
        }
        const Axis<A>&column = point.column, &line = point.row;
        A for_weight = line.low_part * (column.low_part * dots[0] + column.high_part * dots[1]) +
            line.high_part * (column.low_part * dots[2] + column.high_part * dots[3]);
        A for_x = line.low_part * (column.has_high * dots[1] - column.has_low * dots[0]) +
            line.high_part * (column.has_high * dots[3] - column.has_low * dots[2]);
        A for_y = column.low_part * (line.has_high * dots[2] - line.has_low * dots[0]) +
            column.high_part * (line.has_high * dots[3] - line.has_low * dots[1]);
        for (int distance = blockDim.x / 2; distance > 0; distance /= 2) {
          for_weight += __shfl_xor_sync(0xffffffffu, for_weight, distance);
          for_x += __shfl_xor_sync(0xffffffffu, for_x, distance);
          for_y += __shfl_xor_sync(0xffffffffu, for_y, distance);
        }
        if (work.active && threadIdx.x == 0) {
          grad_weights[point_index] = for_weight;
          *reinterpret_cast<Pack<A, 2>*>(grad_locations + 2 * point_index) = {
              {point.attention * static_cast<A>(width) * for_x,
               point.attention * static_cast<A>(height) * for_y}};
        }
      }
    }
  }
}

struct Shape {
  dim3 grid, block;
};

// Lanes of a row: a power of two inside one warp, so that shuffles can add them up.
Shape launch_shape(const CudaProblem& problem, int channels_per_lane) {
  int lanes = 1;
  while (lanes < warp_lanes && lanes * channels_per_lane < problem.channels) {
    lanes *= 2;
  }
  const int rows_per_block = block_threads / lanes;
  const int64_t rows = static_cast<int64_t>(problem.queries) * problem.heads;
  return {
      dim3(
          static_cast<unsigned>((rows + rows_per_block - 1) / rows_per_block),
          static_cast<unsigned>(std::min<int64_t>(problem.batch, 65535))),
      dim3(lanes, rows_per_block)};
}

template <typename T, int count, int fixed_points>
struct Launch {
  static void run(const CudaProblem& problem, const CudaForward& tensors, cudaStream_t stream) {
    typedef Accumulate<T> A;
    const Shape shape = launch_shape(problem, count);
    forward_kernel<T, count, fixed_points><<<shape.grid, shape.block, 0, stream>>>(
        problem, static_cast<const T*>(tensors.value), static_cast<const A*>(tensors.locations),
        static_cast<const A*>(tensors.weights), static_cast<T*>(tensors.output));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static void run(const CudaProblem& problem, const CudaBackward& tensors, cudaStream_t stream) {
    typedef Accumulate<T> A;
    const Shape shape = launch_shape(problem, count);
    backward_kernel<T, count, fixed_points><<<shape.grid, shape.block, 0, stream>>>(
        problem, static_cast<const T*>(tensors.grad_output), static_cast<const T*>(tensors.value),
        static_cast<const A*>(tensors.locations), static_cast<const A*>(tensors.weights),
        static_cast<A*>(tensors.grad_value), static_cast<A*>(tensors.grad_locations),
        static_cast<A*>(tensors.grad_weights));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

template <typename T, typename Tensors>
void choose_kernel(const CudaProblem& problem, const Tensors& tensors, cudaStream_t stream) {
  constexpr int count = 16 / sizeof(T);
  if (problem.channels % count != 0) {
    Launch<T, 1, 0>::run(problem, tensors, stream);
  } else if (problem.points == 4) {
    Launch<T, count, 4>::run(problem, tensors, stream);
  } else {
    Launch<T, count, 0>::run(problem, tensors, stream);
  }
}

template <typename Tensors>
void choose_type(
    c10::ScalarType type, const CudaProblem& problem, const Tensors& tensors,
    cudaStream_t stream) {
  switch (type) {
    case c10::kFloat: return choose_kernel<float>(problem, tensors, stream);
    case c10::kDouble: return choose_kernel<double>(problem, tensors, stream);
    case c10::kBFloat16: return choose_kernel<c10::BFloat16>(problem, tensors, stream);
    case c10::kHalf: return choose_kernel<c10::Half>(problem, tensors, stream);
    default: TORCH_CHECK_VALUE(false, "value must be fp32, fp64, bf16 or fp16, got ", type);
  }
}

}  // namespace

void launch_forward(
    c10::ScalarType type, const CudaProblem& problem, const CudaForward& tensors,
    cudaStream_t stream) {
  choose_type(type, problem, tensors, stream);
}

void launch_backward(
    c10::ScalarType type, const CudaProblem& problem, const CudaBackward& tensors,
    cudaStream_t stream) {
  choose_type(type, problem, tensors, stream);
}

}  // namespace co_detr
