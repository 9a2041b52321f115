#include "gradients.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <utility>

#include "backend.h"
#include "checks.h"
#include "layout.h"
#include "numbers.h"

namespace safe_inplace {

void check_factors(const BackwardCall& call) {
  const OpInfo& op = call.info();
  const char* const node = op.nodes[int(call.form)];
  check_allocated(call.grad, node, "the gradient of", "input");
  for (int i = 0; i < 3; ++i) {
    const at::Tensor& value = call.factors[i].tensor;
    if (value.defined()) {
      check_shape(call.grad, value);
      check_allocated(value, node, "the saved", i < op.operands ? op.operand_names[i] : "input");
    }
  }
}

namespace {

Main main_of(const at::Tensor& grad, DType dtype) {
  return {grad.device(), grad.scalar_type(), dtype, grad.dim()};
}

} // namespace

at::ScalarType stored_dtype(const at::Tensor& grad, at::ScalarType own) {
  DType dtype, operand;
  const bool fits =
      kernel_dtype(grad.scalar_type(), dtype) && kernel_dtype(own, operand) && fits_beside(operand, main_of(grad, dtype));
  return fits ? own : opmath_type(grad.scalar_type());
}

namespace {

// The gradient that is to be computed, and what it is multiplied by. False where no kernel takes them.
bool place_gradient(const BackwardCall& call, int i, const Main& main, BackwardPlan& plan, Layout& layout) {
  const at::Tensor& out = call.grads[i];
  DType dtype;
  if (!kernel_dtype(out.scalar_type(), dtype) || !fits_beside(dtype, main)) {
    return false;
  }
  plan.wanted[i] = true;
  plan.numel[i] = out.numel();
  plan.reduced[i] = out.numel() != call.grad.numel();
  layout.add(plan.grads[i], out, out.mutable_data_ptr(), dtype);
  return true;
}

bool place_factor(const BackwardCall& call, int factor, const Main& main, BackwardPlan& plan, Layout& layout) {
  const FactorValue& value = call.factors[factor];
  const at::Tensor* const tensor = value.tensor.defined() ? &value.tensor : nullptr;
  return place_operand(Operand(value.number), tensor, main, plan.factors[factor], layout);
}

bool plan_backward(const BackwardCall& call, BackwardPlan& plan) {
  const at::Tensor& grad = call.grad;
  const OpInfo& op = call.info();
  if (!kernel_dtype(grad.scalar_type(), plan.dtype) ||
      (op.parameter != nullptr && !take_parameter(call.parameter, grad.scalar_type(), plan.parameter))) {
    return false;
  }
  plan.op = call.op;
  const Main main = main_of(grad, plan.dtype);
  Layout layout(grad.sizes());
  layout.add(plan.grad, grad, const_cast<void*>(grad.const_data_ptr()), plan.dtype);
  bool placed[3] = {false, false, false};
  for (int i = 0; i < 3; ++i) {
    if (!call.grads[i].defined()) {
      continue;
    }
    if (!place_gradient(call, i, main, plan, layout)) {
      return false;
    }
    const Factor factor = op.derivatives[i].factor;
    if (factor != Factor::One && !std::exchange(placed[int(factor)], true) &&
        !place_factor(call, int(factor), main, plan, layout)) {
      return false;
    }
  }
  return layout.finish(plan.shape);
}

} // namespace

bool run_backward(const BackwardCall& call) {
  if (std::none_of(std::begin(call.grads), std::end(call.grads), [](const at::Tensor& out) { return out.defined(); })) {
    return true;
  }
  BackwardPlan plan;
  if (!plan_backward(call, plan)) {
    return false;
  }
  if (plan.shape.numel == 0) {
    for (const at::Tensor& out : call.grads) {
      if (out.defined()) {
        out.zero_();
      }
    }
    return true;
  }
  const at::Tensor& grad = call.grad;
  const c10::OptionalDeviceGuard guard(grad.is_cpu() ? std::nullopt : std::make_optional(grad.device()));
  backend_of(grad.device().type())->backward(plan);
  return true;
}

at::Tensor gradient_by_fallback(const BackwardCall& call, int position, const OperandShape& shape) {
  const Derivative& derivative = call.info().derivatives[position];
  // As in the kernels: products are rounded to the operand's dtype after they are summed.
  at::Tensor gradient = call.grad.to(opmath_type(call.grad.scalar_type()));
  if (derivative.factor != Factor::One) {
    const FactorValue& factor = call.factors[int(derivative.factor)];
    gradient = factor.tensor.defined() ? at::mul(gradient, factor.tensor.conj()) : at::mul(gradient, factor.number.conj());
  }
  if (derivative.times_parameter && !equals(call.parameter, 1)) {
    gradient = at::mul(gradient, call.parameter.conj());
  }
  // Of no dimensions sum_to makes a sum, whose backward would hand on a view of what it gets.
  if (gradient.dim() != 0) {
    gradient = at::sum_to(std::move(gradient), c10::SymIntArrayRef(shape.sizes));
  }
  return cast_gradient(gradient, shape.dtype);
}

at::Tensor cast_gradient(const at::Tensor& gradient, at::ScalarType dtype) {
  return (gradient.is_complex() && !at::isComplexType(dtype) ? at::real(gradient) : gradient).to(dtype);
}

} // namespace safe_inplace
