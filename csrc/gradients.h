// What a node is asked for: the gradients of one call, computed by a kernel or by the fallback.
#pragma once

#include <ATen/core/DimVector.h>

#include "call.h"

namespace safe_inplace {

// What a gradient is multiplied by.
struct FactorValue {
  at::Tensor tensor;
  at::Scalar number;
};

struct OperandShape {
  at::SymDimVector sizes; // symbols only while compiled autograd traces the node
  at::ScalarType dtype = at::kFloat;
};

struct BackwardCall {
  int op;
  Form form;
  at::Scalar parameter;
  at::Tensor grad;
  FactorValue factors[3]; // first operand, second operand, kept; undefined where nobody reads them
  at::Tensor grads[3]; // undefined where nobody wants them; otherwise in the operand's shape

  const OpInfo& info() const { return infos[op]; }
};

// What a hook or an assignment to `.data` has put in the place of what was saved must fit the gradient as it did then.
void check_factors(const BackwardCall& call);

// The dtype in which a kernel stores a gradient of an operand: the operand's where it can, else that of the arithmetic.
at::ScalarType stored_dtype(const at::Tensor& grad, at::ScalarType own);

// Computes the gradients that are defined into their memory. False where no kernel covers the call; nothing is written then.
bool run_backward(const BackwardCall& call);

// The gradient of one operand, differentiable, in its own shape and dtype.
at::Tensor gradient_by_fallback(const BackwardCall& call, int position, const OperandShape& shape);

// In the operand's dtype; a real operand has a real gradient.
at::Tensor cast_gradient(const at::Tensor& gradient, at::ScalarType dtype);

} // namespace safe_inplace
