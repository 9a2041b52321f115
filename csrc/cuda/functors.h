// What is computed between loads and stores, made from the op table: forward and backward of one op, or of an op chosen
// at run time for the layouts that need no instance of their own per op.
#pragma once

#include "params.h"

namespace safe_inplace::cuda {

template <class Op>
struct ForwardFunctor {
  static constexpr bool reads_second = Op::operands == 2;
  static constexpr bool reads_first = true;
  static constexpr bool reads_saved = false;
  static constexpr int outs = Op::kept == Kept::Nothing ? 1 : 2;

  // The value written to Out0 + `out`. in[] is indexed by Slot.
  template <class M>
  SI_INLINE static M compute(int out, int, M parameter, const M (&in)[kIns]) {
    return out == 0 ? Op::result(in[Main], in[First], in[Second], parameter) : kept_value<Op>(in[Main], in[First]);
  }
};

template <class Op>
constexpr bool reads_factor(Factor factor) {
  return Op::derivatives[0].factor == factor || Op::derivatives[1].factor == factor ||
         (Op::operands == 2 && Op::derivatives[2].factor == factor);
}

template <class Op>
struct BackwardFunctor {
  static constexpr bool reads_first = reads_factor<Op>(Factor::First);
  static constexpr bool reads_second = reads_factor<Op>(Factor::Second);
  static constexpr bool reads_saved = reads_factor<Op>(Factor::Kept);
  static constexpr int outs = 1 + Op::operands;
  static constexpr int sums = Op::operands;

  template <class M>
  SI_INLINE static M compute(int out, int, M conjugate_parameter, const M (&in)[kIns]) {
    const M value = product(out, in);
    return times_parameter(out) ? value * conjugate_parameter : value;
  }

  // What is summed for Out0 + `out`: without the parameter, which the sum is multiplied by.
  template <class M>
  SI_INLINE static M term(int out, int, const M (&in)[kIns]) {
    return product(out, in);
  }

 private:
  SI_INLINE static constexpr bool times_parameter(int out) {
    constexpr bool each[3] = {Op::derivatives[0].times_parameter, Op::derivatives[1].times_parameter,
                              Op::derivatives[2].times_parameter};
    return out == 0 ? each[0] : out == 1 ? each[1] : each[Op::operands];
  }

  template <class M>
  SI_INLINE static M product(int out, const M (&in)[kIns]) {
    return out == 0 ? product_of<0>(in) : out == 1 ? product_of<1>(in) : product_of<Op::operands>(in);
  }

  template <int I, class M>
  SI_INLINE static M product_of(const M (&in)[kIns]) {
    constexpr Factor factor = Op::derivatives[I].factor;
    constexpr int slot = slot_of(factor);
    if constexpr (factor == Factor::One) {
      return in[Main];
    } else {
      return in[Main] * conjugate(in[slot]);
    }
  }
};

// Backward of any op, where nothing but the gradient itself is summed: one sum, which serves both operands.
struct PlainSum {
  static constexpr bool reads_first = false;
  static constexpr bool reads_second = false;
  static constexpr bool reads_saved = false;
  static constexpr int outs = 0;
  static constexpr int sums = 1;
};

template <template <class> class Functor>
struct AnyOp {
  static constexpr bool reads_first = true;
  static constexpr bool reads_second = true;
  static constexpr bool reads_saved = true;
  static constexpr int outs = kOuts;
  static constexpr int sums = 2;

  template <class M>
  SI_INLINE static M compute(int out, int op, M parameter, const M (&in)[kIns]) {
    M value{};
    with_op(op, [&](auto tag) { value = Functor<decltype(tag)>::compute(out, op, parameter, in); }, AllOps{});
    return value;
  }

  template <class M>
  SI_INLINE static M term(int out, int op, const M (&in)[kIns]) {
    M value{};
    with_op(op, [&](auto tag) { value = Functor<decltype(tag)>::term(out, op, in); }, AllOps{});
    return value;
  }
};

} // namespace safe_inplace::cuda
