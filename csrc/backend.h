// What a backend brings. Its folder registers it; all else follows from what has registered: which tensors have kernels, and the
// dispatch keys that the ops are implemented for.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DispatchKeySet.h>

#include "plan.h"

namespace safe_inplace {

struct Backend {
  c10::DeviceType device;
  // Both run on the current device and stream, and read every element of a plan before they overwrite it.
  void (*forward)(const ForwardPlan&);
  void (*backward)(const BackwardPlan&);
  // Digests `bytes` bytes from `data` into `result`, a 0-dim int64 tensor on the same device, on the current stream. Null: guard
  // has no fingerprints there.
  void (*digest)(const void* data, int64_t bytes, const at::Tensor& result) = nullptr;
  // Whether the kernels take half and bfloat16 beside float, ...
  bool takes_narrower = false;
  // ... and sum up the gradient of an input that was broadcast.
  bool sums_for_input = false;
};

// The name of a capsule that holds one, by which an extension of its own hands it to `_C.register_backend`.
inline constexpr const char* kBackendCapsule = "safe_inplace.Backend";

// As a static object of the backend's folder, or later. A second one for a device takes the place of the first.
struct RegisterBackend {
  explicit RegisterBackend(const Backend& backend);
};

// Null where there are no kernels for the device.
const Backend* backend_of(c10::DeviceType device);

// The dispatch keys that tensors have which kernels take.
extern c10::DispatchKeySet kernel_keys;

// Calls the function with the dispatch key of each backend, those that register later included.
void for_each_backend(void (*function)(c10::DispatchKey));

} // namespace safe_inplace
