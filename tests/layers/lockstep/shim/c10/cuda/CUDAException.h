// Launches report their faults themselves.
#pragma once
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
