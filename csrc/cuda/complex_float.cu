#include "dtypes.cuh"

namespace safe_inplace::tiles {
template void cuda_forward<Complex<float>>(const ForwardPlan&);
template void cuda_backward<Complex<float>>(const BackwardPlan&);
} // namespace safe_inplace::tiles
