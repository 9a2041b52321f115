// The simulated kernels of complex128.
#include "launch.h"

namespace safe_inplace::simulator {
template void forward<Complex<double>>(const ForwardPlan&);
template void backward<Complex<double>>(const BackwardPlan&);
} // namespace safe_inplace::simulator
