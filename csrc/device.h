// The kernels of a device. Each device registers its own; nothing else knows which devices there are.
#pragma once

#include <c10/core/Device.h>

#include "plan.h"

namespace safe_inplace {

struct DeviceKernels {
  // Both run on the current device and stream, and read every element of a plan before they overwrite it.
  void (*forward)(const ForwardPlan&);
  void (*backward)(const BackwardPlan&);
};

// Called from a static initialiser of the device's folder.
struct RegisterDevice {
  RegisterDevice(c10::DeviceType type, DeviceKernels kernels);
};

// Null where this build has no kernels for the device.
const DeviceKernels* device_kernels(c10::DeviceType type);

} // namespace safe_inplace
