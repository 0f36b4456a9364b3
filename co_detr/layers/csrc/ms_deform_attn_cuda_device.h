// What the CUDA kernels share: loads, the arithmetic of a sampling point, who works on what.
//
// A row = one (query, head) of one image. It has as many lanes as 32 channels take at 16 bytes
// each: 8 in fp32, 4 in 16 bits, 16 in fp64; the rows of a block are neighboring queries of one
// head, because their points overlap and find each other's pixels in L1.
#pragma once

#include "ms_deform_attn_cuda.h"

#ifdef TORCH_TARGET_VERSION
#include <torch/csrc/stable/macros.h>
#define CO_DETR_CHECK_LAUNCH() STD_CUDA_KERNEL_LAUNCH_CHECK()
#else
#include <c10/cuda/CUDAException.h>
#define CO_DETR_CHECK_LAUNCH() C10_CUDA_KERNEL_LAUNCH_CHECK()
#endif

#include <algorithm>
#include <type_traits>

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 700
#error "co_detr's CUDA kernels need compute capability 7.0 or newer, because of __grid_constant__"
#endif

namespace co_detr {

constexpr int block_threads = 256;
constexpr unsigned whole_warp = 0xffffffffu;

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Lanes of a row: 16 bytes each make the 32 channels that nearly every model has.
template <typename T>
constexpr int row_lanes = 2 * sizeof(T);

constexpr int usual_channels = 32, usual_points = 4;

template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T items[count];
};

template <typename T, int count>
__device__ __forceinline__ Pack<Accumulate<T>, count> load(const T* from) {
  Pack<Accumulate<T>, count> result;
  if constexpr (std::is_same_v<T, c10::BFloat16> && count > 1) {
    // bf16 is the upper half of an fp32. By hand: one instruction a number, not two.
    const auto pairs = *reinterpret_cast<const Pack<unsigned, count / 2>*>(from);
#pragma unroll
    for (int i = 0; i < count; i += 2) {
      result.items[i] = __uint_as_float(pairs.items[i / 2] << 16);
      result.items[i + 1] = __uint_as_float(pairs.items[i / 2] & 0xffff0000u);
    }
  } else {
    const auto packed = *reinterpret_cast<const Pack<T, count>*>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      result.items[i] = static_cast<Accumulate<T>>(packed.items[i]);
    }
  }
  return result;
}

template <typename T, int count>
__device__ __forceinline__ void store(T* to, const Accumulate<T> (&numbers)[count]) {
  Pack<T, count> packed;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    packed.items[i] = static_cast<T>(numbers[i]);
  }
  *reinterpret_cast<Pack<T, count>*>(to) = packed;
}

// One axis of a point: two neighboring pixels that are both inside of the level, and their parts.
// At a border they are the outermost two and the part of the one that the point does not touch is
// zero. So a point always reads a 2x2 patch whose corners lie at fixed distances, and only its
// first pixel has to be told to other lanes.
template <typename A>
struct Axis {
  int low;
  A low_part, high_part;
  A low_slope, high_slope;  // derivatives of the parts by the position, in 1 / pixel

  // position: in pixels, 0 = center of the first one, inside of (-1, size).
  __device__ __forceinline__ Axis(A position, A size) {
    const A first = fmin(fmax(floor(position), A(0)), fmax(size - A(2), A(0)));
    const A ahead = position - first;  // inside of (-1, 2)
    const bool has_high = size > A(1);
    low = static_cast<int>(first);
    low_part = fmax(A(1) - fabs(ahead), A(0));
    high_part = has_high ? fmin(fmax(ahead, A(0)), A(2) - ahead) : A(0);
    low_slope = ahead < A(0) ? A(1) : (ahead < A(1) ? A(-1) : A(0));
    high_slope = has_high && ahead >= A(0) ? (ahead < A(1) ? A(1) : A(-1)) : A(0);
  }
};

// Corners are ordered by row, then column.
template <typename A>
struct Point {
  Axis<A> column, row;
  A attention;
  uint32_t pixel;  // the first corner
  bool inside;

  static __device__ __forceinline__ Point at(
      const Pack<A, 2>& location, A weight, const CudaLevel& level) {
    const A width = static_cast<A>(level.width), height = static_cast<A>(level.height);
    const A x = location.items[0] * width - A(0.5), y = location.items[1] * height - A(0.5);
    // NaN compares false, so it never becomes an index. Selected, not multiplied: a point outside
    // is worth zero whatever its weight is.
    const bool inside = x > A(-1) && x < width && y > A(-1) && y < height;
    const Axis<A> column(inside ? x : A(0), width), row(inside ? y : A(0), height);
    const uint32_t pixel =
        level.start + static_cast<uint32_t>(row.low * level.width + column.low);
    return {column, row, inside ? weight : A(0), pixel, inside};
  }
};

// What the other lanes of a row have to know about a point.
template <typename A>
struct Sample {
  uint32_t pixel;
  A weights[4];

  __device__ __forceinline__ explicit Sample(const Point<A>& point) : pixel(point.pixel) {
    const A upper = point.attention * point.row.low_part;
    const A lower = point.attention * point.row.high_part;
    weights[0] = upper * point.column.low_part;
    weights[1] = upper * point.column.high_part;
    weights[2] = lower * point.column.low_part;
    weights[3] = lower * point.column.high_part;
  }

  __device__ __forceinline__ bool touches() const {
    return weights[0] != A(0) || weights[1] != A(0) || weights[2] != A(0) || weights[3] != A(0);
  }

  // The sample of another lane of the same row.
  template <int lanes>
  __device__ __forceinline__ Sample of_lane(int lane) const {
    Sample other = *this;
    other.pixel = __shfl_sync(whole_warp, pixel, lane, lanes);
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      other.weights[corner] = __shfl_sync(whole_warp, weights[corner], lane, lanes);
    }
    return other;
  }
};

// Addresses of the corners of a point. start: of the lane's channel in the first pixel. The
// factors are unsigned so that their 64-bit product and its sum with a pointer are one instruction.
template <typename T>
struct Corners {
  T* items[4];

  __device__ __forceinline__ Corners(
      T* start, uint32_t pixel, const CudaLevel& level, uint32_t pixel_bytes) {
    typedef std::conditional_t<std::is_const_v<T>, const char, char> Byte;
    const uint64_t right = static_cast<uint64_t>(level.right) * pixel_bytes;
    const uint64_t down = static_cast<uint64_t>(level.down) * pixel_bytes;
    const uint64_t corners[4] = {0, right, down, right + down};
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      items[corner] = reinterpret_cast<T*>(
          reinterpret_cast<Byte*>(start) + corners[corner] +
          static_cast<uint64_t>(pixel) * pixel_bytes);
    }
  }
};

// Where one lane works. fixed_levels > 0: levels, points and channels are known to the compiler.
template <typename T, int fixed_levels>
struct Work {
  static constexpr int lanes = row_lanes<T>;
  static constexpr int rows_per_block = block_threads / lanes;
  // Whether every lane gets the same number of points.
  static constexpr bool whole_groups =
      fixed_levels > 0 && fixed_levels * usual_points % lanes == 0;

  int levels, points, channels;
  int lane, head;
  int64_t query;
  int64_t stride;  // elements between neighboring pixels
  bool active;     // the last block may have queries too many: they compute but do not write

  __device__ __forceinline__ explicit Work(const CudaProblem& problem)
      : levels(fixed_levels > 0 ? fixed_levels : problem.levels),
        points(fixed_levels > 0 ? usual_points : problem.points),
        channels(fixed_levels > 0 ? usual_channels : problem.channels),
        lane(threadIdx.x % lanes),
        head(blockIdx.x % problem.heads),
        stride(static_cast<int64_t>(problem.heads) * channels) {
    const int64_t wanted =
        static_cast<int64_t>(blockIdx.x / problem.heads) * rows_per_block + threadIdx.x / lanes;
    active = wanted < problem.queries;
    query = active ? wanted : problem.queries - 1;
  }

  __device__ __forceinline__ int64_t row(const CudaProblem& problem, int64_t image) const {
    return (image * problem.queries + query) * problem.heads + head;
  }
};

inline dim3 grid_of_rows(const CudaProblem& problem, int rows_per_block) {
  const int64_t blocks = (problem.queries + rows_per_block - 1) / rows_per_block;
  return dim3(
      static_cast<unsigned>(blocks * problem.heads),
      static_cast<unsigned>(std::min<int64_t>(problem.batch, 65535)));
}

// Runs Launch<T, count, fixed_levels>: the fastest kernel that fits. count = channels that a lane
// loads at once.
template <template <typename, int, int> class Launch, typename T, typename Tensors>
void choose_sizes(const CudaProblem& problem, const Tensors& tensors, cudaStream_t stream) {
  constexpr int count = 16 / sizeof(T);
  if constexpr (!std::is_same_v<T, double>) {
    if (problem.channels == usual_channels && problem.points == usual_points) {
      switch (problem.levels) {
        case 3: return Launch<T, count, 3>::run(problem, tensors, stream);
        case 4: return Launch<T, count, 4>::run(problem, tensors, stream);
        case 5: return Launch<T, count, 5>::run(problem, tensors, stream);
      }
    }
  }
  if (problem.channels % count == 0) {
    Launch<T, count, 0>::run(problem, tensors, stream);
  } else {
    Launch<T, 1, 0>::run(problem, tensors, stream);
  }
}

template <template <typename, int, int> class Launch, typename Tensors>
void choose_kernel(
    ScalarType type, const CudaProblem& problem, const Tensors& tensors,
    cudaStream_t stream) {
  switch (type) {
    case ScalarType::Float: return choose_sizes<Launch, float>(problem, tensors, stream);
    case ScalarType::Double: return choose_sizes<Launch, double>(problem, tensors, stream);
    case ScalarType::BFloat16: return choose_sizes<Launch, c10::BFloat16>(problem, tensors, stream);
    case ScalarType::Half: return choose_sizes<Launch, c10::Half>(problem, tensors, stream);
    default: CO_DETR_CHECK(false, "value must be fp32, fp64, bf16 or fp16, got ", type);
  }
}

}  // namespace co_detr
