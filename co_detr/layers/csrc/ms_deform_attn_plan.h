// Phase one of the CPU kernels: the points of one (query, head) as corner pixels and weights.
#pragma once

#include "ms_deform_attn_common.h"
#include "ms_deform_attn_simd.h"

#include <vector>

namespace co_detr {

// Everything that is the same for all queries and heads, spread out per point for phase one.
template <typename T>
struct Problem {
  Sizes sizes;
  int64_t pixel_stride;     // H * D, elements between neighbouring pixels
  int64_t points_per_head;  // L * P
  std::vector<IntLike<T>> width, height, start;
  const T *value, *locations, *weights;

  Problem(
      const Sizes& sizes, at::IntArrayRef level_shapes, const at::Tensor& value_tensor,
      const at::Tensor& location_tensor, const at::Tensor& weight_tensor)
      : sizes(sizes),
        pixel_stride(sizes.heads * sizes.channels),
        points_per_head(sizes.levels * sizes.points),
        value(value_tensor.const_data_ptr<T>()),
        locations(location_tensor.const_data_ptr<T>()),
        weights(weight_tensor.const_data_ptr<T>()) {
    IntLike<T> first_pixel = 0;
    for (int64_t level = 0; level < sizes.levels; ++level) {
      const auto level_height = static_cast<IntLike<T>>(level_shapes[2 * level]);
      const auto level_width = static_cast<IntLike<T>>(level_shapes[2 * level + 1]);
      height.insert(height.end(), sizes.points, level_height);
      width.insert(width.end(), sizes.points, level_width);
      start.insert(start.end(), sizes.points, first_pixel);
      first_pixel += level_height * level_width;
    }
    for (auto* array : {&width, &height, &start}) {
      array->resize(points_per_head + Simd<T>::lanes);
    }
  }
};

// Phase one's result for the points of one (query, head). Corners are ordered by row, then column.
// Arrays are one vector longer than the points: the last vector may be partly filled.
template <typename T>
struct Plan {
  std::vector<IntLike<T>> pixel[4];
  std::vector<T> weight[4];                                 // bilinear times attention weight
  std::vector<T> left, right, top, bottom;                  // bilinear, 0 outside of the level
  std::vector<T> has_left, has_right, has_top, has_bottom;  // 1 inside of the level, else 0
  std::vector<T> dots;                                      // (points, 4): grad_output . corner

  explicit Plan(int64_t points) {
    const int64_t size = points + Simd<T>::lanes;
    for (int corner = 0; corner < 4; ++corner) {
      pixel[corner].resize(size);
      weight[corner].resize(size);
    }
    for (auto* array :
         {&left, &right, &top, &bottom, &has_left, &has_right, &has_top, &has_bottom}) {
      array->resize(size);
    }
    dots.resize(4 * size);
  }
};

// One axis of a vector of points: the two neighbouring pixels and how much each counts.
template <typename T>
struct Axis {
  typename Simd<T>::Ints inside, low, high;             // indices clamped into the level
  typename Simd<T>::Vector low_part, high_part;         // 0 when that pixel is outside
  typename Simd<T>::Vector has_low, has_high;
};

template <typename T>
CO_DETR_INLINE Axis<T> split_axis(
    const typename Simd<T>::Vector& location, const typename Simd<T>::Ints& size) {
  typedef typename Simd<T>::Vector Vector;
  typedef typename Simd<T>::Ints Ints;
  const Vector zero = {}, one = zero + T(1), float_size = __builtin_convertvector(size, Vector);
  const Vector wanted = location * float_size - T(0.5);
  // NaN compares false, so it never becomes an index.
  const Ints inside = (wanted > -one) & (wanted < float_size);
  const Vector pixel = inside ? wanted : zero;
  Ints low = __builtin_convertvector(pixel, Ints);  // truncates; comparisons give -1 for true
  low += __builtin_convertvector(low, Vector) > pixel;
  const Ints high = low + 1, last = size - 1, none = {};
  const Vector fraction = pixel - __builtin_convertvector(low, Vector);
  Axis<T> axis;
  axis.inside = inside;
  axis.has_low = (inside & (low >= 0)) ? one : zero;
  axis.has_high = (inside & (high < size)) ? one : zero;
  axis.low_part = axis.has_low * (one - fraction);
  axis.high_part = axis.has_high * fraction;
  axis.low = low < 0 ? none : low;
  axis.high = high > last ? last : high;
  return axis;
}

template <bool with_gradient, typename T>
CO_DETR_INLINE void plan_points(
    const Problem<T>& problem, const T* locations, const T* weights, int64_t first, int64_t last,
    Plan<T>& plan) {
  typedef typename Simd<T>::Vector Vector;
  typedef typename Simd<T>::Ints Ints;
  constexpr int lanes = Simd<T>::lanes;
  const auto store_ints = [](IntLike<T>* to, const Ints& ints) CO_DETR_INLINE_LAMBDA {
    std::memcpy(to, &ints, sizeof(ints));
  };
  for (int64_t i = first; i < last; i += lanes) {
    Vector x, y, attention;
    if (i + lanes <= last) {
      load_locations(locations + 2 * i, x, y);
      attention = load(weights + i);
    } else {  // never read past the end of the tensors
      T location_tail[2 * lanes] = {}, weight_tail[lanes] = {};
      std::memcpy(location_tail, locations + 2 * i, 2 * (last - i) * sizeof(T));
      std::memcpy(weight_tail, weights + i, (last - i) * sizeof(T));
      load_locations(location_tail, x, y);
      attention = load(weight_tail);
    }
    Ints width, height, start;
    std::memcpy(&width, &problem.width[i], sizeof(Ints));
    std::memcpy(&height, &problem.height[i], sizeof(Ints));
    std::memcpy(&start, &problem.start[i], sizeof(Ints));
    const Axis<T> column = split_axis<T>(x, width), row = split_axis<T>(y, height);
    const Ints inside = column.inside & row.inside;
    const Ints top = start + row.low * width, bottom = start + row.high * width;
    store_ints(&plan.pixel[0][i], top + column.low);
    store_ints(&plan.pixel[1][i], top + column.high);
    store_ints(&plan.pixel[2][i], bottom + column.low);
    store_ints(&plan.pixel[3][i], bottom + column.high);
    // Selected, not multiplied: a point outside is worth zero whatever its weight is.
    const Vector weight = inside ? attention : Vector{};
    store<T>(&plan.weight[0][i], weight * row.low_part * column.low_part);
    store<T>(&plan.weight[1][i], weight * row.low_part * column.high_part);
    store<T>(&plan.weight[2][i], weight * row.high_part * column.low_part);
    store<T>(&plan.weight[3][i], weight * row.high_part * column.high_part);
    if constexpr (with_gradient) {
      store<T>(&plan.left[i], column.low_part);
      store<T>(&plan.right[i], column.high_part);
      store<T>(&plan.top[i], row.low_part);
      store<T>(&plan.bottom[i], row.high_part);
      store<T>(&plan.has_left[i], column.has_low);
      store<T>(&plan.has_right[i], column.has_high);
      store<T>(&plan.has_top[i], row.has_low);
      store<T>(&plan.has_bottom[i], row.has_high);
    }
  }
}

}  // namespace co_detr
