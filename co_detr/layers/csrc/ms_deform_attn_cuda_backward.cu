// Multi-scale deformable attention on CUDA: gradients.
//
// Lanes share out the points of a row as in the forward pass. All lanes take part in the dot
// products of grad_output with the corners of a point; the sums end in the lane that knows the
// point, which turns them into the gradients of its location and weight.

#include "ms_deform_attn_cuda_device.h"

namespace co_detr {
namespace {

// Adding 16 bytes at once came with compute capability 9.0 and CUDA 12.1.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && \
    (__CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 1))
#define CO_DETR_VECTOR_REDUCTIONS 1
#else
#define CO_DETR_VECTOR_REDUCTIONS 0
#endif

#if CO_DETR_VECTOR_REDUCTIONS
// atomicAdd of 16 bytes to each of the corners. In PTX because of the condition: in C++ it is a
// branch for every corner, or one that address arithmetic is moved into and done there at length.
__device__ __forceinline__ void add_vectors_if(
    bool told, const Corners<float>& to, const Pack<float, 4>& grad, const float* w) {
  const float* g = grad.items;
  asm volatile(
      "{ .reg .pred told; setp.ne.s32 told, %0, 0; @!told bra SKIP;\n"
      "red.global.add.v4.f32 [%1], {%5, %6, %7, %8};\n"
      "red.global.add.v4.f32 [%2], {%9, %10, %11, %12};\n"
      "red.global.add.v4.f32 [%3], {%13, %14, %15, %16};\n"
      "red.global.add.v4.f32 [%4], {%17, %18, %19, %20}; SKIP: }"
      ::"r"(static_cast<int>(told)), "l"(__cvta_generic_to_global(to.items[0])),
      "l"(__cvta_generic_to_global(to.items[1])), "l"(__cvta_generic_to_global(to.items[2])),
      "l"(__cvta_generic_to_global(to.items[3])), "f"(g[0] * w[0]), "f"(g[1] * w[0]),
      "f"(g[2] * w[0]), "f"(g[3] * w[0]), "f"(g[0] * w[1]), "f"(g[1] * w[1]), "f"(g[2] * w[1]),
      "f"(g[3] * w[1]), "f"(g[0] * w[2]), "f"(g[1] * w[2]), "f"(g[2] * w[2]), "f"(g[3] * w[2]),
      "f"(g[0] * w[3]), "f"(g[1] * w[3]), "f"(g[2] * w[3]), "f"(g[3] * w[3])
      : "memory");
}
#endif

// Channels that one lane adds to the gradient of the value: `parts` times `width` neighbors. Not
// the ones that it gathers: in every part the lanes of a row lie side by side, so that a reduction
// touches whole sectors of memory.
template <typename T, int count>
struct Scatter {
  typedef Accumulate<T> A;
  static constexpr int width =
      CO_DETR_VECTOR_REDUCTIONS && std::is_same_v<A, float> && count % 4 == 0 ? 4 : 1;
  static constexpr int parts = count / width;

  static __device__ __forceinline__ int channel(int lane, int part) {
    return (part * row_lanes<T> + lane) * width;
  }

  static __device__ __forceinline__ void add_if(
      bool told, const Corners<A>& to, const Pack<A, width>& grad, const A* weights) {
    if constexpr (width == 4) {
#if CO_DETR_VECTOR_REDUCTIONS
      add_vectors_if(told, to, grad, weights);
#endif
    } else if (told) {
#pragma unroll
      for (int corner = 0; corner < 4; ++corner) {
        atomicAdd(to.items[corner], grad.items[0] * weights[corner]);
      }
    }
  }
};

// grad_output . corner, for the corners of one point.
template <typename A>
struct Dots {
  A items[4];
};

// Sums over the lanes of a row, without adding anything twice: dots_of(i) = this lane's share of
// point i, result = the sums of the point whose number is the lane's. When two points meet, half of
// the lanes keep the first and hand their share of the second over, the others the other way round.
template <typename A, int first, int points, typename DotsOf>
__device__ __forceinline__ Dots<A> sum_over_lanes(int lane, const DotsOf& dots_of) {
  if constexpr (points == 1) {
    return dots_of(first);
  } else {
    constexpr int half = points / 2;
    const Dots<A> lower = sum_over_lanes<A, first, half>(lane, dots_of);
    const Dots<A> upper = sum_over_lanes<A, first + half, half>(lane, dots_of);
    const bool keeps_upper = lane & half;
    Dots<A> sums;
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      const A kept = keeps_upper ? upper.items[corner] : lower.items[corner];
      const A given = keeps_upper ? lower.items[corner] : upper.items[corner];
      sums.items[corner] = kept + __shfl_xor_sync(whole_warp, given, half);
    }
    return sums;
  }
}

// The same sums for one point, in all lanes: slower, but a loop over points can stay a loop.
template <int lanes, typename A>
__device__ __forceinline__ Dots<A> sum_to_all_lanes(Dots<A> dots) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int corner = 0; corner < 4; ++corner) {
      dots.items[corner] += __shfl_xor_sync(whole_warp, dots.items[corner], distance);
    }
  }
  return dots;
}

template <typename T, int count, int fixed_levels>
__global__ void __launch_bounds__(block_threads, 2) backward_kernel(
    const __grid_constant__ CudaProblem problem, const T* __restrict__ grad_output,
    const T* __restrict__ value, const Accumulate<T>* __restrict__ locations,
    const Accumulate<T>* __restrict__ weights, Accumulate<T>* __restrict__ grad_value,
    Accumulate<T>* __restrict__ grad_locations, Accumulate<T>* __restrict__ grad_weights) {
  typedef Accumulate<T> A;
  typedef Scatter<T, count> Out;
  const Work<T, fixed_levels> work(problem);
  constexpr int lanes = work.lanes;
  const int all_points = work.levels * work.points;
  const bool scatters = work.active && grad_value != nullptr;
  for (int64_t image = blockIdx.y; image < problem.batch; image += gridDim.y) {
    const int64_t row = work.row(problem, image);
    const int64_t origin =
        image * problem.pixels * work.stride + static_cast<int64_t>(work.head) * work.channels;
    const T* row_grad = grad_output + row * work.channels;
#pragma unroll fixed_levels > 0 ? 16 : 1
    for (int group = 0; group < all_points; group += lanes) {
      const bool owns = group + work.lane < all_points;
      const int own = owns ? group + work.lane : all_points - 1;
      const int64_t own_point = row * all_points + own;
      const CudaLevel own_level = problem.level[own / work.points];
      const Point<A> point = Point<A>::at(
          load<A, 2>(locations + 2 * own_point), weights[own_point], own_level);
      const Sample<A> sample(point);

      const auto dots_of = [&](int i) {
        Dots<A> dots = {};
        if (!work.whole_groups && group + i >= all_points) {
          return dots;
        }
        const Sample<A> shared = sample.template of_lane<lanes>(i);
        const CudaLevel& level = problem.level[(group + i) / work.points];
        for (int first = 0; first < work.channels; first += lanes * count) {
          const int channel = first + work.lane * count;
          if (fixed_levels == 0 && channel >= work.channels) {
            continue;
          }
          const auto grad = load<T, count>(row_grad + channel);
          const Corners<const T> corners(
              value + origin + channel, shared.pixel, level, problem.pixel_bytes);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            const auto pixel = load<T, count>(corners.items[corner]);
#pragma unroll
            for (int c = 0; c < count; ++c) {
              dots.items[corner] += grad.items[c] * pixel.items[c];
            }
          }
        }
        for (int first = 0; first < work.channels; first += lanes * count) {
#pragma unroll
          for (int part = 0; part < Out::parts; ++part) {
            const int channel = first + Out::channel(work.lane, part);
            if (fixed_levels == 0 && channel >= work.channels) {
              continue;
            }
            const auto grad = load<T, Out::width>(row_grad + channel);
            const Corners<A> corners(
                grad_value + origin + channel, shared.pixel, level, problem.grad_pixel_bytes);
            Out::add_if(scatters && shared.touches(), corners, grad, shared.weights);
          }
        }
        return dots;
      };
      Dots<A> sums = {};
      if constexpr (fixed_levels > 0) {
        sums = sum_over_lanes<A, 0, lanes>(work.lane, dots_of);
      } else {
#pragma unroll 1
        for (int i = 0; i < lanes && group + i < all_points; ++i) {
          const Dots<A> total = sum_to_all_lanes<lanes>(dots_of(i));
          sums = work.lane == i ? total : sums;
        }
      }

      if (work.active && owns) {
        const Axis<A>&column = point.column, &line = point.row;
        const A* dots = sums.items;
        const A upper = column.low_part * dots[0] + column.high_part * dots[1];
        const A lower = column.low_part * dots[2] + column.high_part * dots[3];
        const A upper_slope = column.low_slope * dots[0] + column.high_slope * dots[1];
        const A lower_slope = column.low_slope * dots[2] + column.high_slope * dots[3];
        const A for_weight = line.low_part * upper + line.high_part * lower;
        grad_weights[own_point] = point.inside ? for_weight : A(0);
        const A for_x = line.low_part * upper_slope + line.high_part * lower_slope;
        const A for_y = line.low_slope * upper + line.high_slope * lower;
        *reinterpret_cast<Pack<A, 2>*>(grad_locations + 2 * own_point) = {
            {point.attention * static_cast<A>(own_level.width) * for_x,
             point.attention * static_cast<A>(own_level.height) * for_y}};
      }
    }
  }
}

template <typename T, int count, int fixed_levels>
struct Backward {
  static void run(const CudaProblem& problem, const CudaBackward& tensors, cudaStream_t stream) {
    typedef Accumulate<T> A;
    const dim3 grid = grid_of_rows(problem, Work<T, fixed_levels>::rows_per_block);
    backward_kernel<T, count, fixed_levels><<<grid, block_threads, 0, stream>>>(
        problem, static_cast<const T*>(tensors.grad_output), static_cast<const T*>(tensors.value),
        static_cast<const A*>(tensors.locations), static_cast<const A*>(tensors.weights),
        static_cast<A*>(tensors.grad_value), static_cast<A*>(tensors.grad_locations),
        static_cast<A*>(tensors.grad_weights));
    CO_DETR_CHECK_LAUNCH();
  }
};

}  // namespace

void launch_backward(
    ScalarType type, const CudaProblem& problem, const CudaBackward& tensors,
    cudaStream_t stream) {
  choose_kernel<Backward>(type, problem, tensors, stream);
}

}  // namespace co_detr
