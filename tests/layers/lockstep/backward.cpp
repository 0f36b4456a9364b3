// The backward kernels are compiled twice, because from compute capability 9.0 on they add 16 bytes
// at once. A launch picks one here.
#include "ms_deform_attn_cuda.h"

namespace co_detr {

void launch_backward_800(ScalarType, const CudaProblem&, const CudaBackward&, cudaStream_t);
void launch_backward_900(ScalarType, const CudaProblem&, const CudaBackward&, cudaStream_t);

static bool has_vector_reductions = false;

void launch_backward(
    ScalarType type, const CudaProblem& problem, const CudaBackward& tensors,
    cudaStream_t stream) {
  const auto launch = has_vector_reductions ? launch_backward_900 : launch_backward_800;
  launch(type, problem, tensors, stream);
}

}  // namespace co_detr

extern "C" __attribute__((visibility("default"))) void lockstep_set_capability(int major) {
  co_detr::has_vector_reductions = major >= 9;
}
