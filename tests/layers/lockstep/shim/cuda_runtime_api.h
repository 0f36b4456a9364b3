// The part of CUDA that the kernels use, for a C++ compiler that finds this in place of the
// toolkit's header.
//
// Qualifiers mean nothing here; every thread of a launch is a fiber (see ../lockstep.cpp), and what
// the threads of a warp do together waits until all of them are there.
#pragma once

#include <math.h>  // its fmin, floor, ... are overloaded for float, as CUDA's are

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
typedef struct LockstepStream* cudaStream_t;

using std::max;
using std::min;

namespace lockstep {

// Of the thread that is running.
dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();

// What the threads of a warp do together. `line` tells one call in the source from another.
enum class Collective { shuffle, shuffle_xor, any };
uint64_t meet(Collective kind, unsigned mask, uint64_t bits, int operand, int width, int line);

template <typename T>
T meet_with(Collective kind, unsigned mask, T value, int operand, int width, int line) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(kind, mask, bits, operand, width, line);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// Adds to `count` numbers at once; the address has to be a multiple of their size.
void add(float* to, const float* numbers, int count);
void add(double* to, const double* numbers, int count);

// A pointer that a kernel gets: it may touch the allocation that this lies in, and no other memory.
struct Argument {
  const void* address;
  bool writable;
};

struct Launch {
  const char* kernel;
  dim3 grid, block;
  std::vector<Argument> pointers;
  void (*run_thread)(const void* arguments);
  const void* arguments;
};

// Runs all threads. Raises std::runtime_error for what a GPU would refuse, wait for or corrupt.
void run(const Launch& launch);

template <typename... Parameters>
struct Kernel {
  void (*function)(Parameters...);
  std::tuple<Parameters...> arguments;

  template <size_t... indices>
  __attribute__((no_sanitize("thread,alignment"))) void call(
      std::index_sequence<indices...>) const {
    function(std::get<indices>(arguments)...);
  }
  __attribute__((no_sanitize("thread,alignment"))) static void run_thread(const void* kernel) {
    static_cast<const Kernel*>(kernel)->call(std::index_sequence_for<Parameters...>());
  }
};

template <typename T>
void add_pointer(std::vector<Argument>& pointers, const T& argument) {
  if constexpr (std::is_pointer_v<T>) {
    pointers.push_back({argument, !std::is_const_v<std::remove_pointer_t<T>>});
  }
}

// kernel<<<grid, block, 0, stream>>>(arguments) is translated into
// on_grid("kernel", kernel, grid, block, 0, stream)(arguments).
template <typename... Parameters>
auto on_grid(
    const char* name, void (*function)(Parameters...), dim3 grid, dim3 block, size_t,
    cudaStream_t) {
  return [=](Parameters... arguments) {
    const Kernel<Parameters...> kernel{function, {arguments...}};
    Launch launch{name, grid, block, {}, &Kernel<Parameters...>::run_thread, &kernel};
    (add_pointer(launch.pointers, arguments), ...);
    run(launch);
  };
}

}  // namespace lockstep

#define threadIdx (lockstep::thread_index())
#define blockIdx (lockstep::block_index())
#define blockDim (lockstep::block_size())
#define gridDim (lockstep::grid_size())

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, int line = __builtin_LINE()) {
  return lockstep::meet_with(lockstep::Collective::shuffle, mask, value, lane, width, line);
}

template <typename T>
T __shfl_xor_sync(
    unsigned mask, T value, int distance, int width = 32, int line = __builtin_LINE()) {
  return lockstep::meet_with(lockstep::Collective::shuffle_xor, mask, value, distance, width, line);
}

inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return lockstep::meet_with(lockstep::Collective::any, mask, predicate != 0 ? 1 : 0, 0, 32, line);
}

template <typename T>
void atomicAdd(T* to, T number) {
  lockstep::add(to, &number, 1);
}

inline float __uint_as_float(unsigned bits) {
  float number;
  std::memcpy(&number, &bits, sizeof(number));
  return number;
}

inline uint64_t __cvta_generic_to_global(const void* address) {
  return reinterpret_cast<uint64_t>(address);
}
