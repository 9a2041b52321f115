#include "dtypes.cuh"

namespace safe_inplace::tiles {
template void cuda_forward<double>(const ForwardPlan&);
template void cuda_backward<double>(const BackwardPlan&);
} // namespace safe_inplace::tiles
