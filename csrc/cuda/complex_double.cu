#include "dtypes.cuh"

namespace safe_inplace::tiles {
template void cuda_forward<Complex<double>>(const ForwardPlan&);
template void cuda_backward<Complex<double>>(const BackwardPlan&);
} // namespace safe_inplace::tiles
