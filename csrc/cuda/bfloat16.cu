// The CUDA kernels of bfloat16.
#include "dtypes.cuh"

namespace safe_inplace::cuda {
template void forward<BFloat16>(const ForwardPlan&);
template void backward<BFloat16>(const BackwardPlan&);
} // namespace safe_inplace::cuda
