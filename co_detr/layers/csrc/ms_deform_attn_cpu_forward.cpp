// The forward CPU kernel: single-threaded, for some of the queries.
//
// Each (query, head) is done in two phases. The first turns all of its points into corner pixels
// and weights, as SIMD over points. The second runs over the points without any branch, as SIMD
// over channels: a corner outside of its level is a valid pixel with weight zero.

#include "ms_deform_attn_plan.h"

namespace co_detr {
namespace {

template <int vectors, typename V, typename T>
CO_DETR_INLINE void mix_corners(
    const V* value, int64_t pixel_stride, const Plan<T>& plan, int64_t points, V* output) {
  if constexpr (vectors == 0) {
    T sum = 0;
    for (int64_t i = 0; i < points; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        sum += T(value[plan.pixel[corner][i] * pixel_stride]) * plan.weight[corner][i];
      }
    }
    *output = static_cast<V>(sum);
  } else {
    typedef typename Simd<T>::Vector Vector;
    // Two sums for each vector, of left and right corners: one alone would wait for itself.
    Vector left[vectors] = {}, right[vectors] = {};
    for (int64_t i = 0; i < points; ++i) {
      for (int corner = 0; corner < 4; ++corner) {
        Vector block[vectors];
        load_block(value + plan.pixel[corner][i] * pixel_stride, block);
        const T weight = plan.weight[corner][i];
        for (int v = 0; v < vectors; ++v) {
          (corner % 2 ? right : left)[v] += block[v] * weight;
        }
      }
    }
    Vector sums[vectors];
    for (int v = 0; v < vectors; ++v) {
      sums[v] = left[v] + right[v];
    }
    store_block(output, sums);
  }
}

template <typename V>
CO_DETR_INLINE void forward(const Problem<V>& problem, V* output, const Rows& rows) {
  typedef SumOf<V> T;
  const int64_t heads = problem.sizes.heads, channels = problem.sizes.channels;
  const int64_t per_head = problem.points_per_head, stride = problem.pixel_stride;
  Plan<T> plan(per_head);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const int64_t row = problem.row(i);
    const V* image = problem.value + row / problem.sizes.queries * problem.sizes.pixels * stride;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = (row * heads + head) * per_head;
      plan_points<PlanFor::weights>(
          problem, problem.locations + 2 * first, problem.weights + first, 0, per_head, plan);
      for_channel_blocks<T, 4>(
          channels, [&](auto vectors, int64_t channel) CO_DETR_INLINE_LAMBDA {
            const int64_t offset = head * channels + channel;
            mix_corners<vectors.value>(
                image + offset, stride, plan, per_head, output + row * stride + offset);
          });
    }
  }
}

}  // namespace

// Plain functions, one for each type: everything above is inlined into each of their clones.
#define CO_DETR_FORWARD(V)                                      \
  CO_DETR_MULTIVERSION void forward_rows(                       \
      const Problem<V>& problem, V* output, const Rows& rows) { \
    forward(problem, output, rows);                             \
  }

CO_DETR_FORWARD(float)
CO_DETR_FORWARD(double)
CO_DETR_FORWARD(c10::BFloat16)

}  // namespace co_detr
