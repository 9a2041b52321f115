// The simulated kernels of float32.
#include "launch.h"

namespace safe_inplace::simulator {
template void forward<float>(const ForwardPlan&);
template void backward<float>(const BackwardPlan&);
} // namespace safe_inplace::simulator
