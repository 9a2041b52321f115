// The digest of a tensor's bytes on CUDA.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include "../digest_mix.h"
#include "digest.h"

namespace safe_inplace::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksPerProcessor = 8;

// Loads of 16 bytes where the pointer allows: half the instructions per byte, which the bandwidth of memory asks for.
__global__ void __launch_bounds__(kThreads) sum_of_terms(const char* data, int64_t bytes, bool wide, unsigned long long* total) {
  const int64_t words = bytes / 8;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  uint64_t sum = 0;
  int64_t done = 0;
  if (wide) {
    const auto* pairs = reinterpret_cast<const ulonglong2*>(data);
    for (int64_t i = thread; i < words / 2; i += step) {
      const ulonglong2 pair = pairs[i];
      sum += digest_term(pair.x, 2 * i) + digest_term(pair.y, 2 * i + 1);
    }
    done = words / 2 * 2;
  }
  for (int64_t i = done + thread; i * 8 < bytes; i += step) {
    const int64_t here = bytes - i * 8 < 8 ? bytes - i * 8 : 8;
    uint64_t word = 0;
    for (int64_t b = 0; b < here; ++b) {
      word |= static_cast<uint64_t>(static_cast<unsigned char>(data[i * 8 + b])) << (8 * b);
    }
    sum += digest_term(word, i);
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    sum += __shfl_down_sync(0xffffffffu, sum, offset);
  }
  if (threadIdx.x % 32 == 0) {
    // Integer addition: the order of the warps does not show.
    atomicAdd(total, static_cast<unsigned long long>(sum));
  }
}

__global__ void finish_digest(uint64_t bytes, unsigned long long* total) {
  *total = digest_finish(*total, bytes);
}

} // namespace

void digest(const void* pointer, int64_t bytes, const at::Tensor& result) {
  const c10::cuda::CUDAGuard device(result.device());
  const auto stream = at::cuda::getCurrentCUDAStream();
  auto* total = reinterpret_cast<unsigned long long*>(result.mutable_data_ptr<int64_t>());
  C10_CUDA_CHECK(cudaMemsetAsync(total, 0, sizeof(*total), stream));
  const auto* data = static_cast<const char*>(pointer);
  if (bytes > 0) {
    const int64_t needed = (bytes / 16 + kThreads) / kThreads;
    const int64_t most = static_cast<int64_t>(at::cuda::getCurrentDeviceProperties()->multiProcessorCount) * kBlocksPerProcessor;
    const bool wide = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    sum_of_terms<<<static_cast<unsigned>(needed < most ? needed : most), kThreads, 0, stream>>>(data, bytes, wide, total);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  finish_digest<<<1, 1, 0, stream>>>(static_cast<uint64_t>(bytes), total);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

} // namespace safe_inplace::cuda
