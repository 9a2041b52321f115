#include "../backend.h"
#include "kernels.h"

namespace safe_inplace {
namespace {

const RegisterBackend registered({c10::DeviceType::CPU, forward_on_cpu, backward_on_cpu, digest_on_cpu,
                                  /*takes_narrower=*/true, /*sums_for_input=*/true});

} // namespace
} // namespace safe_inplace
