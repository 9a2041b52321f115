#include "../device.h"
#include "dtypes.h"

namespace safe_inplace {
namespace {

template <class Plan, class Function>
void with_dtype(const Plan& plan, Function&& function) {
  switch (plan.dtype) {
    case DType::Half:
      return function(Half{});
    case DType::BFloat16:
      return function(BFloat16{});
    case DType::Float:
      return function(float{});
    case DType::Double:
      return function(double{});
    case DType::ComplexFloat:
      return function(Complex<float>{});
    case DType::ComplexDouble:
      return function(Complex<double>{});
  }
}

void forward(const ForwardPlan& plan) {
  with_dtype(plan, [&](auto tag) { tiles::cuda_forward<decltype(tag)>(plan); });
}

void backward(const BackwardPlan& plan) {
  with_dtype(plan, [&](auto tag) { tiles::cuda_backward<decltype(tag)>(plan); });
}

const RegisterDevice registered(c10::DeviceType::CUDA, {forward, backward});

} // namespace
} // namespace safe_inplace
