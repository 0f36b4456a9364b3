// Kernels that are wrong on purpose, one for each thing that lockstep.cpp has to notice.

#include "ms_deform_attn_cuda_device.h"

#include <stdexcept>
#include <string>

namespace {

using co_detr::whole_warp;

enum class Fault {
  none, exited_lane, divergent, unnamed_lane, absent_lane, reads_past_end, writes_before_start,
  misaligned, misaligned_add, writes_const, two_writers, reads_what_other_wrote,
  adds_and_writes, host_memory, empty_grid,
};

__global__ void kernel(Fault fault, const float* __restrict__ in, float* __restrict__ out) {
  const int lane = threadIdx.x % 32, i = blockIdx.x * blockDim.x + threadIdx.x;
  float number = in[i];
  switch (fault) {
    case Fault::exited_lane:
      if (lane >= 16) {
        return;
      }
      number = __shfl_sync(whole_warp, number, lane + 8);
      break;
    case Fault::divergent:
      if (lane < 16) {
        number = __shfl_sync(whole_warp, number, 0);
      } else {
        number = __shfl_sync(whole_warp, number, 1);
      }
      break;
    case Fault::unnamed_lane:
      number = __shfl_sync(0xffff, number, 0);
      break;
    case Fault::absent_lane:
      number = __shfl_xor_sync(lane < 16 ? 0xffffu : 0xffff0000u, number, 16);
      break;
    case Fault::reads_past_end:
      number = in[i + 1];
      break;
    case Fault::writes_before_start:
      out[i - 1] = number;
      return;
    case Fault::misaligned:
      number = co_detr::load<float, 4>(in + lane % 2).items[0];
      break;
    case Fault::misaligned_add: {
      const float four[4] = {};
      lockstep::add(out + 1, four, 4);
      return;
    }
    case Fault::writes_const:
      const_cast<float*>(in)[i] = -number;
      break;
    case Fault::two_writers:
      out[i / 2] = 0;
      return;
    case Fault::reads_what_other_wrote:
      out[i] = number;
      number = out[i ^ 1];
      break;
    case Fault::adds_and_writes:
      atomicAdd(out, number);
      break;
    default:
      // Right: all lanes of a warp meet, also in groups, and blocks share out the numbers.
      number = __shfl_sync(whole_warp, number, 31 - lane);
      number = __shfl_sync(lane < 16 ? 0xffffu : 0xffff0000u, number, 15 - lane % 16, 16);
      number += __any_sync(whole_warp, lane == 7 && number > 1e6f) ? 1 : 0;
  }
  out[i] = number;
}

}  // namespace

// Launches the kernel for 128 numbers; "" or what was noticed.
extern "C" __attribute__((visibility("default"))) const char* lockstep_commit(
    int number, const float* in, float* out) {
  static std::string noticed;
  noticed.clear();
  const Fault fault = static_cast<Fault>(number);
  float on_host[128];
  if (fault == Fault::host_memory) {
    out = on_host;
  }
  try {
    kernel<<<fault == Fault::empty_grid ? 0 : 2, 64, 0, nullptr>>>(fault, in, out);
  } catch (const std::runtime_error& error) {
    noticed = error.what();
  }
  return noticed.c_str();
}
