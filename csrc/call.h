// One call of an op, whatever its operands are.
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
  Form form;
  const at::Tensor* input;
  Operand operands[2];
  at::Scalar parameter = 1;

  const OpInfo& info() const { return infos[op]; }
  const char* name() const { return info().names[int(form)]; }
};

// Calls visit(tensor, i) with each operand that is a tensor.
template <class Visit>
void each_tensor(const Call& call, const Visit& visit) {
  for (int i = 0; i < call.info().operands; ++i) {
    if (call.operands[i].tensor != nullptr) {
      visit(*call.operands[i].tensor, i);
    }
  }
}

template <class Test>
bool any_tensor(const Call& call, const Test& test) {
  bool any = test(*call.input);
  each_tensor(call, [&](const at::Tensor& tensor, int) { any = any || test(tensor); });
  return any;
}

// A dense tensor on a device with kernels that nothing stands in front of: no subclass, no transform, no lazy conjugation.
bool has_kernel(const at::Tensor& tensor);
bool has_kernel(const Call& call);

bool share_storage(const at::Tensor& a, const at::Tensor& b);

// The dtype that kernels have for a scalar type, if there is one.
bool kernel_dtype(at::ScalarType type, DType& dtype);

// The scalar type of arithmetic and accumulation; its own where no kernel has the type.
at::ScalarType opmath_type(at::ScalarType type);

} // namespace safe_inplace
