#include "dtypes.cuh"

namespace safe_inplace::tiles {
template void cuda_forward<BFloat16>(const ForwardPlan&);
template void cuda_backward<BFloat16>(const BackwardPlan&);
} // namespace safe_inplace::tiles
