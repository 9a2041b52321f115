// The simulated kernels of bfloat16.
#include "launch.h"

namespace safe_inplace::simulator {
template void forward<BFloat16>(const ForwardPlan&);
template void backward<BFloat16>(const BackwardPlan&);
} // namespace safe_inplace::simulator
