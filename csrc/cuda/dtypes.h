// The entry points of a dtype. Each is compiled in a file of its own, so that a build uses its processors.
#pragma once

#include "../plan.h"

namespace safe_inplace::cuda {

template <class T>
void forward(const ForwardPlan& plan);

template <class T>
void backward(const BackwardPlan& plan);
} // namespace safe_inplace::cuda
