// PyTorch's number types and checks: what needs no tensors, so that nvcc may read it, too.
//
// With TORCH_TARGET_VERSION (set by setup.py from PyTorch 2.10 on) only the stable part of PyTorch
// is used: the library then works with every PyTorch from that version on. Without it, the sources
// are for the one PyTorch that they are compiled with, as older ones need.
#pragma once

#ifdef TORCH_TARGET_VERSION
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <sstream>
#include <stdexcept>
#include <string>
#else
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#endif

namespace co_detr {

using c10::ScalarType;

#ifdef TORCH_TARGET_VERSION

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

#define CO_DETR_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) {               \
      ::co_detr::fail(__VA_ARGS__);   \
    }                                 \
  } while (false)

#else

#define CO_DETR_CHECK(condition, ...) TORCH_CHECK_VALUE(condition, __VA_ARGS__)

#endif

inline int64_t element_size(ScalarType type) {
  return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
}

inline ScalarType accumulation_type(ScalarType value_type) {
  return value_type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace co_detr
