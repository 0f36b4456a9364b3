// Included before every translated source: what looks at __CUDA_ARCH__, which is set after it, and
// what nvcc includes by itself.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <cuda_runtime_api.h>

#include <limits>
