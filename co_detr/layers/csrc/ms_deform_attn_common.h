// What the CPU and the CUDA kernels share: sizes and the checks that keep them in bounds.
#pragma once

#include "ms_deform_attn_torch.h"

#include <cstdint>
#include <limits>

namespace co_detr {

// Letters as in the Python docstrings: value (B, S, H, D), locations (B, Q, H, L, P, 2).
struct Sizes {
  int64_t batch, pixels, heads, channels, queries, levels, points;
};

// Python validates with friendlier words; this guards direct calls of torch.ops.co_detr.*.
inline Sizes check_sizes(
    const Tensor& value,
    Ints level_shapes,
    const Tensor& locations,
    const Tensor& weights) {
  CO_DETR_CHECK(value.dim() == 4, "value must have 4 dimensions, got ", listed(value.sizes()));
  CO_DETR_CHECK(
      locations.dim() == 6 && locations.size(5) == 2 && locations.size(0) == value.size(0) &&
          locations.size(2) == value.size(2),
      "sampling_locations must have shape (B, Q, H, L, P, 2), got ", listed(locations.sizes()));
  const Sizes sizes{
      value.size(0), value.size(1), value.size(2), value.size(3),
      locations.size(1), locations.size(3), locations.size(4)};
  CO_DETR_CHECK(
      weights.sizes().equals(locations.sizes().slice(0, 5)),
      "attention_weights must have the shape of sampling_locations without its last dimension, ",
      "got ", listed(weights.sizes()));
  CO_DETR_CHECK(
      static_cast<int64_t>(level_shapes.size()) == 2 * sizes.levels,
      "level_shapes must hold height and width of ", sizes.levels, " levels, got ",
      listed(level_shapes));
  // Before the sizes of the levels: with it, their products fit in 64 bits.
  CO_DETR_CHECK(
      sizes.pixels < std::numeric_limits<int32_t>::max(),
      "value must have fewer than 2^31 - 1 pixels per image, got ", sizes.pixels);
  int64_t pixels = 0;
  for (int64_t level = 0; level < sizes.levels; ++level) {
    const int64_t height = level_shapes[2 * level], width = level_shapes[2 * level + 1];
    CO_DETR_CHECK(
        height > 0 && width > 0 && height <= sizes.pixels / width,
        "level_shapes must be positive and fit in value, got ", listed(level_shapes));
    pixels += height * width;
  }
  CO_DETR_CHECK(
      pixels == sizes.pixels, "level_shapes describe ", pixels, " pixels, but value has ",
      sizes.pixels);
  const auto value_type = value.scalar_type();
  CO_DETR_CHECK(
      value_type == ScalarType::Float || value_type == ScalarType::Double ||
          value_type == ScalarType::BFloat16 || value_type == ScalarType::Half,
      "value must be fp32, fp64, bf16 or fp16, got ", value_type);
  const auto type = accumulation_type(value_type);
  CO_DETR_CHECK(
      locations.scalar_type() == type,
      "sampling_locations must be ", type, ", got ", locations.scalar_type());
  CO_DETR_CHECK(
      weights.scalar_type() == type,
      "attention_weights must be ", type, ", got ", weights.scalar_type());
  CO_DETR_CHECK(
      locations.device() == value.device(), "sampling_locations must be on the device of value");
  CO_DETR_CHECK(
      weights.device() == value.device(), "attention_weights must be on the device of value");
  return sizes;
}

inline void check_grad_output(
    const Tensor& grad_output, const Tensor& value, const Sizes& sizes) {
  CO_DETR_CHECK(
      grad_output.dim() == 3 && grad_output.size(0) == sizes.batch &&
          grad_output.size(1) == sizes.queries &&
          grad_output.size(2) == sizes.heads * sizes.channels,
      "grad_output must have shape (B, Q, H * D), got ", listed(grad_output.sizes()));
  CO_DETR_CHECK(
      grad_output.scalar_type() == value.scalar_type() && grad_output.device() == value.device(),
      "grad_output must have the dtype and device of value");
}

}  // namespace co_detr
