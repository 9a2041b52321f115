// A 64-bit fingerprint of a tensor's bytes, at the speed of memory, equal on every device and number of threads.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace safe_inplace {

// Whether this build has a kernel for the tensor's device.
bool can_digest(const at::Tensor& tensor);

// Of the elements in logical order, whatever the strides: a tensor and its contiguous copy agree. Waits for the device.
uint64_t digest(const at::Tensor& tensor);

// The same, as a 0-dim int64 tensor on the tensor's own device: nothing waits, and no dispatch mode sees it.
at::Tensor digest_on_device(const at::Tensor& tensor);

} // namespace safe_inplace
