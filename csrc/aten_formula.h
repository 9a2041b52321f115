// The ops written in aten's own operations: for every tensor and every transform that the kernels do not know.
#pragma once

#include <ATen/core/DimVector.h>

#include "operands.h"

namespace safe_inplace {

// Same result, same refusals, version counter up by one.
void write_by_formula(const Call& call);

struct OperandShape {
  at::SymDimVector sizes; // symbols only while compiled autograd traces the node
  at::ScalarType dtype = at::kFloat;
};

// The gradient of one operand, differentiable, in its own shape and dtype.
at::Tensor gradient_by_formula(const Backward& backward, int position, const OperandShape& shape);

// In the operand's dtype; a real operand has a real gradient.
at::Tensor cast_gradient(const at::Tensor& gradient, at::ScalarType dtype);

} // namespace safe_inplace
