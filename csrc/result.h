// What the result of an out-of-place call is like, and where its memory comes from.
#pragma once

#include <ATen/core/DimVector.h>

#include "call.h"

namespace safe_inplace {

struct ResultLayout {
  at::ScalarType dtype = at::kFloat;
  at::DimVector sizes;
  at::DimVector strides;
};

// The dtype that the formula's steps promote to.
at::ScalarType result_dtype(const Call& call);

// As torch's own operators give the formula's result, one step after the other: promoted, broadcast, and laid out. Refuses operands
// that do not broadcast, in torch's words. For calls whose tensors have kernels.
ResultLayout result_layout(const Call& call);

// Memory that nobody has seen.
at::Tensor make_fresh(const ResultLayout& layout, c10::Device device);

// Whether its memory holds such a result. Strides of sizes of 1 lead nowhere.
bool has_layout(const at::Tensor& tensor, const ResultLayout& layout);

// The same memory as a tensor of its own: what the temporary's had been becomes the result's.
at::Tensor take_over(const at::Tensor& temporary, const ResultLayout& layout);

} // namespace safe_inplace
