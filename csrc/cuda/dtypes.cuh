// The entry points of a dtype, defined; a .cu file for each dtype instantiates them.
#pragma once

#include "dtypes.h"
#include "launch.cuh"

namespace safe_inplace::cuda {

template <class T>
void forward(const ForwardPlan& plan) {
  CudaLauncher launcher;
  dispatch_forward<T>(plan, launcher);
}

template <class T>
void backward(const BackwardPlan& plan) {
  CudaLauncher launcher;
  dispatch_backward<T>(plan, launcher);
}

} // namespace safe_inplace::cuda
