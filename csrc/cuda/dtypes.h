// The entry points of a dtype. Each is compiled in a file of its own, so that a build uses its processors.
#pragma once

#include "../plan.h"

namespace safe_inplace::cuda {

template <class T>
void forward(const ForwardPlan& plan);

template <class T>
void backward(const BackwardPlan& plan);

// Calls function(T{}) with the element type that is this dtype.
template <class Function>
void with_dtype(DType dtype, Function&& function) {
  switch (dtype) {
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

} // namespace safe_inplace::cuda
