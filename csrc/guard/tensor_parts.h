// The memory of a tensor of any layout.
#pragma once

#include <ATen/NestedTensorImpl.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/SparseTensorUtils.h>
#include <c10/util/ArrayRef.h>
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
template <class F>
void each_part(const at::Tensor& tensor, const F& visit) {
  if (!tensor.defined()) {
    return;
  }
  if (tensor.is_sparse()) {
    const auto* impl = at::sparse::get_sparse_impl(tensor);
    visit(impl->indices());
    visit(impl->values());
  } else if (at::sparse_csr::is_sparse_compressed(tensor)) {
    auto* impl = at::sparse_csr::get_sparse_csr_impl(tensor);
    visit(impl->compressed_indices());
    visit(impl->plain_indices());
    visit(impl->values());
  } else if (tensor.key_set().has(c10::DispatchKey::NestedTensor)) {
    visit(at::native::get_nested_tensor_impl(tensor)->get_unsafe_storage_as_tensor());
  } else {
    visit(tensor);
  }
}

inline void append_extents(Extents& extents, const at::Tensor& tensor) {
  each_part(tensor, [&](const at::Tensor& part) {
    if (auto extent = extent_of(part)) {
      extents.push_back(std::move(*extent));
    }
  });
}

inline bool overlap_any(c10::ArrayRef<Extent> a, c10::ArrayRef<Extent> b) {
  return std::any_of(a.begin(), a.end(), [&](const Extent& x) {
    return std::any_of(b.begin(), b.end(), [&](const Extent& y) { return overlap(x, y); });
  });
}

} // namespace safe_inplace::guard
