// Multi-scale deformable attention on the CPU.
//
// Each (query, head) is done in two phases. The first turns all of its points into corner pixels
// and weights, as SIMD over points. The second runs over the points without any branch, as SIMD
// over channels: a corner outside of its level is a valid pixel with weight zero.
// Forward: threads share out the queries. Backward: threads share out the heads (and levels when
// there are more threads than heads), so nobody adds to somebody else's pixels: no atomics, and
// the same bits for any number of threads.

#include "ms_deform_attn_common.h"
#include "ms_deform_attn_plan.h"
#include "ms_deform_attn_simd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>

// One library for every x86-64: the loader picks the AVX2 clone where the processor has it.
#if defined(__x86_64__) && defined(__gnu_linux__) && !defined(__clang__)
#if __GNUC__ >= 12
#define CO_DETR_MULTIVERSION __attribute__((target_clones("arch=x86-64-v3", "default")))
#else  // cannot name a level, nor two features at once: AVX2 without FMA
#define CO_DETR_MULTIVERSION __attribute__((target_clones("avx2", "default")))
#endif
#else
#define CO_DETR_MULTIVERSION
#endif

namespace co_detr {
namespace {

// Calls body(std::integral_constant<vectors>, channel) over all channels; 0 vectors = one scalar.
template <typename T, typename Body>
CO_DETR_INLINE void for_channel_blocks(int64_t channels, const Body& body) {
  constexpr int lanes = Simd<T>::lanes;
  int64_t channel = 0;
  for (; channel + 4 * lanes <= channels; channel += 4 * lanes) {
    body(std::integral_constant<int, 4>(), channel);
  }
  for (; channel + lanes <= channels; channel += lanes) {
    body(std::integral_constant<int, 1>(), channel);
  }
  for (; channel < channels; ++channel) {
    body(std::integral_constant<int, 0>(), channel);
  }
}

template <int vectors, typename T>
CO_DETR_INLINE void forward_block(
    const T* value, int64_t pixel_stride, const Plan<T>& plan, int64_t points, T* output) {
  constexpr int count = vectors > 0 ? vectors : 1, lanes = vectors > 0 ? Simd<T>::lanes : 1;
  typedef std::conditional_t<(vectors > 0), typename Simd<T>::Vector, T> Element;
  Element sums[count] = {};
  for (int64_t i = 0; i < points; ++i) {
    for (int corner = 0; corner < 4; ++corner) {
      const T* pixel = value + plan.pixel[corner][i] * pixel_stride;
      const T weight = plan.weight[corner][i];
      for (int v = 0; v < count; ++v) {
        if constexpr (vectors > 0) {
          sums[v] += load(pixel + v * lanes) * weight;
        } else {
          sums[v] += *pixel * weight;
        }
      }
    }
  }
  for (int v = 0; v < count; ++v) {
    std::memcpy(output + v * lanes, &sums[v], sizeof(Element));
  }
}

template <typename T>
CO_DETR_INLINE void forward_rows(const Problem<T>& problem, T* output, int64_t begin, int64_t end) {
  const int64_t heads = problem.sizes.heads, channels = problem.sizes.channels;
  const int64_t per_head = problem.points_per_head, stride = problem.pixel_stride;
  Plan<T> plan(per_head);
  for (int64_t row = begin; row < end; ++row) {  // row = image * queries + query
    const T* image = problem.value + row / problem.sizes.queries * problem.sizes.pixels * stride;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = (row * heads + head) * per_head;
      plan_points<false>(
          problem, problem.locations + 2 * first, problem.weights + first, 0, per_head, plan);
      for_channel_blocks<T>(channels, [&](auto vectors, int64_t channel) CO_DETR_INLINE_LAMBDA {
        const int64_t offset = head * channels + channel;
        forward_block<vectors.value>(
            image + offset, stride, plan, per_head, output + row * stride + offset);
      });
    }
  }
}

template <int vectors, typename T>
CO_DETR_INLINE void backward_block(
    const T* value, T* grad_value, int64_t pixel_stride, Plan<T>& plan, int64_t first,
    int64_t last, const T* grad_output) {
  constexpr int lanes = Simd<T>::lanes;
  if constexpr (vectors == 0) {
    for (int64_t i = first; i < last; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t offset = plan.pixel[corner][i] * pixel_stride;
        plan.dots[4 * i + corner] += *grad_output * value[offset];
        grad_value[offset] += *grad_output * plan.weight[corner][i];
      }
    }
  } else {
    typedef typename Simd<T>::Vector Vector;
    Vector grad[vectors];
    for (int v = 0; v < vectors; ++v) {
      grad[v] = load(grad_output + v * lanes);
    }
    for (int64_t i = first; i < last; ++i) {
      Vector products[4];
      for (int corner = 0; corner < 4; ++corner) {
        const int64_t offset = plan.pixel[corner][i] * pixel_stride;
        const T weight = plan.weight[corner][i];
        Vector product = {};
        for (int v = 0; v < vectors; ++v) {
          product += grad[v] * load(value + offset + v * lanes);
          T* target = grad_value + offset + v * lanes;
          store<T>(target, load(target) + grad[v] * weight);
        }
        products[corner] = product;
      }
      typename Simd<T>::Quad dots;
      std::memcpy(&dots, &plan.dots[4 * i], sizeof(dots));
      dots += lane_sums<T>(products);
      std::memcpy(&plan.dots[4 * i], &dots, sizeof(dots));
    }
  }
}

template <typename T>
CO_DETR_INLINE void point_gradients(
    const Problem<T>& problem, const T* weights, const Plan<T>& plan, int64_t first, int64_t last,
    T* grad_locations, T* grad_weights) {
  const T* dots = plan.dots.data();
  const T *left = plan.left.data(), *right = plan.right.data(), *top = plan.top.data(),
          *bottom = plan.bottom.data();
  const T *has_left = plan.has_left.data(), *has_right = plan.has_right.data(),
          *has_top = plan.has_top.data(), *has_bottom = plan.has_bottom.data();
#pragma omp simd
  for (int64_t i = first; i < last; ++i) {
    const T d0 = dots[4 * i], d1 = dots[4 * i + 1], d2 = dots[4 * i + 2], d3 = dots[4 * i + 3];
    grad_weights[i] = top[i] * (left[i] * d0 + right[i] * d1) +
        bottom[i] * (left[i] * d2 + right[i] * d3);
    const T along_x = top[i] * (has_right[i] * d1 - has_left[i] * d0) +
        bottom[i] * (has_right[i] * d3 - has_left[i] * d2);
    const T along_y = left[i] * (has_bottom[i] * d2 - has_top[i] * d0) +
        right[i] * (has_bottom[i] * d3 - has_top[i] * d1);
    grad_locations[2 * i] = weights[i] * static_cast<T>(problem.width[i]) * along_x;
    grad_locations[2 * i + 1] = weights[i] * static_cast<T>(problem.height[i]) * along_y;
  }
}

template <typename T>
struct Gradients {
  const T* output;
  T *value, *locations, *weights;
};

// One image, a range of heads and a range of points: nobody else writes to what this writes to.
struct Slice {
  int64_t image, first_head, last_head, first_point, last_point;
};

template <typename T>
CO_DETR_INLINE void backward_slice(
    const Problem<T>& problem, const Gradients<T>& gradients, const Slice& slice, Plan<T>& plan) {
  const int64_t heads = problem.sizes.heads, channels = problem.sizes.channels;
  const int64_t queries = problem.sizes.queries;
  const int64_t per_head = problem.points_per_head, stride = problem.pixel_stride;
  const int64_t first = slice.first_point, last = slice.last_point;
  const T* value = problem.value + slice.image * problem.sizes.pixels * stride;
  T* grad_value = gradients.value + slice.image * problem.sizes.pixels * stride;
  for (int64_t row = slice.image * queries; row < (slice.image + 1) * queries; ++row) {
    for (int64_t head = slice.first_head; head < slice.last_head; ++head) {
      const int64_t offset = (row * heads + head) * per_head;
      const T* weights = problem.weights + offset;
      plan_points<true>(
          problem, problem.locations + 2 * offset, weights, first, last, plan);
      std::memset(&plan.dots[4 * first], 0, 4 * (last - first) * sizeof(T));
      for_channel_blocks<T>(channels, [&](auto vectors, int64_t channel) CO_DETR_INLINE_LAMBDA {
        const int64_t start = head * channels + channel;
        backward_block<vectors.value>(
            value + start, grad_value + start, stride, plan, first, last,
            gradients.output + row * stride + start);
      });
      point_gradients(
          problem, weights, plan, first, last, gradients.locations + 2 * offset,
          gradients.weights + offset);
    }
  }
}

// Plain functions, one for each type: everything above is inlined into each of their clones.
CO_DETR_MULTIVERSION void forward_chunk(
    const Problem<float>& problem, float* output, int64_t begin, int64_t end) {
  forward_rows(problem, output, begin, end);
}
CO_DETR_MULTIVERSION void forward_chunk(
    const Problem<double>& problem, double* output, int64_t begin, int64_t end) {
  forward_rows(problem, output, begin, end);
}
CO_DETR_MULTIVERSION void backward_chunk(
    const Problem<float>& problem, const Gradients<float>& gradients, const Slice& slice,
    Plan<float>& plan) {
  backward_slice(problem, gradients, slice, plan);
}
CO_DETR_MULTIVERSION void backward_chunk(
    const Problem<double>& problem, const Gradients<double>& gradients, const Slice& slice,
    Plan<double>& plan) {
  backward_slice(problem, gradients, slice, plan);
}

template <typename T>
void forward(const Problem<T>& problem, T* output) {
  // Small chunks: a thread that finishes early cannot help the others.
  at::parallel_for(
      0, problem.sizes.batch * problem.sizes.queries, 16, [&](int64_t begin, int64_t end) {
        forward_chunk(problem, output, begin, end);
      });
}

template <typename T>
void backward(const Problem<T>& problem, const Gradients<T>& gradients) {
  const int64_t heads = problem.sizes.heads, levels = problem.sizes.levels;
  const int64_t total_heads = problem.sizes.batch * heads;
  if (total_heads == 0 || problem.points_per_head == 0) {
    return;
  }
  // A level's pixels are touched by its own points only, so levels can be shared out as well.
  const int64_t parts = at::get_num_threads() > total_heads ? levels : 1;
  const int64_t points_per_part = problem.points_per_head / parts;
  at::parallel_for(0, total_heads * parts, 1, [&](int64_t begin, int64_t end) {
    Plan<T> plan(problem.points_per_head);
    for (int64_t task = begin; task < end;) {
      const int64_t image = task / parts / heads, head = task / parts % heads;
      const int64_t first_point = task % parts * points_per_part;
      // Undivided heads of one image go together: their corners are neighbours in memory.
      const int64_t head_count = parts == 1 ? std::min(heads - head, end - task) : 1;
      backward_chunk(
          problem, gradients,
          Slice{image, head, head + head_count, first_point, first_point + points_per_part}, plan);
      task += head_count;
    }
  });
}

at::Tensor forward_cpu(
    const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  // Half precision is computed in fp32: as exact as it gets, and gathers stay plain loads.
  const auto type = accumulation_type(value.scalar_type());
  const at::Tensor dense_value = value.to(type).contiguous();
  const at::Tensor dense_locations = locations.contiguous(), dense_weights = weights.contiguous();
  at::Tensor output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, dense_value.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    forward(
        Problem<T>(sizes, level_shapes, dense_value, dense_locations, dense_weights),
        output.mutable_data_ptr<T>());
  };
  type == at::kDouble ? run(0.0) : run(0.0f);
  return output.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef level_shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const auto type = accumulation_type(value.scalar_type());
  const at::Tensor dense_grad = grad_output.to(type).contiguous();
  const at::Tensor dense_value = value.to(type).contiguous();
  const at::Tensor dense_locations = locations.contiguous(), dense_weights = weights.contiguous();
  at::Tensor grad_value = at::zeros_like(dense_value);
  at::Tensor grad_locations = at::empty_like(dense_locations);
  at::Tensor grad_weights = at::empty_like(dense_weights);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    backward(
        Problem<T>(sizes, level_shapes, dense_value, dense_locations, dense_weights),
        Gradients<T>{
            dense_grad.const_data_ptr<T>(), grad_value.mutable_data_ptr<T>(),
            grad_locations.mutable_data_ptr<T>(), grad_weights.mutable_data_ptr<T>()});
  };
  type == at::kDouble ? run(0.0) : run(0.0f);
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(co_detr, CPU, m) {
  m.impl("ms_deform_attn", forward_cpu);
  m.impl("ms_deform_attn_backward", backward_cpu);
}

}  // namespace co_detr
