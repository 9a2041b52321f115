// The simulated kernels of float64.
#include "launch.h"

namespace safe_inplace::simulator {
template void forward<double>(const ForwardPlan&);
template void backward<double>(const BackwardPlan&);
} // namespace safe_inplace::simulator
