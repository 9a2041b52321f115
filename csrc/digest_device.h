// A device's digest kernel. Each device registers its own.
#pragma once

#include <ATen/core/Tensor.h>

namespace safe_inplace {

// Digests `bytes` bytes from `data` into `result`, a 0-dim int64 tensor on the same device, on the current stream.
using DigestKernel = void (*)(const void* data, int64_t bytes, const at::Tensor& result);

// From a static initialiser of the device's folder.
struct RegisterDigest {
  RegisterDigest(c10::DeviceType type, DigestKernel kernel);
};

} // namespace safe_inplace
