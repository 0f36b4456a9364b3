// The gradient of the value with the same bits every time: no thread adds to what another one owns.
//
// Points are listed by the first pixel of the 2x2 patch that they touch (the host sorts the list).
// A pixel then finds the points that touch it in two stretches of the list, those that start in its
// own line and those that start in the line above, and sums them in the order of the list.

#include "ms_deform_attn_cuda_device.h"

#include <limits>

namespace co_detr {
namespace {

constexpr int32_t nowhere = std::numeric_limits<int32_t>::max();

template <typename A>
__device__ __forceinline__ Point<A> point_at(
    const A* locations, const A* weights, int64_t index, const CudaLevel& level) {
  return Point<A>::at(load<A, 2>(locations + 2 * index), weights[index], level);
}

// pairs: (image, head) in turn, from first_pair on; keys (pairs, Q * L * P).
template <typename A>
__global__ void __launch_bounds__(block_threads) list_points_kernel(
    const __grid_constant__ CudaProblem problem, const A* __restrict__ locations,
    const A* __restrict__ weights, int64_t first_pair, int64_t pairs, int32_t* __restrict__ keys) {
  const int row_points = problem.levels * problem.points;
  const int64_t pair_points = static_cast<int64_t>(problem.queries) * row_points;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
       i < pairs * pair_points; i += threads) {
    const int64_t pair = first_pair + i / pair_points, query = i % pair_points / row_points;
    const int point_of_row = static_cast<int>(i % row_points);
    const int64_t row =
        (pair / problem.heads * problem.queries + query) * problem.heads + pair % problem.heads;
    const Point<A> point = point_at(
        locations, weights, row * row_points + point_of_row,
        problem.level[point_of_row / problem.points]);
    keys[i] = point.inside ? static_cast<int32_t>(point.pixel) : nowhere;
  }
}

// The place of the first of the sorted keys that is not below `key`.
__device__ __forceinline__ int64_t find(const int32_t* keys, int64_t count, int64_t key) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// One row of lanes for every pixel of a pair. order: the point of every sorted key.
template <typename T, int count>
__global__ void __launch_bounds__(block_threads) gather_gradient_kernel(
    const __grid_constant__ CudaProblem problem, const T* __restrict__ grad_output,
    const Accumulate<T>* __restrict__ locations, const Accumulate<T>* __restrict__ weights,
    int64_t first_pair, int64_t pairs, const int32_t* __restrict__ keys,
    const int64_t* __restrict__ order, T* __restrict__ grad_value) {
  typedef Accumulate<T> A;
  constexpr int lanes = row_lanes<T>;
  const int lane = threadIdx.x % lanes;
  const int64_t wanted =
      static_cast<int64_t>(blockIdx.x) * (block_threads / lanes) + threadIdx.x / lanes;
  const bool active = wanted < problem.pixels;
  const int64_t pixel = active ? wanted : problem.pixels - 1;
  int level_index = 0;
  while (level_index + 1 < problem.levels && pixel >= problem.level[level_index + 1].start) {
    ++level_index;
  }
  const CudaLevel level = problem.level[level_index];
  const int x = static_cast<int>(pixel - level.start) % level.width;
  const int y = static_cast<int>(pixel - level.start) / level.width;
  const int row_points = problem.levels * problem.points;
  const int64_t pair_points = static_cast<int64_t>(problem.queries) * row_points;
  for (int64_t pair = blockIdx.y; pair < pairs; pair += gridDim.y) {
    const int64_t image = (first_pair + pair) / problem.heads;
    const int head = static_cast<int>((first_pair + pair) % problem.heads);
    const int32_t* pair_keys = keys + pair * pair_points;
    for (int first = 0; first < problem.channels; first += lanes * count) {
      const int channel = first + lane * count;
      const bool has_channel = channel < problem.channels;
      A sums[count] = {};
#pragma unroll 1
      for (int line = y - 1; line <= y; ++line) {
        const bool starts_points = line >= 0 && line <= max(level.height - 2, 0);
        const int64_t line_start = static_cast<int64_t>(level.start) + line * level.width;
        int64_t next = 0, end = 0;
        if (starts_points) {
          next = find(pair_keys, pair_points, line_start + max(x - 1, 0));
          end = find(pair_keys, pair_points, line_start + min(x, max(level.width - 2, 0)) + 1);
        }
        // The rows of a warp stay together, even where one is done: all lanes must shuffle.
        for (; __any_sync(whole_warp, next < end); next += lanes) {
          int64_t source = 0;
          A weight = 0;
          if (next + lane < end) {
            const int64_t index = order[pair * pair_points + next + lane];
            source = (image * problem.queries + index / row_points) * problem.heads + head;
            const Point<A> point = point_at(
                locations, weights, source * row_points + index % row_points, level);
            weight = point.attention *
                (point.column.low == x ? point.column.low_part : point.column.high_part) *
                (point.row.low == y ? point.row.low_part : point.row.high_part);
          }
#pragma unroll
          for (int i = 0; i < lanes; ++i) {
            const A factor = __shfl_sync(whole_warp, weight, i, lanes);
            const int64_t from = __shfl_sync(whole_warp, source, i, lanes);
            if (factor != A(0) && has_channel) {
              const auto grad = load<T, count>(grad_output + from * problem.channels + channel);
#pragma unroll
              for (int c = 0; c < count; ++c) {
                sums[c] += factor * grad.items[c];
              }
            }
          }
        }
      }
      if (active && has_channel) {
        store(
            grad_value +
                ((image * problem.pixels + pixel) * problem.heads + head) * problem.channels +
                channel,
            sums);
      }
    }
  }
}

unsigned clamped(int64_t blocks, int64_t limit) {
  return static_cast<unsigned>(std::min(blocks, limit));
}

template <typename A>
void list_points(const CudaProblem& problem, const CudaPointList& list, cudaStream_t stream) {
  const int64_t points =
      list.pairs * problem.queries * static_cast<int64_t>(problem.levels) * problem.points;
  const int64_t blocks = (points + block_threads - 1) / block_threads;
  list_points_kernel<A><<<clamped(blocks, 1 << 20), block_threads, 0, stream>>>(
      problem, static_cast<const A*>(list.locations), static_cast<const A*>(list.weights),
      list.first_pair, list.pairs, list.keys);
  CO_DETR_CHECK_LAUNCH();
}

template <typename T, int count, int fixed_levels>
struct Gather {
  static void run(const CudaProblem& problem, const CudaGather& tensors, cudaStream_t stream) {
    typedef Accumulate<T> A;
    const int rows_per_block = block_threads / row_lanes<T>;
    const dim3 grid(
        static_cast<unsigned>((problem.pixels + rows_per_block - 1) / rows_per_block),
        clamped(tensors.list.pairs, 65535));
    gather_gradient_kernel<T, count><<<grid, block_threads, 0, stream>>>(
        problem, static_cast<const T*>(tensors.grad_output),
        static_cast<const A*>(tensors.list.locations), static_cast<const A*>(tensors.list.weights),
        tensors.list.first_pair, tensors.list.pairs, tensors.list.keys, tensors.order,
        static_cast<T*>(tensors.grad_value));
    CO_DETR_CHECK_LAUNCH();
  }
};

}  // namespace

void launch_list_points(
    ScalarType type, const CudaProblem& problem, const CudaPointList& list,
    cudaStream_t stream) {
  type == ScalarType::Double ? list_points<double>(problem, list, stream)
                       : list_points<float>(problem, list, stream);
}

void launch_gather_gradient(
    ScalarType type, const CudaProblem& problem, const CudaGather& tensors,
    cudaStream_t stream) {
  choose_kernel<Gather>(type, problem, tensors, stream);
}

}  // namespace co_detr
