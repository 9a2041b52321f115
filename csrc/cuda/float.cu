// The CUDA kernels of float32.
#include "dtypes.cuh"

namespace safe_inplace::cuda {
template void forward<float>(const ForwardPlan&);
template void backward<float>(const BackwardPlan&);
} // namespace safe_inplace::cuda
