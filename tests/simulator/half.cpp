// The simulated kernels of float16.
#include "launch.h"

namespace safe_inplace::simulator {
template void forward<Half>(const ForwardPlan&);
template void backward<Half>(const BackwardPlan&);
} // namespace safe_inplace::simulator
