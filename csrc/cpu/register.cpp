#include "../backend.h"
#include "kernels.h"

namespace safe_inplace {
namespace {

const RegisterBackend registered({c10::DeviceType::CPU, forward_on_cpu, backward_on_cpu, digest_on_cpu});

} // namespace
} // namespace safe_inplace
