// The CUDA kernels of float64.
#include "dtypes.cuh"

namespace safe_inplace::cuda {
template void forward<double>(const ForwardPlan&);
template void backward<double>(const BackwardPlan&);
} // namespace safe_inplace::cuda
