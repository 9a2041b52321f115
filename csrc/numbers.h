// Numbers as kernels see them: in double, real and imaginary part, where that loses nothing that torch would keep.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>

#include "numeric.h"

namespace safe_inplace {

// False for a symbol, whose value only its tracer may ask for.
bool equals(const at::Scalar& number, int value);

// A number that every kernel dtype of the same category rounds as torch does. False where no kernel takes it.
bool take_number(const at::Scalar& number, at::ScalarType input_type, double* out);

// torch refuses a parameter that overflows the arithmetic dtype, and a boolean; its words come with the fallback.
bool take_parameter(const at::Scalar& number, at::ScalarType input_type, double* out);

// The value of a 0-dim CPU tensor: torch treats it as a number of its dtype.
bool take_scalar_tensor(const at::Tensor& tensor, at::ScalarType input_type, double* out);

// To the nearest that the dtype has.
void round_number(DType dtype, double* number);

} // namespace safe_inplace
