#include "digest.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "backend.h"

namespace safe_inplace {
namespace {

auto kernel_of(const at::Tensor& tensor) {
  const Backend* const backend = backend_of(tensor.device().type());
  return backend != nullptr ? backend->digest : nullptr;
}

// One unbroken run of bytes with the same values: the tensor itself wherever it has no holes.
at::Tensor unbroken(at::Tensor tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.stride(d) == 0 && tensor.size(d) > 1) {
      tensor = tensor.narrow(d, 0, 1);
    }
  }
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

} // namespace

bool can_digest(const at::Tensor& tensor) {
  return kernel_of(tensor) != nullptr;
}

at::Tensor digest_on_device(const at::Tensor& tensor) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  // A mode that counts or records operators (selective checkpointing) sees the program's alone.
  const c10::impl::ExcludeDispatchKeyGuard unseen(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::TESTING_ONLY_GenericMode}));
  const auto kernel = kernel_of(tensor);
  TORCH_CHECK_NOT_IMPLEMENTED(kernel != nullptr && tensor.layout() == at::kStrided,
                              "safe_inplace: digest() takes a strided tensor on a device that this build has kernels for, got a ",
                              tensor.layout(), " tensor on ", tensor.device());
  const auto result = at::empty({}, tensor.options().dtype(at::kLong).requires_grad(false));
  const auto bytes = unbroken(tensor);
  kernel(bytes.const_data_ptr(), static_cast<int64_t>(bytes.nbytes()), result);
  return result;
}

uint64_t digest(const at::Tensor& tensor) {
  return static_cast<uint64_t>(digest_on_device(tensor).item<int64_t>());
}

} // namespace safe_inplace
