// Phase one of the CPU kernels: the points of one (query, head) as corner pixels and weights.
#pragma once

#include "ms_deform_attn_cpu.h"
#include "ms_deform_attn_simd.h"

#include <vector>

namespace co_detr {

// Phase one's result for the points of one (query, head). Corners are ordered by row, then column.
// Arrays are one vector longer than the points: the last vector may be partly filled.
template <typename T>
struct Plan {
  std::vector<IntLike<T>> pixel[4];
  std::vector<T> weight[4];                 // bilinear times attention weight
  std::vector<T> left, right, top, bottom;  // bilinear, by column and by row
  std::vector<T> slope_left, slope_right, slope_top, slope_bottom;  // their derivatives, 0 or +-1
  std::vector<T> dots;                      // (points, 4): grad_output . corner

  explicit Plan(int64_t points) {
    const int64_t size = points + Simd<T>::lanes;
    for (int corner = 0; corner < 4; ++corner) {
      pixel[corner].resize(size);
      weight[corner].resize(size);
    }
    for (auto* array :
         {&left, &right, &top, &bottom, &slope_left, &slope_right, &slope_top, &slope_bottom}) {
      array->resize(size);
    }
    dots.resize(4 * size);
  }
};

// What phase two needs of a plan: weights to mix corners with, or derivatives of these weights.
enum class PlanFor { weights, derivatives };

// One axis of a vector of points: its two neighboring pixels, how much each counts and how that
// changes with the location. When the lower neighbor is outside of the level, the upper one takes
// the first place. So the first is always in the level, and a second that is outside is the same
// pixel again with weight zero. All weights of points that are outside are zero.
template <typename T>
struct Axis {
  typename Simd<T>::Ints inside, first, second;
  typename Simd<T>::Vector first_part, second_part, first_slope, second_slope;
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
  const Ints has_low = low >= 0, has_both = inside & has_low & (high < size);
  const Vector fraction = pixel - __builtin_convertvector(low, Vector);
  Axis<T> axis;
  axis.inside = inside;
  axis.first = has_low ? low : none;
  axis.second = high > last ? last : high;
  axis.first_part = inside ? (has_low ? one - fraction : fraction) : zero;
  axis.second_part = has_both ? fraction : zero;
  axis.first_slope = inside ? (has_low ? -one : one) : zero;
  axis.second_slope = has_both ? one : zero;
  return axis;
}

// Plans the points [first, last) of the (query, head) that ``locations`` and ``weights`` start at.
template <PlanFor purpose, typename V, typename T>
CO_DETR_INLINE void plan_points(
    const Problem<V>& problem, const T* locations, const T* weights, int64_t first, int64_t last,
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
    const Ints top = start + row.first * width, bottom = start + row.second * width;
    store_ints(&plan.pixel[0][i], top + column.first);
    store_ints(&plan.pixel[1][i], top + column.second);
    store_ints(&plan.pixel[2][i], bottom + column.first);
    store_ints(&plan.pixel[3][i], bottom + column.second);
    if constexpr (purpose == PlanFor::weights) {
      // Selected, not multiplied: a point outside is worth zero whatever its weight is.
      const Vector weight = (column.inside & row.inside) ? attention : Vector{};
      store<T>(&plan.weight[0][i], weight * row.first_part * column.first_part);
      store<T>(&plan.weight[1][i], weight * row.first_part * column.second_part);
      store<T>(&plan.weight[2][i], weight * row.second_part * column.first_part);
      store<T>(&plan.weight[3][i], weight * row.second_part * column.second_part);
    } else {
      store<T>(&plan.left[i], column.first_part);
      store<T>(&plan.right[i], column.second_part);
      store<T>(&plan.top[i], row.first_part);
      store<T>(&plan.bottom[i], row.second_part);
      store<T>(&plan.slope_left[i], column.first_slope);
      store<T>(&plan.slope_right[i], column.second_slope);
      store<T>(&plan.slope_top[i], row.first_slope);
      store<T>(&plan.slope_bottom[i], row.second_slope);
    }
  }
}

}  // namespace co_detr
