// The backward CPU kernels: single-threaded, for a part of the problem, in the two phases of the
// forward kernel. Gradients of the points gather pixels and the gradient of the value scatters to
// them. They are kernels of their own because threads can share out the first by queries, which
// scales best, and the second only by pixels.

#include "ms_deform_attn_plan.h"

#include <cstring>

namespace co_detr {
namespace {

// Adds grad_output . corner, over a block of channels, to plan.dots.
template <int vectors, typename V, typename T>
CO_DETR_INLINE void dot_corners(
    const V* value, int64_t pixel_stride, Plan<T>& plan, int64_t points, const V* grad_output) {
  if constexpr (vectors == 0) {
    for (int64_t i = 0; i < points; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        plan.dots[4 * i + corner] +=
            T(*grad_output) * T(value[plan.pixel[corner][i] * pixel_stride]);
      }
    }
  } else {
    typedef typename Simd<T>::Vector Vector;
    Vector grad[vectors];
    load_block(grad_output, grad);
    for (int64_t i = 0; i < points; ++i) {
      Vector products[4] = {};
      for (int corner = 0; corner < 4; ++corner) {
        Vector block[vectors];
        load_block(value + plan.pixel[corner][i] * pixel_stride, block);
        for (int v = 0; v < vectors; ++v) {
          products[corner] += grad[v] * block[v];
        }
      }
      typename Simd<T>::Quad dots;
      std::memcpy(&dots, &plan.dots[4 * i], sizeof(dots));
      dots += lane_sums<T>(products);
      std::memcpy(&plan.dots[4 * i], &dots, sizeof(dots));
    }
  }
}

template <typename V, typename T>
CO_DETR_INLINE void differentiate_points(
    const Problem<V>& problem, const Plan<T>& plan, const T* weights, T* grad_locations,
    T* grad_weights) {
  const T* dots = plan.dots.data();
  const T *left = plan.left.data(), *right = plan.right.data(), *top = plan.top.data(),
          *bottom = plan.bottom.data();
  const T *slope_left = plan.slope_left.data(), *slope_right = plan.slope_right.data(),
          *slope_top = plan.slope_top.data(), *slope_bottom = plan.slope_bottom.data();
#pragma omp simd
  for (int64_t i = 0; i < problem.points_per_head; ++i) {
    const T d0 = dots[4 * i], d1 = dots[4 * i + 1], d2 = dots[4 * i + 2], d3 = dots[4 * i + 3];
    const T upper = left[i] * d0 + right[i] * d1, lower = left[i] * d2 + right[i] * d3;
    const T along_x = top[i] * (slope_left[i] * d0 + slope_right[i] * d1) +
        bottom[i] * (slope_left[i] * d2 + slope_right[i] * d3);
    const T along_y = slope_top[i] * upper + slope_bottom[i] * lower;
    grad_weights[i] = top[i] * upper + bottom[i] * lower;
    // Selected: the weight of a point outside, whose slopes are zero, may be NaN.
    const T weight = slope_left[i] * slope_top[i] != T(0) ? weights[i] : T(0);
    grad_locations[2 * i] = weight * static_cast<T>(problem.width[i]) * along_x;
    grad_locations[2 * i + 1] = weight * static_cast<T>(problem.height[i]) * along_y;
  }
}

template <typename V>
CO_DETR_INLINE void point_gradients(
    const Problem<V>& problem, const Gradients<V>& gradients, const Rows& rows) {
  typedef SumOf<V> T;
  const int64_t heads = problem.sizes.heads, channels = problem.sizes.channels;
  const int64_t per_head = problem.points_per_head, stride = problem.pixel_stride;
  Plan<T> plan(per_head);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t row = problem.row(i);
    const V* image = problem.value + row / problem.sizes.queries * problem.sizes.pixels * stride;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = (row * heads + head) * per_head;
      const T* weights = problem.weights + first;
      plan_points<PlanFor::derivatives>(
          problem, problem.locations + 2 * first, weights, 0, per_head, plan);
      std::memset(plan.dots.data(), 0, 4 * per_head * sizeof(T));
      for_channel_blocks<T, 4>(
          channels, [&](auto vectors, int64_t channel) CO_DETR_INLINE_LAMBDA {
            const int64_t offset = head * channels + channel;
            dot_corners<vectors.value>(
                image + offset, stride, plan, per_head, gradients.output + row * stride + offset);
          });
      differentiate_points(
          problem, plan, weights, gradients.locations + 2 * first, gradients.weights + first);
    }
  }
}

template <int vectors, typename V, typename T>
CO_DETR_INLINE void scatter_corners(
    T* grad_value, int64_t pixel_stride, const Plan<T>& plan, int64_t first, int64_t last,
    const V* grad_output) {
  if constexpr (vectors == 0) {
    for (int64_t i = first; i < last; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        grad_value[plan.pixel[corner][i] * pixel_stride] +=
            T(*grad_output) * plan.weight[corner][i];
      }
    }
  } else {
    constexpr int lanes = Simd<T>::lanes;
    typedef typename Simd<T>::Vector Vector;
    Vector grad[vectors];
    for (int v = 0; v < vectors; ++v) {
      grad[v] = load(grad_output + v * lanes);
    }
    for (int64_t i = first; i < last; ++i) {
      // All loads come before all stores, so that no load has to wait for a store of this point.
      T* pixel[4];
      // Unrolled by order: GCC would keep ``sums`` in memory, at twice the time.
      Vector sums[4][vectors];
#pragma GCC unroll 4
      for (int corner = 0; corner < 4; ++corner) {
        pixel[corner] = grad_value + plan.pixel[corner][i] * pixel_stride;
        for (int v = 0; v < vectors; ++v) {
          sums[corner][v] = load<T>(pixel[corner] + v * lanes) + grad[v] * plan.weight[corner][i];
        }
      }
      // Backwards: when corners are the same pixel, only the first has a weight (see Axis).
#pragma GCC unroll 4
      for (int corner = 3; corner >= 0; --corner) {
        for (int v = 0; v < vectors; ++v) {
          store<T>(pixel[corner] + v * lanes, sums[corner][v]);
        }
      }
    }
  }
}

template <typename V>
CO_DETR_INLINE void value_gradient(
    const Problem<V>& problem, const Gradients<V>& gradients, const Slice& slice) {
  typedef SumOf<V> T;
  const int64_t heads = problem.sizes.heads, channels = problem.sizes.channels;
  const int64_t per_head = problem.points_per_head, stride = problem.pixel_stride;
  const int64_t queries = problem.sizes.queries;
  T* image = gradients.value + slice.image * problem.sizes.pixels * stride;
  Plan<T> plan(per_head);
  for (int64_t i = slice.image * queries; i < (slice.image + 1) * queries; ++i) {
    const int64_t row = problem.row(i);
    for (int64_t head = slice.first_head; head < slice.last_head; ++head) {
      const int64_t first = (row * heads + head) * per_head;
      plan_points<PlanFor::weights>(
          problem, problem.locations + 2 * first, problem.weights + first, slice.first_point,
          slice.last_point, plan);
      // Two vectors of four corners: as many sums as 16 registers hold.
      for_channel_blocks<T, 2>(
          channels, [&](auto vectors, int64_t channel) CO_DETR_INLINE_LAMBDA {
            const int64_t offset = head * channels + channel;
            scatter_corners<vectors.value>(
                image + offset, stride, plan, slice.first_point, slice.last_point,
                gradients.output + row * stride + offset);
          });
    }
  }
}

}  // namespace

// Plain functions, one for each type: everything above is inlined into each of their clones.
#define CO_DETR_BACKWARD(V)                                                           \
  CO_DETR_MULTIVERSION void backward_points(                                          \
      const Problem<V>& problem, const Gradients<V>& gradients, const Rows& rows) {   \
    point_gradients(problem, gradients, rows);                                        \
  }                                                                                   \
  CO_DETR_MULTIVERSION void backward_value(                                           \
      const Problem<V>& problem, const Gradients<V>& gradients, const Slice& slice) { \
    value_gradient(problem, gradients, slice);                                        \
  }

CO_DETR_BACKWARD(float)
CO_DETR_BACKWARD(double)
CO_DETR_BACKWARD(c10::BFloat16)

}  // namespace co_detr
