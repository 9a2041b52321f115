// One call of an op, whatever its operands are: the checks it must pass before any byte changes, and the translation
// into the plan that a kernel runs.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>

#include "plan.h"

namespace safe_inplace {

// A tensor or a number.
struct Operand {
  const at::Tensor* tensor = nullptr;
  at::Scalar number;

  Operand() = default;
  Operand(const at::Tensor& operand) : tensor(&operand) {}
  Operand(const at::Scalar& operand) : number(operand) {}
};

struct Call {
  int op;
  const at::Tensor* input;
  Operand operands[2];
  at::Scalar parameter = 1;

  const OpInfo& info() const {
    return infos[op];
  }
};

// A plain dense tensor that nothing stands in front of: no subclass, no transform, no lazy conjugation.
bool is_plain(const at::Tensor& tensor);
bool is_plain(const Call& call);

// Refuses a tensor whose version counter cannot be raised, in torch's words; torch itself notices after the write.
void check_writable(const at::Tensor& input);

bool share_storage(const at::Tensor& a, const at::Tensor& b);

// The refusals of a plain call that its layout and memory give reason for, in torch's words where it has some.
void check_memory(const Call& call);

// Whether reading the operand element by element beside writing the input gives what reading all of it first would.
bool readable_in_place(const at::Tensor& input, const at::Tensor& operand);

struct Forward {
  ForwardPlan plan;
  at::Tensor copies[2]; // of operands that overlap the input in a way that cannot be read element by element
};

// Checks a plain call as torch's own in-place methods do, in their words, and lays it out. False where no kernel covers
// it: then the aten formula has to be used.
bool plan_forward(const Call& call, Forward& forward);
void set_kept(Forward& forward, const Call& call, const at::Tensor& kept);

// What a gradient is multiplied by.
struct FactorValue {
  at::Tensor tensor;
  at::Scalar number;
};

struct Backward {
  int op;
  at::Scalar parameter;
  at::Tensor grad;
  FactorValue factors[3]; // first operand, second operand, kept; undefined where nobody reads them
  at::Tensor grads[3]; // undefined where nobody wants them; otherwise in the operand's shape
};

// What a hook or an assignment to `.data` has put in the place of what was saved must fit the gradient as it did then.
void check_factors(const Backward& backward);

bool plan_backward(const Backward& backward, BackwardPlan& plan);

// The dtype that kernels have for a scalar type, if there is one.
bool kernel_dtype(at::ScalarType type, DType& dtype);
at::ScalarType math_type(at::ScalarType type);

// False for a symbol, whose value only its tracer may ask for.
bool equals(const at::Scalar& number, int value);

void run_forward(Forward& forward, const Call& call);
void run_backward(const BackwardPlan& plan, const at::Tensor& grad);

} // namespace safe_inplace
