// The CPU kernels as their host side sees them: one problem, and functions for parts of it.
#pragma once

#include "ms_deform_attn_common.h"

#include <cstdint>
#include <type_traits>
#include <vector>

namespace co_detr {

template <typename T>
using IntLike = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// What a value of type V is summed in; locations and attention weights have this type.
template <typename V>
using SumOf = std::conditional_t<std::is_same_v<V, double>, double, float>;

// Dense tensors, and what is the same for all queries and heads, spread out per point.
template <typename V>
struct Problem {
  typedef SumOf<V> T;
  Sizes sizes;
  int64_t pixel_stride;     // H * D, elements between neighboring pixels
  int64_t points_per_head;  // L * P
  std::vector<IntLike<T>> width, height, start;  // with room for a vector behind the last point
  const V* value;
  const T *locations, *weights;
  std::vector<int64_t> order;  // of the rows, image after image; empty = as they are

  Problem(
      const Sizes& sizes, Ints level_shapes, const V* value, const T* locations,
      const T* weights)
      : sizes(sizes),
        pixel_stride(sizes.heads * sizes.channels),
        points_per_head(sizes.levels * sizes.points),
        value(value),
        locations(locations),
        weights(weights) {
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
      array->resize(points_per_head + 32 / sizeof(T));
    }
    // As many queries as pixels are the pixels themselves, in order.
    if (sizes.queries < sizes.pixels && points_per_head > 0 && sizes.heads > 0) {
      sort_by_place();
    }
  }

  // A row is a query of an image, image * Q + query; ``i`` counts in the order of work.
  int64_t row(int64_t i) const {
    return order.empty() ? i : order[i];
  }

 private:
  // Few queries lie scattered over the image: those that share pixels should come one after the
  // other, while the pixels are in the cache. Buckets are cells of a grid over the image.
  void sort_by_place() {
    constexpr int64_t cells = 16;
    const auto cell = [](T location) -> int64_t {  // NaN compares false
      return location > 0 ? (location < 1 ? static_cast<int64_t>(location * cells) : cells - 1) : 0;
    };
    order.resize(sizes.batch * sizes.queries);
    std::vector<int64_t> bucket(sizes.queries);
    for (int64_t image = 0; image < sizes.batch; ++image) {
      int64_t next[cells * cells + 1] = {};
      for (int64_t query = 0; query < sizes.queries; ++query) {
        const T* first_point = locations +
            2 * (image * sizes.queries + query) * sizes.heads * points_per_head;
        bucket[query] = cell(first_point[1]) * cells + cell(first_point[0]);
        ++next[bucket[query] + 1];
      }
      for (int64_t i = 0; i < cells * cells; ++i) {
        next[i + 1] += next[i];
      }
      for (int64_t query = 0; query < sizes.queries; ++query) {
        order[image * sizes.queries + next[bucket[query]]++] = image * sizes.queries + query;
      }
    }
  }
};

// Rows ``problem.row(i)`` for begin <= i < end.
struct Rows {
  int64_t begin, end;
};

// One image, a range of its heads and a range of the points of these.
struct Slice {
  int64_t image, first_head, last_head, first_point, last_point;
};

// Pointers of the backward pass, dense.
template <typename V>
struct Gradients {
  const V* output;
  SumOf<V> *value, *locations, *weights;
};

// Writes the output of these rows.
void forward_rows(const Problem<float>&, float* output, const Rows&);
void forward_rows(const Problem<double>&, double* output, const Rows&);
void forward_rows(const Problem<c10::BFloat16>&, c10::BFloat16* output, const Rows&);

// Writes the gradients of the locations and of the weights of these rows.
void backward_points(const Problem<float>&, const Gradients<float>&, const Rows&);
void backward_points(const Problem<double>&, const Gradients<double>&, const Rows&);
void backward_points(const Problem<c10::BFloat16>&, const Gradients<c10::BFloat16>&, const Rows&);

// Adds to the gradients of the pixels that these points touch.
void backward_value(const Problem<float>&, const Gradients<float>&, const Slice&);
void backward_value(const Problem<double>&, const Gradients<double>&, const Slice&);
void backward_value(const Problem<c10::BFloat16>&, const Gradients<c10::BFloat16>&, const Slice&);

}  // namespace co_detr
