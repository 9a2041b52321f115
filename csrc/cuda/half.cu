#include "dtypes.cuh"

namespace safe_inplace::tiles {
template void cuda_forward<Half>(const ForwardPlan&);
template void cuda_backward<Half>(const BackwardPlan&);
} // namespace safe_inplace::tiles
