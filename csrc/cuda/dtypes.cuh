#pragma once

#include "dtypes.h"
#include "launch.cuh"

namespace safe_inplace::tiles {

template <class T>
void cuda_forward(const ForwardPlan& plan) {
  CudaLauncher launcher;
  run_forward<T>(plan, launcher);
}

template <class T>
void cuda_backward(const BackwardPlan& plan) {
  CudaLauncher launcher;
  run_backward<T>(plan, launcher);
}

} // namespace safe_inplace::tiles
