// What a kernel is asked to do, free of ATen: sizes, strides in elements and pointers, the dimensions already sorted
// (dimension 0 is the innermost) and merged where every tensor allows it. Shared by both devices.
#pragma once

#include "formulas.h"

namespace safe_inplace {

constexpr int kMaxDims = 12; // after merging; calls with more take the aten formula

// One tensor, or one number, of a call.
struct Arg {
  void* data = nullptr; // null: `number` is the operand
  DType dtype = DType::Float;
  double number[2] = {0, 0}; // real, imag
  int64_t strides[kMaxDims] = {}; // in elements; 0 where the operand is broadcast
};

struct Shape {
  int ndim = 0; // at least 1, unless numel is 0
  int64_t sizes[kMaxDims] = {};
  int64_t numel = 0;
};

inline bool is_contiguous(const Arg& arg, const Shape& shape) {
  int64_t stride = 1;
  for (int d = 0; d < shape.ndim; ++d) {
    if (shape.sizes[d] > 1 && arg.strides[d] != stride) {
      return false;
    }
    stride *= shape.sizes[d];
  }
  return true;
}

inline bool is_broadcast(const Arg& arg, const Shape& shape) {
  for (int d = 0; d < shape.ndim; ++d) {
    if (shape.sizes[d] > 1 && arg.strides[d] == 0) {
      return true;
    }
  }
  return false;
}

// result = op(input, operands, parameter), and `kept` (when its data is set) = the value that backward needs. Without a result
// the input is written. The result, the kept value and an input without a result are of the plan's dtype; what is only read is
// of the plan's dtype, or float beside half and bfloat16, or half and bfloat16 beside float where the backend reads that.
// Numbers are already rounded where torch does. A result may be the memory of the input or of an operand: then its layout is.
struct ForwardPlan {
  int op = 0; // index in AllOps
  DType dtype = DType::Float;
  Shape shape;
  Arg result;
  Arg input;
  Arg operands[2];
  Arg kept;
  double parameter[2] = {1, 0};

  const Arg& written() const { return result.data != nullptr ? result : input; }
};

// For every wanted operand i: grads[i] = sum over its broadcast dimensions of
//   grad * conj(factor_i) * (times_parameter_i ? conj(parameter) : 1)
// with derivatives from the op table. factors[] hold first operand, second operand, kept value, where some wanted gradient
// reads them. grads[i].data may be the memory of grad, or of a factor: then it is element-wise, in grad's dtype, and every
// other gradient must have read an element before it is overwritten. Other dtypes stand beside each other as in forward.
// A broadcast dimension has stride 0 in grads[i].
struct BackwardPlan {
  int op = 0;
  DType dtype = DType::Float;
  Shape shape;
  Arg grad;
  Arg factors[3];
  bool wanted[3] = {false, false, false};
  bool reduced[3] = {false, false, false}; // some dimension of size > 1 is summed
  int64_t numel[3] = {0, 0, 0}; // elements of grads[i]
  Arg grads[3];
  double parameter[2] = {1, 0};
};

} // namespace safe_inplace
