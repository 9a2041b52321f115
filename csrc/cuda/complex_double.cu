// The CUDA kernels of complex128.
#include "dtypes.cuh"

namespace safe_inplace::cuda {
template void forward<Complex<double>>(const ForwardPlan&);
template void backward<Complex<double>>(const BackwardPlan&);
} // namespace safe_inplace::cuda
