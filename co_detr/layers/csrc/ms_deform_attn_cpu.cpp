// Host side of the CPU kernels: checks, memory and threads.
//
// Forward, and backward for locations and weights: threads share out the queries. Backward for the
// value: threads share out the levels, and heads where that is not enough. A pixel of a head then
// belongs to one thread, which adds to it query after query: no atomics, and the same bits for any
// number of threads. Levels come first because threads that write to neighboring heads of the
// same pixels steal each other's cache lines.

#include "ms_deform_attn_cpu.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace co_detr {
namespace {

// Queries in the least piece of work of a thread.
constexpr int64_t smallest_chunk = 16;

// bf16 is widened while it is gathered. There is no cheap way to do so for fp16 in portable code.
at::ScalarType kernel_type(at::ScalarType value_type) {
  return value_type == at::kHalf ? at::kFloat : value_type;
}

template <typename Body>
void with_value_type(at::ScalarType type, const Body& body) {
  if (type == at::kDouble) {
    body(double());
  } else if (type == at::kBFloat16) {
    body(c10::BFloat16());
  } else {
    body(float());
  }
}

template <typename V>
Problem<V> describe(
    const Sizes& sizes, at::IntArrayRef level_shapes, const at::Tensor& value,
    const at::Tensor& locations, const at::Tensor& weights) {
  return Problem<V>(
      sizes, level_shapes, value.const_data_ptr<V>(), locations.const_data_ptr<SumOf<V>>(),
      weights.const_data_ptr<SumOf<V>>());
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
  at::parallel_for(
      0, sizes.batch * sizes.queries, smallest_chunk, [&](int64_t begin, int64_t end) {
        backward_points(problem, gradients, Rows{begin, end});
      });
  at::parallel_for(
      0, sizes.batch * sizes.levels * sizes.heads, 1, [&](int64_t begin, int64_t end) {
        backward_value_units(problem, gradients, begin, end);
      });
}

at::Tensor forward_cpu(
    const at::Tensor& value, at::IntArrayRef level_shapes, const at::Tensor& locations,
    const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  const auto type = kernel_type(value.scalar_type());
  const at::Tensor dense_value = value.to(type).contiguous();
  const at::Tensor dense_locations = locations.contiguous(), dense_weights = weights.contiguous();
  at::Tensor output =
      at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, dense_value.options());
  with_value_type(type, [&](auto zero) {
    using V = decltype(zero);
    const auto problem =
        describe<V>(sizes, level_shapes, dense_value, dense_locations, dense_weights);
    V* results = output.mutable_data_ptr<V>();
    at::parallel_for(
        0, sizes.batch * sizes.queries, smallest_chunk, [&](int64_t begin, int64_t end) {
          forward_rows(problem, results, Rows{begin, end});
        });
  });
  return output.to(value.scalar_type());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cpu(
    const at::Tensor& grad_output, const at::Tensor& value, at::IntArrayRef level_shapes,
    const at::Tensor& locations, const at::Tensor& weights) {
  const Sizes sizes = check_sizes(value, level_shapes, locations, weights);
  check_grad_output(grad_output, value, sizes);
  const auto type = kernel_type(value.scalar_type());
  const at::Tensor dense_grad = grad_output.to(type).contiguous();
  const at::Tensor dense_value = value.to(type).contiguous();
  const at::Tensor dense_locations = locations.contiguous(), dense_weights = weights.contiguous();
  // Half precision is summed in fp32: adding many small parts in bf16 would lose most of them.
  at::Tensor grad_value = at::zeros_like(dense_value, accumulation_type(type));
  at::Tensor grad_locations = at::empty_like(dense_locations);
  at::Tensor grad_weights = at::empty_like(dense_weights);
  with_value_type(type, [&](auto zero) {
    using V = decltype(zero);
    backward(
        describe<V>(sizes, level_shapes, dense_value, dense_locations, dense_weights),
        Gradients<V>{
            dense_grad.const_data_ptr<V>(), grad_value.mutable_data_ptr<SumOf<V>>(),
            grad_locations.mutable_data_ptr<SumOf<V>>(),
            grad_weights.mutable_data_ptr<SumOf<V>>()});
  });
  return {grad_value.to(value.scalar_type()), grad_locations, grad_weights};
}

}  // namespace

TORCH_LIBRARY_IMPL(co_detr, CPU, m) {
  m.impl("ms_deform_attn", forward_cpu);
  m.impl("ms_deform_attn_backward", backward_cpu);
}

}  // namespace co_detr
