#include "aten_formula.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ScalarOps.h>
#include <c10/core/GradMode.h>

namespace safe_inplace {

namespace {

// As Python hands numbers to torch: some backends know only the overloads for tensors. A tracer's number has no value.
at::Tensor as_tensor(const Operand& operand) {
  return operand.tensor != nullptr ? *operand.tensor : at::native::wrapped_scalar_tensor(operand.number);
}

bool is_traced_number(const Operand& operand) {
  return operand.tensor == nullptr && operand.number.isSymbolic();
}

at::Tensor times(const at::Tensor& tensor, const Operand& factor) {
  return is_traced_number(factor) ? at::mul(tensor, factor.number) : at::mul(tensor, as_tensor(factor));
}

at::Tensor plus(const at::Tensor& tensor, const Operand& term) {
  return is_traced_number(term) ? at::add(tensor, term.number) : at::add(tensor, as_tensor(term));
}

bool differentiates(const at::Tensor& tensor) {
  return (c10::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined();
}

bool needs_gradient(const Call& call) {
  // A wrapper of a transform does not say what the tensors inside it need.
  if (!is_plain(call) || differentiates(*call.input)) {
    return true;
  }
  for (const Operand& operand : call.operands) {
    if (operand.tensor != nullptr && differentiates(*operand.tensor)) {
      return true;
    }
  }
  return false;
}

// The call with a copy in place of everything that autograd would save and the write overwrites, and of operands that
// torch's kernels would read while they write them.
struct Protected {
  at::Tensor input;
  at::Tensor copies[2];
  Call call;

  explicit Protected(const Call& original) : input(*original.input), call(original) {
    const bool plain = is_plain(original);
    const bool gradient = needs_gradient(original);
    if (plain) {
      check_memory(original);
    }
    for (int i = 0; i < 2; ++i) {
      const at::Tensor* operand = original.operands[i].tensor;
      if (operand == nullptr) {
        continue;
      }
      const bool saved = gradient && share_storage(*operand, input);
      if (saved || (plain && !readable_in_place(input, *operand))) {
        copies[i] = operand->clone();
        call.operands[i].tensor = &copies[i];
      }
    }
    if (gradient && original.info().kept == Kept::Input) {
      input = input.clone();
    }
  }
};

void write_result(const at::Tensor& input, const at::Tensor& result) {
  TORCH_CHECK(at::canCast(result.scalar_type(), input.scalar_type()), "result type ", result.scalar_type(),
              " can't be cast to the desired output type ", input.scalar_type());
  // A nested tensor has no sizes; its copy_ compares what it has.
  TORCH_CHECK(input.is_nested() || result.sym_sizes() == input.sym_sizes(), "output with shape ", input.sym_sizes(),
              " doesn't match the broadcast shape ", result.sym_sizes());
  input.copy_(result);
}

void add_formula(const Call& call) {
  const Operand& other = call.operands[0];
  if (is_traced_number(other)) {
    call.input->add_(other.number, call.parameter);
  } else {
    call.input->add_(as_tensor(other), call.parameter);
  }
}

void mul_formula(const Call& call) {
  // torch's method keeps its own copy of the input for the gradient of `other`.
  const Operand& other = call.operands[0];
  if (is_traced_number(other)) {
    call.input->mul_(other.number);
  } else {
    call.input->mul_(as_tensor(other));
  }
}

// The old input in the dtype that the fused formulas compute in: rounded to its own once, at the end.
at::Tensor widened(const at::Tensor& input) {
  return input.to(math_type(input.scalar_type()));
}

// torch's addcmul_ takes a boolean, and a complex number without an imaginary part, for which its add_ has no use.
at::Scalar as_alpha(const at::Scalar& value, at::ScalarType dtype) {
  if (value.isSymbolic()) {
    return value;
  }
  if (value.isBoolean()) {
    return int64_t(value.toBool());
  }
  if (value.isComplex() && !at::isComplexType(dtype) && value.toComplexDouble().imag() == 0) {
    return value.toComplexDouble().real();
  }
  return value;
}

bool is_dense(const Call& call) {
  bool dense = call.input->layout() == at::kStrided && !call.input->is_nested();
  for (const Operand& operand : call.operands) {
    dense = dense && (operand.tensor == nullptr || operand.tensor->layout() == at::kStrided);
  }
  return dense;
}

// torch's addcmul_ rounds a 0-dim operand to the dtype of a half-precision result before it multiplies, and no GPU kernel
// takes two numbers that lie on the CPU.
bool is_torchs_addcmul(const Call& call, const at::Tensor& tensor1, const at::Tensor& tensor2) {
  const at::ScalarType dtype = call.input->scalar_type();
  const auto is_cpu_scalar = [](const at::Tensor& tensor) { return tensor.dim() == 0 && tensor.is_cpu(); };
  const bool rounds_once = math_type(dtype) == dtype || (tensor1.scalar_type() == dtype && tensor2.scalar_type() == dtype);
  const bool takes_both = call.input->is_cpu() || !is_cpu_scalar(tensor1) || !is_cpu_scalar(tensor2);
  return !is_dense(call) || (rounds_once && takes_both);
}

void addcmul_formula(const Call& call, const at::Tensor& input) {
  const Operand& tensor1 = call.operands[0];
  const Operand& tensor2 = call.operands[1];
  const at::ScalarType math = math_type(input.scalar_type());
  const auto in_math = [math](const at::Tensor& tensor) { return tensor.to(c10::promoteTypes(tensor.scalar_type(), math)); };
  at::Tensor product;
  if (tensor1.tensor != nullptr && tensor2.tensor != nullptr) {
    if (is_torchs_addcmul(call, *tensor1.tensor, *tensor2.tensor)) {
      call.input->addcmul_(*tensor1.tensor, *tensor2.tensor, call.parameter);
      return;
    }
    product = at::mul(in_math(*tensor1.tensor), in_math(*tensor2.tensor));
  } else {
    const Operand& tensor = tensor1.tensor != nullptr ? tensor1 : tensor2;
    const Operand& number = tensor1.tensor != nullptr ? tensor2 : tensor1;
    // Of two numbers one becomes a tensor: of the input's dtype, or of the one that it would promote the input to.
    const at::Tensor factor = tensor.tensor != nullptr
        ? *tensor.tensor
        : as_tensor(tensor).to(at::device(input.device()).dtype(at::result_type(input, tensor.number)),
                               /*non_blocking=*/false, /*copy=*/true);
    product = times(widened(factor), number);
  }
  const at::Scalar alpha = as_alpha(call.parameter, c10::promoteTypes(product.scalar_type(), input.scalar_type()));
  write_result(*call.input, at::add(widened(input), product, alpha));
}

// torch's in-place methods let an operand on the meta device pass, and write nothing.
void check_devices(const Call& call) {
  for (int i = 0; i < call.info().operands; ++i) {
    const at::Tensor* operand = call.operands[i].tensor;
    TORCH_CHECK(operand == nullptr || !operand->is_meta() || call.input->is_meta(), call.info().name,
                "(): Expected all tensors to be on the same device, but argument '", call.info().operand_names[i],
                "' is on meta and input is on ", call.input->device(), "; move it with .to(input.device)");
  }
}

// Sparse, mkldnn and nested tensors lack the general forms: what torch's two methods do, with two raises of the version.
void two_steps(const Call& call) {
  const int added = call.op == op_index<AddMul> ? 0 : 1;
  const Call add{op_index<Add>, call.input, {call.operands[added], {}}, 1};
  const Call mul{op_index<Mul>, call.input, {call.operands[1 - added], {}}, 1};
  Call steps[2] = {call.op == op_index<AddMul> ? add : mul, call.op == op_index<AddMul> ? mul : add};
  // The first step may write what the second one reads: whether these layouts share memory, their tensors do not tell.
  at::Tensor second;
  if (const at::Tensor* operand = steps[1].operands[0].tensor) {
    second = operand->clone();
    steps[1].operands[0].tensor = &second;
  }
  {
    // The second step may be refused when the first has been written: a copy of the input goes ahead.
    const at::NoGradGuard no_grad;
    const at::Tensor trial = call.input->clone();
    for (Call step : steps) {
      step.input = &trial;
      write_by_formula(step);
    }
  }
  for (const Call& step : steps) {
    write_by_formula(step);
  }
}

} // namespace

void write_by_formula(const Call& original) {
  check_devices(original);
  const Protected guarded(original);
  const Call& call = guarded.call;
  if ((call.op == op_index<AddMul> || call.op == op_index<MulAdd>) && !is_dense(call)) {
    return two_steps(call);
  }
  switch (call.op) {
    case op_index<Add>:
      return add_formula(call);
    case op_index<Mul>:
      return mul_formula(call);
    case op_index<AddMul>:
      return write_result(*call.input, times(plus(widened(guarded.input), call.operands[0]), call.operands[1]));
    case op_index<MulAdd>:
      return write_result(*call.input, plus(times(widened(guarded.input), call.operands[0]), call.operands[1]));
    default:
      return addcmul_formula(call, guarded.input);
  }
}

at::Tensor gradient_by_formula(const Backward& backward, int position, const OperandShape& shape) {
  const Partial& partial = infos[backward.op].partials[position];
  // As in the kernels: products are rounded to the operand's dtype after they are summed.
  at::Tensor gradient = widened(backward.grad);
  if (partial.factor != Factor::One) {
    const FactorValue& factor = backward.factors[int(partial.factor)];
    gradient = factor.tensor.defined() ? at::mul(gradient, factor.tensor.conj())
                                       : at::mul(gradient, factor.number.conj());
  }
  if (partial.times_parameter && !equals(backward.parameter, 1)) {
    gradient = at::mul(gradient, backward.parameter.conj());
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
