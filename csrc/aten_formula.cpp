#include "aten_formula.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <c10/core/GradMode.h>

namespace safe_inplace {

namespace {

at::Tensor times(const at::Tensor& tensor, const Operand& factor) {
  return factor.tensor != nullptr ? at::mul(tensor, *factor.tensor) : at::mul(tensor, factor.number);
}

at::Tensor plus(const at::Tensor& tensor, const Operand& term) {
  return term.tensor != nullptr ? at::add(tensor, *term.tensor) : at::add(tensor, term.number);
}

bool needs_gradient(const Call& call) {
  if (!c10::GradMode::is_enabled()) {
    return false;
  }
  // A wrapper of a transform does not say what the tensors inside it need.
  if (!is_plain(call) || call.input->requires_grad()) {
    return true;
  }
  for (const Operand& operand : call.operands) {
    if (operand.tensor != nullptr && operand.tensor->requires_grad()) {
      return true;
    }
  }
  return false;
}

// The call with everything that autograd would save, and that the write overwrites, replaced by a copy.
struct Protected {
  at::Tensor input;
  at::Tensor copies[2];
  Call call;

  explicit Protected(const Call& original) : input(*original.input), call(original) {
    if (!needs_gradient(original)) {
      return;
    }
    for (int i = 0; i < 2; ++i) {
      const at::Tensor* operand = original.operands[i].tensor;
      if (operand != nullptr && (operand->is_same(input) || share_storage(*operand, input))) {
        copies[i] = operand->clone();
        call.operands[i].tensor = &copies[i];
      }
    }
    if (original.info().kept == Kept::Input) {
      input = input.clone();
    }
  }
};

void write_result(const at::Tensor& input, const at::Tensor& result) {
  TORCH_CHECK(at::canCast(result.scalar_type(), input.scalar_type()), "result type ", result.scalar_type(),
              " can't be cast to the desired output type ", input.scalar_type());
  TORCH_CHECK(result.sym_sizes() == input.sym_sizes(), "output with shape ", input.sym_sizes(),
              " doesn't match the broadcast shape ", result.sym_sizes());
  input.copy_(result);
}

void add_formula(const Call& call) {
  const Operand& other = call.operands[0];
  if (other.tensor != nullptr) {
    call.input->add_(*other.tensor, call.parameter);
  } else {
    call.input->add_(other.number, call.parameter);
  }
}

void mul_formula(const Call& call) {
  // torch's method keeps its own copy of the input for the gradient of `other`.
  const Operand& other = call.operands[0];
  if (other.tensor != nullptr) {
    call.input->mul_(*other.tensor);
  } else {
    call.input->mul_(other.number);
  }
}

void addcmul_formula(const Call& call) {
  const Operand& tensor1 = call.operands[0];
  const Operand& tensor2 = call.operands[1];
  if (tensor1.tensor != nullptr && tensor2.tensor != nullptr) {
    call.input->addcmul_(*tensor1.tensor, *tensor2.tensor, call.parameter);
  } else if (tensor1.tensor != nullptr) {
    call.input->add_(at::mul(*tensor1.tensor, tensor2.number), call.parameter);
  } else if (tensor2.tensor != nullptr) {
    call.input->add_(at::mul(*tensor2.tensor, tensor1.number), call.parameter);
  } else {
    const at::Tensor number = at::mul(at::scalar_tensor(tensor1.number, call.input->options()), tensor2.number);
    call.input->add_(number, call.parameter);
  }
}

} // namespace

void write_by_formula(const Call& original) {
  const Protected guarded(original);
  const Call& call = guarded.call;
  switch (call.op) {
    case op_index<Add>:
      return add_formula(call);
    case op_index<Mul>:
      return mul_formula(call);
    case op_index<AddMul>:
      return write_result(*call.input, times(plus(guarded.input, call.operands[0]), call.operands[1]));
    case op_index<MulAdd>:
      return write_result(*call.input, plus(times(guarded.input, call.operands[0]), call.operands[1]));
    default:
      return addcmul_formula(call);
  }
}

at::Tensor gradient_by_formula(const Backward& backward, int position, const OperandShape& shape) {
  const Partial& partial = infos[backward.op].partials[position];
  at::Tensor gradient = backward.grad;
  if (partial.factor != Factor::One) {
    const FactorValue& factor = backward.factors[int(partial.factor)];
    gradient = factor.tensor.defined() ? at::mul(gradient, factor.tensor.conj())
                                       : at::mul(gradient, factor.number.conj());
  }
  if (partial.times_parameter && !backward.parameter.equal(1)) {
    gradient = at::mul(gradient, backward.parameter.conj());
  }
  if (!at::isComplexType(shape.dtype) && gradient.is_complex()) {
    gradient = at::real(gradient);
  }
  return at::sum_to(std::move(gradient), at::IntArrayRef(shape.sizes)).to(shape.dtype);
}

} // namespace safe_inplace
