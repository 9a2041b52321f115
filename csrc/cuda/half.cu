// The CUDA kernels of float16.
#include "dtypes.cuh"

namespace safe_inplace::cuda {
template void forward<Half>(const ForwardPlan&);
template void backward<Half>(const BackwardPlan&);
} // namespace safe_inplace::cuda
