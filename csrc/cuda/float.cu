#include "dtypes.cuh"

namespace safe_inplace::tiles {
template void cuda_forward<float>(const ForwardPlan&);
template void cuda_backward<float>(const BackwardPlan&);
} // namespace safe_inplace::tiles
