// The simulated kernels of complex64.
#include "launch.h"

namespace safe_inplace::simulator {
template void forward<Complex<float>>(const ForwardPlan&);
template void backward<Complex<float>>(const BackwardPlan&);
} // namespace safe_inplace::simulator
