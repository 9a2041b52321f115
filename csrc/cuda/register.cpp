// Registers the CUDA kernels.
#include "../backend.h"
#include "../dispatch.h"
#include "digest.h"
#include "dtypes.h"

namespace safe_inplace {
namespace {

void forward(const ForwardPlan& plan) {
  with_dtype(plan.dtype, [&]<class T>(T) { cuda::forward<T>(plan); });
}

void backward(const BackwardPlan& plan) {
  with_dtype(plan.dtype, [&]<class T>(T) { cuda::backward<T>(plan); });
}

const RegisterBackend registered({c10::DeviceType::CUDA, forward, backward, cuda::digest, /*takes_narrower=*/true});

} // namespace
} // namespace safe_inplace
