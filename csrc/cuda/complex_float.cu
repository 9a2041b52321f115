// The CUDA kernels of complex64.
#include "dtypes.cuh"

namespace safe_inplace::cuda {
template void forward<Complex<float>>(const ForwardPlan&);
template void backward<Complex<float>>(const BackwardPlan&);
} // namespace safe_inplace::cuda
