// The memory of a tensor of any layout.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>
#include <c10/util/SmallVector.h>

#include "extent.h"

namespace safe_inplace::guard {

using Extents = c10::SmallVector<Extent, 1>; // of a tensor: most have one

inline bool plain(const at::Tensor& tensor) {
  // Subclasses, functorch's wrappers and fakes stand for other tensors.
  constexpr auto stand_ins = c10::DispatchKeySet({c10::DispatchKey::Python, c10::DispatchKey::FuncTorchBatched,
                                                  c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  return !tensor.key_set().has_any(stand_ins);
}

// The strided tensors that a tensor of any layout keeps its values in.
void each_part(const at::Tensor& tensor, c10::function_ref<void(const at::Tensor&)> visit);

void append_extents(Extents& extents, const at::Tensor& tensor);

bool overlap_any(c10::ArrayRef<Extent> a, c10::ArrayRef<Extent> b);

} // namespace safe_inplace::guard
