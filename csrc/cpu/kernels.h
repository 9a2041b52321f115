// The CPU as a backend: what its folder registers.
#pragma once

#include <ATen/core/Tensor.h>

#include "../plan.h"

namespace safe_inplace {

void forward_on_cpu(const ForwardPlan& plan);
void backward_on_cpu(const BackwardPlan& plan);
void digest_on_cpu(const void* data, int64_t bytes, const at::Tensor& result);

} // namespace safe_inplace
