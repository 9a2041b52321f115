// Registers the CUDA kernels.
#include "../device.h"
#include "dtypes.h"

namespace safe_inplace {
namespace {

void forward(const ForwardPlan& plan) {
  cuda::with_dtype(plan.dtype, [&](auto tag) { cuda::forward<decltype(tag)>(plan); });
}

void backward(const BackwardPlan& plan) {
  cuda::with_dtype(plan.dtype, [&](auto tag) { cuda::backward<decltype(tag)>(plan); });
}

const RegisterDevice registered(c10::DeviceType::CUDA, {forward, backward});

} // namespace
} // namespace safe_inplace
