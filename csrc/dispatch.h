// From an op or a dtype that is known at run time to code made for it. Not for the files that are compiled for several
// instruction sets: these functions may end up out of line.
#pragma once

#include "formulas.h"

namespace safe_inplace {

template <class Visit>
void with_op(int op, const Visit& visit) {
  with_op(op, visit, AllOps{});
}

// Calls visit with an element of the dtype.
template <class Visit>
auto with_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::Half:
      return visit(Half{});
    case DType::BFloat16:
      return visit(BFloat16{});
    case DType::Float:
      return visit(float{});
    case DType::Double:
      return visit(double{});
    case DType::ComplexFloat:
      return visit(Complex<float>{});
    case DType::ComplexDouble:
      return visit(Complex<double>{});
  }
  __builtin_unreachable();
}

// Calls visit with an element of the dtype's arithmetic.
template <class Visit>
auto with_opmath(DType dtype, const Visit& visit) {
  return with_dtype(dtype, [&]<class T>(T) { return visit(OpMath<T>{}); });
}

// The dtype of arithmetic and accumulation.
inline DType opmath_dtype(DType dtype) {
  return with_opmath(dtype, []<class M>(M) { return Type<M>::dtype; });
}

} // namespace safe_inplace
