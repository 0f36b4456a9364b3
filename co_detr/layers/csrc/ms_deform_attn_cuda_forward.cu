// Multi-scale deformable attention on CUDA: output.
//
// The lanes of a row share out its points: each computes the place and the weights of one, then all
// lanes go through them together, one shuffle per number, and gather their own channels.

#include "ms_deform_attn_cuda_device.h"

namespace co_detr {
namespace {

template <typename T, int count, int fixed_levels>
__global__ void __launch_bounds__(block_threads, 4) forward_kernel(
    const __grid_constant__ CudaProblem problem, const T* __restrict__ value,
    const Accumulate<T>* __restrict__ locations, const Accumulate<T>* __restrict__ weights,
    T* __restrict__ output) {
  typedef Accumulate<T> A;
  const Work<T, fixed_levels> work(problem);
  constexpr int lanes = work.lanes;
  const int all_points = work.levels * work.points;
  for (int64_t image = blockIdx.y; image < problem.batch; image += gridDim.y) {
    const int64_t row = work.row(problem, image);
    const Pack<A, 2>* row_locations =
        reinterpret_cast<const Pack<A, 2>*>(locations) + row * all_points;
    const A* row_weights = weights + row * all_points;
    const T* head_value = value + image * problem.pixels * work.stride +
        static_cast<int64_t>(work.head) * work.channels;
    // One round for the usual number of channels.
    for (int first = 0; first < work.channels; first += lanes * count) {
      const int channel = first + work.lane * count;
      const bool has_channel = fixed_levels > 0 || channel < work.channels;
      const T* lane_value = head_value + (has_channel ? channel : 0);
      A sums[count] = {};
#pragma unroll fixed_levels > 0 ? 16 : 1
      for (int group = 0; group < all_points; group += lanes) {
        const int own = min(group + work.lane, all_points - 1);
        const CudaLevel own_level = problem.level[own / work.points];
        const Sample<A> sample(Point<A>::at(row_locations[own], row_weights[own], own_level));
#pragma unroll fixed_levels > 0 ? lanes : 1
        for (int i = 0; i < lanes; ++i) {
          if (!work.whole_groups && group + i >= all_points) {
            break;
          }
          const Sample<A> shared = sample.template of_lane<lanes>(i);
          const CudaLevel& level = problem.level[(group + i) / work.points];
          const Corners<const T> corners(lane_value, shared.pixel, level, problem.pixel_bytes);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const auto pixel = load<T, count>(corners.items[corner]);
#pragma unroll
            for (int c = 0; c < count; ++c) {
              sums[c] += shared.weights[corner] * pixel.items[c];
            }
          }
        }
      }
      if (work.active && has_channel) {
        store(output + row * work.channels + channel, sums);
      }
    }
  }
}

template <typename T, int count, int fixed_levels>
struct Forward {
  static void run(const CudaProblem& problem, const CudaForward& tensors, cudaStream_t stream) {
    typedef Accumulate<T> A;
    const dim3 grid = grid_of_rows(problem, Work<T, fixed_levels>::rows_per_block);
    forward_kernel<T, count, fixed_levels><<<grid, block_threads, 0, stream>>>(
        problem, static_cast<const T*>(tensors.value), static_cast<const A*>(tensors.locations),
        static_cast<const A*>(tensors.weights), static_cast<T*>(tensors.output));
    CO_DETR_CHECK_LAUNCH();
  }
};

}  // namespace

void launch_forward(
    ScalarType type, const CudaProblem& problem, const CudaForward& tensors,
    cudaStream_t stream) {
  choose_kernel<Forward>(type, problem, tensors, stream);
}

}  // namespace co_detr
