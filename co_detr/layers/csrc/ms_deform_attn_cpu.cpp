// Host side of the CPU kernels: checks, memory and threads.
//
// Forward, and backward for locations and weights: threads share out the queries. Backward for the
// value: threads share out the levels, and heads where that is not enough. A pixel of a head then
// belongs to one thread, which adds to it query after query: no atomics, and the same bits for any
// number of threads. Levels come first because threads that write to neighboring heads of the
// same pixels steal each other's cache lines.

#include "ms_deform_attn_cpu.h"

#include <algorithm>
#include <tuple>

namespace co_detr {
namespace {

// Queries in the least piece of work of a thread.
constexpr int64_t smallest_chunk = 16;

// bf16 is widened while it is gathered. There is no cheap way to do so for fp16 in portable code.
ScalarType kernel_type(ScalarType value_type) {
  return value_type == ScalarType::Half ? ScalarType::Float : value_type;
}

template <typename Body>
void with_value_type(ScalarType type, const Body& body) {
  if (type == ScalarType::Double) {
    body(double());
  } else if (type == ScalarType::BFloat16) {
    body(c10::BFloat16());
  } else {
    body(float());
  }
}

template <typename V>
Problem<V> describe(
    const Sizes& sizes, Ints level_shapes, const Tensor& value,
    const Tensor& locations, const Tensor& weights) {
  return Problem<V>(
      sizes, level_shapes, read<V>(value), read<SumOf<V>>(locations),
      read<SumOf<V>>(weights));
}

// Units of work are heads of levels of images, in this order; this thread has [begin, end).
template <typename V>
void backward_value_units(
    const Problem<V>& problem, const Gradients<V>& gradients, int64_t begin, int64_t end) {
  const int64_t heads = problem.sizes.heads, levels = problem.sizes.levels;
  const int64_t points = problem.sizes.points;
  while (begin < end) {
    const int64_t image = begin / heads / levels, level = begin / heads % levels;
    const int64_t head = begin % heads;
    // Whole levels of one image go together: phase one then fills its vectors.
    const int64_t whole_levels =
        head == 0 ? std::min((end - begin) / heads, levels - level) : 0;
    const int64_t last_level = level + std::max<int64_t>(whole_levels, 1);
    const int64_t last_head = whole_levels > 0 ? heads : std::min(heads, head + end - begin);
    backward_value(
        problem, gradients, Slice{image, head, last_head, level * points, last_level * points});
    begin += (last_level - level) * (last_head - head);
  }
}

template <typename V>
void backward(const Problem<V>& problem, const Gradients<V>& gradients) {
  const Sizes& sizes = problem.sizes;
  if (sizes.points == 0) {
    return;
  }
  parallel_for(
      0, sizes.batch * sizes.queries, smallest_chunk, [&](int64_t begin, int64_t end) {
        backward_points(problem, gradients, Rows{begin, end});
      });
  parallel_for(
      0, sizes.batch * sizes.levels * sizes.heads, 1, [&](int64_t begin, int64_t end) {
        backward_value_units(problem, gradients, begin, end);
      });
}

Tensor forward_cpu(
    const Tensor& value, Ints level_shapes, const Tensor& locations,
    const Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  const auto type = kernel_type(value.scalar_type());
  const Tensor dense_value = dense(in_type(value, type));
  const Tensor dense_locations = dense(locations), dense_weights = dense(weights);
  Tensor output =
      empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value, type);
  with_value_type(type, [&](auto zero) {
    using V = decltype(zero);
    const auto problem =
        describe<V>(sizes, level_shapes, dense_value, dense_locations, dense_weights);
    V* results = write<V>(output);
    parallel_for(
        0, sizes.batch * sizes.queries, smallest_chunk, [&](int64_t begin, int64_t end) {
          forward_rows(problem, results, Rows{begin, end});
        });
  });
  return in_type(output, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& grad_output, const Tensor& value, Ints level_shapes,
    const Tensor& locations, const Tensor& weights, bool /*deterministic: always*/) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const auto type = kernel_type(value.scalar_type());
  const Tensor dense_grad = dense(in_type(grad_output, type));
  const Tensor dense_value = dense(in_type(value, type));
  const Tensor dense_locations = dense(locations), dense_weights = dense(weights);
  // Half precision is summed in fp32: adding many small parts in bf16 would lose most of them.
  Tensor grad_value = zeros(value.sizes(), value, accumulation_type(type));
  Tensor grad_locations = empty(locations.sizes(), locations, locations.scalar_type());
  Tensor grad_weights = empty(weights.sizes(), weights, weights.scalar_type());
  with_value_type(type, [&](auto zero) {
    using V = decltype(zero);
    backward(
        describe<V>(sizes, level_shapes, dense_value, dense_locations, dense_weights),
        Gradients<V>{
            read<V>(dense_grad), write<SumOf<V>>(grad_value),
            write<SumOf<V>>(grad_locations),
            write<SumOf<V>>(grad_weights)});
  });
  return {in_type(grad_value, value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

CO_DETR_LIBRARY_IMPL(co_detr, CPU, m) {
  m.impl("ms_deform_attn", CO_DETR_KERNEL(forward_cpu));
  m.impl("ms_deform_attn_backward", CO_DETR_KERNEL(backward_cpu));
}

}  // namespace co_detr
