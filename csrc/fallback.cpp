#include "fallback.h"

#include <ATen/ATen.h>
#include <ATen/ScalarOps.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "backend.h"
#include "checks.h"
#include "dispatch.h"
#include "result.h"

namespace safe_inplace {

// The op table's formulas are evaluated over two types of value: Value, by torch's functions, and InPlace, by its methods.
// Not in an unnamed namespace: the formulas find these operators by the namespace of their arguments.
namespace aten {

struct Value {
  at::Tensor tensor; // undefined: the number is it
  at::Scalar number;

  Value(at::Tensor result) : tensor(std::move(result)) {}
  Value(const at::Scalar& value) : number(value) {}
  Value(const Operand& operand) : number(operand.number) {
    if (operand.tensor != nullptr) {
      tensor = *operand.tensor;
    }
  }

  bool is_tensor() const { return tensor.defined(); }
  // A tracer's number has no value.
  bool is_traced_number() const { return !is_tensor() && number.isSymbolic(); }
  // As Python hands numbers to torch: some backends know only the overloads for tensors.
  at::Tensor as_tensor() const { return is_tensor() ? tensor : at::native::wrapped_scalar_tensor(number); }
};

Value operator*(const Value& a, const Value& b) {
  return b.is_traced_number() ? at::mul(a.tensor, b.number) : at::mul(a.tensor, b.as_tensor());
}

Value operator+(const Value& a, const Value& b) {
  return b.is_traced_number() ? at::add(a.tensor, b.number) : at::add(a.tensor, b.as_tensor());
}

Value multiply_add(const Value& a, const Value& b, const Value& c) {
  return a * b + c;
}

// In the dtype that the formulas compute in: rounded to the input's once, at the end.
at::Tensor widened(const at::Tensor& tensor) {
  return tensor.to(opmath_type(tensor.scalar_type()));
}

// torch's addcmul_ takes a boolean, and a complex number without an imaginary part, for which its add_ has no use.
at::Scalar as_alpha(const at::Scalar& value, bool complex) {
  if (value.isSymbolic()) {
    return value;
  }
  if (value.isBoolean()) {
    return int64_t(value.toBool());
  }
  if (value.isComplex() && !complex && value.toComplexDouble().imag() == 0) {
    return value.toComplexDouble().real();
  }
  return value;
}

bool is_exact(at::ScalarType dtype) {
  return at::isIntegralType(dtype, /*includeBool=*/true);
}

// As Python multiplies them. Booleans stay some, as in torch.
at::Scalar product_of_numbers(const at::Scalar& a, const at::Scalar& b) {
  if (a.isComplex() || b.isComplex()) {
    return a.toComplexDouble() * b.toComplexDouble();
  }
  if (a.isFloatingPoint() || b.isFloatingPoint()) {
    return a.toDouble() * b.toDouble();
  }
  if (a.isBoolean() && b.isBoolean()) {
    return a.toBool() && b.toBool();
  }
  const auto exact = [](const at::Scalar& number) -> __int128 {
    return number.type() == at::kUInt64 ? __int128(number.toUInt64()) : __int128(number.toLong());
  };
  const __int128 product = exact(a) * exact(b);
  if (product == __int128(int64_t(product))) {
    return int64_t(product);
  }
  TORCH_CHECK_VALUE(product == __int128(uint64_t(product)), "addcmul: tensor1 and tensor2 are the numbers ", a, " and ", b,
                    ", and no int64 holds their product; give one of them as a float");
  return uint64_t(product);
}

Value product_of(const Value& input, const Value& a, const Value& b) {
  if (a.is_tensor() && b.is_tensor()) {
    const bool exact =
        is_exact(input.tensor.scalar_type()) || is_exact(a.tensor.scalar_type()) || is_exact(b.tensor.scalar_type());
    const auto in_opmath = [&](const at::Tensor& tensor) {
      return exact ? widened(tensor) : tensor.to(c10::promoteTypes(tensor.scalar_type(), input.tensor.scalar_type()));
    };
    return at::mul(in_opmath(a.tensor), in_opmath(b.tensor));
  }
  const Value& tensor = a.is_tensor() ? a : b;
  const Value& number = a.is_tensor() ? b : a;
  if (tensor.is_tensor()) {
    return Value(widened(tensor.tensor)) * number;
  }
  const bool traced = a.is_traced_number() || b.is_traced_number();
  const bool makes_complex = !input.tensor.is_complex() && (a.number.isComplex() || b.number.isComplex());
  if (!traced && (is_exact(input.tensor.scalar_type()) || makes_complex)) {
    return product_of_numbers(a.number, b.number);
  }
  // Of two numbers one becomes a tensor of the input's dtype, as in the kernels.
  const auto options = at::device(input.tensor.device()).dtype(at::result_type(input.tensor, tensor.number));
  return Value(widened(tensor.as_tensor().to(options, /*non_blocking=*/false, /*copy=*/true))) * number;
}

Value add_product(const Value& input, const Value& a, const Value& b, const Value& scale) {
  const at::Tensor product = product_of(input, a, b).as_tensor();
  return at::add(input.tensor, product, as_alpha(scale.number, product.is_complex() || input.tensor.is_complex()));
}

Value add_scaled(const Value& input, const Value& other, const Value& scale) {
  return at::add(input.tensor, other.as_tensor(), scale.number);
}

// The input, to which each step is done by torch's in-place method; or an operand.
struct InPlace {
  const at::Tensor* target = nullptr;
  Value operand = at::Scalar(0);

  InPlace(const at::Tensor* input) : target(input) {}
  InPlace(const Value& value) : operand(value) {}
};

InPlace operator*(const InPlace& input, const InPlace& factor) {
  factor.operand.is_traced_number() ? input.target->mul_(factor.operand.number) : input.target->mul_(factor.operand.as_tensor());
  return input;
}

InPlace add_scaled(const InPlace& input, const InPlace& other, const InPlace& scale) {
  other.operand.is_traced_number() ? input.target->add_(other.operand.number, scale.operand.number)
                                   : input.target->add_(other.operand.as_tensor(), scale.operand.number);
  return input;
}

InPlace operator+(const InPlace& input, const InPlace& term) {
  return add_scaled(input, term, Value(at::Scalar(1)));
}

InPlace multiply_add(const InPlace& input, const InPlace& factor, const InPlace& term) {
  return input * factor + term;
}

InPlace add_product(const InPlace& input, const InPlace& a, const InPlace& b, const InPlace& scale) {
  input.target->addcmul_(a.operand.tensor, b.operand.tensor, scale.operand.number);
  return input;
}

} // namespace aten

namespace {

using aten::InPlace;
using aten::Value;

bool differentiates(const at::Tensor& tensor) {
  return (c10::GradMode::is_enabled() && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined();
}

// The call with a copy in place of every operand that autograd would save and the write overwrites, or that torch's kernels would
// read while they write it.
struct Protected {
  bool gradient; // a wrapper of a transform does not say what the tensors inside it need
  at::Tensor copies[2];
  Call call;

  Protected(const Call& original, bool dense) : gradient(!dense || any_tensor(original, differentiates)), call(original) {
    each_tensor(original, [&](const at::Tensor& operand, int i) {
      const bool saved = gradient && share_storage(operand, *original.input);
      if (saved || (dense && !readable_in_place(*original.input, operand))) {
        copies[i] = operand.clone();
        call.operands[i].tensor = &copies[i];
      }
    });
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

at::Tensor formula(const Call& call, const at::Tensor& input) {
  at::Tensor result;
  with_op(call.op, [&]<class Op>(Op) {
    result = Op::template result<Value>(input, call.operands[0], call.operands[1], call.parameter).tensor;
  });
  return result;
}

// The call with other tensors as its operands, made of the ones that it has.
template <class Make>
Call with_operands(const Call& original, at::Tensor (&made)[2], const Make& make) {
  Call call = original;
  each_tensor(original, [&](const at::Tensor& operand, int i) {
    made[i] = make(operand);
    call.operands[i].tensor = &made[i];
  });
  return call;
}

// torch's addcmul_ multiplies in the dtype of all three.
Call beside_input(const Call& call, at::Tensor (&promoted)[2]) {
  if (call.info().torch_method != TorchMethod::ForTensors || call.operands[0].tensor == nullptr ||
      call.operands[1].tensor == nullptr) {
    return call;
  }
  const at::ScalarType dtype = opmath_type(call.input->scalar_type());
  return with_operands(
      call, promoted, [dtype](const at::Tensor& operand) { return operand.to(c10::promoteTypes(operand.scalar_type(), dtype)); });
}

void write_out_of_place(const Call& call, bool gradient) {
  // Autograd may save it.
  const bool saved = gradient && call.info().kept == Kept::Input;
  at::Tensor promoted[2];
  write_result(*call.input, formula(beside_input(call, promoted), aten::widened(saved ? call.input->clone() : *call.input)));
}

void write_in_place(const Call& call, const at::Tensor& target) {
  with_op(call.op, [&]<class Op>(Op) {
    Op::template result<InPlace>(&target, Value(call.operands[0]), Value(call.operands[1]), Value(call.parameter));
  });
}

// Sparse, mkldnn and nested tensors lack the general forms: what torch's methods do, with a raise of the version for each.
void write_in_steps(const Call& original) {
  // A step may write what the next one reads: whether these layouts share memory, their tensors do not tell.
  at::Tensor copies[2];
  const Call call = with_operands(original, copies, [](const at::Tensor& operand) { return operand.clone(); });
  {
    // The second step may be refused when the first has been written: a copy of the input goes ahead.
    const at::NoGradGuard no_grad;
    write_in_place(call, call.input->clone());
  }
  write_in_place(call, *call.input);
}

bool is_strided(const Call& call) {
  return !any_tensor(call, [](const at::Tensor& tensor) { return tensor.layout() != at::kStrided || tensor.is_nested(); });
}

// torch's addcmul_ takes no numbers, rounds a 0-dim operand to the dtype of a half-precision result before it multiplies, and on a
// GPU takes no two numbers that lie on the CPU.
bool method_takes_tensors(const Call& call) {
  if (call.operands[0].tensor == nullptr || call.operands[1].tensor == nullptr) {
    return false;
  }
  const at::Tensor& a = *call.operands[0].tensor;
  const at::Tensor& b = *call.operands[1].tensor;
  const at::ScalarType dtype = call.input->scalar_type();
  const auto is_cpu_scalar = [](const at::Tensor& tensor) { return tensor.dim() == 0 && tensor.is_cpu(); };
  const bool rounds_once = opmath_type(dtype) == dtype || (a.scalar_type() == dtype && b.scalar_type() == dtype);
  const bool takes_both = call.input->is_cpu() || !is_cpu_scalar(a) || !is_cpu_scalar(b);
  return !is_strided(call) || (rounds_once && takes_both);
}

void write(const Call& original, bool dense) {
  const Protected guarded(original, dense);
  const Call& call = guarded.call;
  switch (call.info().torch_method) {
    case TorchMethod::ForAnyOperands:
      return write_in_place(call, *call.input);
    case TorchMethod::ForTensors:
      return method_takes_tensors(call) ? write_in_place(call, *call.input) : write_out_of_place(call, guarded.gradient);
    case TorchMethod::None:
      return is_strided(call) ? write_out_of_place(call, guarded.gradient) : write_in_steps(call);
  }
}

// A subclass, fake tensors among them, would have no kernel either way.
bool computes_on_cuda(const at::Tensor& tensor) {
  const auto keys = tensor.key_set() - c10::impl::tls_local_dispatch_key_set().excluded_;
  return tensor.is_cuda() && !keys.has(c10::DispatchKey::Python);
}

// CUDA is the one backend that a build may lack though torch has it.
void say_that_cuda_was_left_out(const Call& call) {
  if (backend_of(c10::DeviceType::CUDA) == nullptr && any_tensor(call, computes_on_cuda)) {
    TORCH_WARN_ONCE(
        "safe_inplace was built without CUDA: on CUDA tensors torch's own operations compute its ops, right and without "
        "the gain. Build it where nvcc of torch's CUDA is found; `python -m safe_inplace env` says what was built.");
  }
}

bool is_reduced(const at::Tensor& tensor) {
  return opmath_type(tensor.scalar_type()) != tensor.scalar_type();
}

} // namespace

at::Tensor result_by_fallback(const Call& original) {
  say_that_cuda_was_left_out(original);
  const at::ScalarType dtype = original.input->scalar_type();
  const auto differs = [dtype](const at::Tensor& tensor) { return tensor.scalar_type() != dtype; };
  if (original.info().torch_method == TorchMethod::ForAnyOperands ||
      !(is_reduced(*original.input) || any_tensor(original, differs))) {
    return formula(original, *original.input);
  }
  // Several steps, which would each round to its own dtype; a 0-dim tensor may make one wider than the result.
  at::Tensor wide[2];
  const Call call = with_operands(original, wide, aten::widened);
  return formula(call, aten::widened(*original.input)).to(result_dtype(original));
}

void write_by_fallback(const Call& call, bool dense) {
  say_that_cuda_was_left_out(call);
  check_devices(call);
  if (dense) {
    check_memory(call);
  }
  write(call, dense);
}

void write_checked_by_fallback(const Call& call) {
  write(call, /*dense=*/true);
}

} // namespace safe_inplace
