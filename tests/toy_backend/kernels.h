// Kernels of the simplest kind: one element after the other.
#pragma once

#include <functional>
#include <map>

#include "dispatch.h"
#include "plan.h"

namespace safe_inplace::toy {

// Calls visit with every index of the shape, as offset(arg): where an argument's element lies.
template <class Visit>
void each_element(const Shape& shape, const Visit& visit) {
  for (int64_t linear = 0; linear < shape.numel; ++linear) {
    visit([&](const Arg& arg) {
      int64_t offset = 0;
      for (int64_t dim = 0, left = linear; dim < shape.ndim; left /= shape.sizes[dim++]) {
        offset += left % shape.sizes[dim] * arg.strides[dim];
      }
      return offset;
    });
  }
}

// An element, or the number, in the arithmetic dtype M.
template <class M>
M load(const Arg& arg, int64_t offset) {
  if (arg.data == nullptr) {
    return Number<M>::from(arg.number);
  }
  M value{};
  with_dtype(arg.dtype, [&]<class T>(T) {
    if constexpr (std::is_same_v<OpMath<T>, M>) {
      value = widen(static_cast<const T*>(arg.data)[offset]);
    }
  });
  return value;
}

template <class M>
void store(const Arg& arg, int64_t offset, M value) {
  with_dtype(arg.dtype, [&]<class T>(T) {
    if constexpr (std::is_same_v<OpMath<T>, M>) {
      static_cast<T*>(arg.data)[offset] = narrow<T>(value);
    }
  });
}

inline void forward(const ForwardPlan& plan) {
  with_op(plan.op, [&]<class Op>(Op) {
    with_opmath(plan.dtype, [&]<class M>(M) {
      each_element(plan.shape, [&](const auto& offset) {
        const M input = load<M>(plan.input, offset(plan.input));
        const M first = load<M>(plan.operands[0], offset(plan.operands[0]));
        const M second = load<M>(plan.operands[1], offset(plan.operands[1]));
        if (plan.kept.data != nullptr) {
          store(plan.kept, offset(plan.kept), kept_value<Op>(input, first));
        }
        store(plan.written(), offset(plan.written()), Op::result(input, first, second, Number<M>::from(plan.parameter)));
      });
    });
  });
}

inline void backward(const BackwardPlan& plan) {
  with_opmath(plan.dtype, [&]<class M>(M) {
    // All is read before anything is written: a gradient may go into the memory of the incoming one.
    std::map<int64_t, M> sums[3];
    each_element(plan.shape, [&](const auto& offset) {
      const M grad = load<M>(plan.grad, offset(plan.grad));
      for (int i = 0; i < 3; ++i) {
        if (!plan.wanted[i]) {
          continue;
        }
        const auto& [factor, times_parameter] = infos[plan.op].derivatives[i];
        M term = grad;
        if (factor != Factor::One) {
          const Arg& value = plan.factors[int(factor)];
          term = term * conjugate(load<M>(value, offset(value)));
        }
        if (times_parameter) {
          term = term * conjugate(Number<M>::from(plan.parameter));
        }
        M& sum = sums[i][offset(plan.grads[i])];
        sum = sum + term;
      }
    });
    for (int i = 0; i < 3; ++i) {
      for (const auto& [offset, sum] : sums[i]) {
        store(plan.grads[i], offset, sum);
      }
    }
  });
}

} // namespace safe_inplace::toy
