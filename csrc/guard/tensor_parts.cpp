// The parts of a tensor. Apart, since torch's headers of the other layouts take long to compile.
#include "guard/tensor_parts.h"

#include <algorithm>
#include <utility>

#include <ATen/NestedTensorImpl.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/native/SparseTensorUtils.h>

namespace safe_inplace::guard {

void each_part(const at::Tensor& tensor, c10::function_ref<void(const at::Tensor&)> visit) {
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

void append_extents(Extents& extents, const at::Tensor& tensor) {
  each_part(tensor, [&](const at::Tensor& part) {
    if (auto extent = extent_of(part)) {
      extents.push_back(std::move(*extent));
    }
  });
}

bool overlap_any(c10::ArrayRef<Extent> a, c10::ArrayRef<Extent> b) {
  return std::any_of(a.begin(), a.end(), [&](const Extent& x) {
    return std::any_of(b.begin(), b.end(), [&](const Extent& y) { return overlap(x, y); });
  });
}

} // namespace safe_inplace::guard
