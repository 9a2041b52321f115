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

// Where backward reads a factor other than one.
SI_INLINE constexpr Slot slot_of(Factor factor) {
  return factor == Factor::First ? First : factor == Factor::Second ? Second : Saved;
}

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

  template <class M>
  SI_INLINE static M compute(int out, int, M conjugate_parameter, const M (&in)[kIns]) {
    if (out == 0) {
      return partial<0>(conjugate_parameter, in);
    }
    return out == 1 ? partial<1>(conjugate_parameter, in) : partial<Op::operands>(conjugate_parameter, in);
  }

 private:
  template <int I, class M>
  SI_INLINE static M partial(M conjugate_parameter, const M (&in)[kIns]) {
    constexpr Factor factor = Op::derivatives[I].factor;
    constexpr bool times_parameter = Op::derivatives[I].times_parameter;
    constexpr int slot = slot_of(factor);
    M value = in[Main];
    if constexpr (factor != Factor::One) {
      value = value * conjugate(in[slot]);
    }
    if constexpr (times_parameter) {
      value = value * conjugate_parameter;
    }
    return value;
  }
};

template <template <class> class Functor>
struct AnyOp {
  static constexpr bool reads_first = true;
  static constexpr bool reads_second = true;
  static constexpr bool reads_saved = true;
  static constexpr int outs = kOuts;

  template <class M>
  SI_INLINE static M compute(int out, int op, M parameter, const M (&in)[kIns]) {
    M value{};
    with_op(op, [&](auto tag) { value = Functor<decltype(tag)>::compute(out, op, parameter, in); }, AllOps{});
    return value;
  }
};

} // namespace safe_inplace::cuda
