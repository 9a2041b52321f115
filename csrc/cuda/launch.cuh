// What needs a GPU: the __global__ functions, and the launcher of the current device and stream.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "dispatch.h"

namespace safe_inplace::cuda {

template <class Kernel>
__global__ void __launch_bounds__(kThreads) elementwise_kernel(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params, blockIdx.x, threadIdx.x);
}

// Two blocks to a multiprocessor at the least: 128 registers, which the widest kernels just fit.
template <class Kernel>
__global__ void __launch_bounds__(kThreads, 2) reduce_kernel(const __grid_constant__ typename Kernel::Params params) {
  __shared__ typename Kernel::Shared shared;
  Kernel::accumulate(params, blockIdx.x, threadIdx.x, shared);
  for (uint32_t distance = Kernel::first_step(params); distance > 0; distance /= 2) {
    // What a step reads was written within its own warp once the distance is below a warp's width.
    if (distance >= 32) {
      __syncthreads();
    } else {
      __syncwarp();
    }
    Kernel::step(params, blockIdx.x, threadIdx.x, distance, shared);
  }
  Kernel::write(params, blockIdx.x, threadIdx.x, shared);
}

class CudaLauncher {
 public:
  CudaLauncher() : stream_(c10::cuda::getCurrentCUDAStream()) {}

  int64_t index_limit() const { return kIndexLimit; }
  int64_t small_limit() const { return kSmallLimit; }
  int64_t target_blocks(int64_t preferred) const { return preferred; }

  template <class Kernel>
  void elementwise(const typename Kernel::Params& params, int64_t blocks, const Trace&) {
    elementwise_kernel<Kernel><<<unsigned(blocks), kThreads, 0, stream_>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  template <class Kernel>
  void reduce(const typename Kernel::Params& params, int64_t blocks, const Trace&) {
    reduce_kernel<Kernel><<<unsigned(blocks), kThreads, 0, stream_>>>(params);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  // Freed when the launches are queued: the allocator hands memory out again in the stream's order.
  struct Workspace {
    c10::DataPtr memory;
    void* data() const { return memory.get(); }
  };
  Workspace workspace(int64_t bytes) {
    return {bytes > 0 ? c10::cuda::CUDACachingAllocator::get()->allocate(size_t(bytes)) : c10::DataPtr()};
  }

 private:
  cudaStream_t stream_;
};

} // namespace safe_inplace::cuda
