// The numbers that launches are cut by: threads, vectors, loads in flight, and the memory of partial sums. None depends on the
// device that runs them, its size or its load, so the order of every summation, and with it each bit of a gradient, is
// a function of the plan alone.
#pragma once

#include "../numeric.h"

#if defined(__CUDA_ARCH__)
#define SI_UNROLL _Pragma("unroll")
#define SI_ROLLED _Pragma("unroll 1")
#else
#define SI_UNROLL
#define SI_ROLLED
#endif

namespace safe_inplace::cuda {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kLogThreads = 8;

// Element-wise launches give a thread more than one vector from this many blocks on, a few for each multiprocessor of a large
// device.
constexpr int64_t kElementwiseBlocks = 1024;

// So many vectors leave each thread with one, by the above: 8 MiB of a tensor. On an H100 the kernel for all layouts took 4.06 to
// 4.5 us from 64 bytes to 256 KiB where torch's took 3.7 to 3.9, and 0.91 to 0.95 of its rate at 4 MiB. Tests lower it.
constexpr int64_t kSmallLimit = 2 * kElementwiseBlocks * kThreads;

// Reductions aim at this many blocks. Each owns a tree, a prologue and partial sums, which fewer blocks have less of; but where
// memory alone is waited for, more of them hide more of its latency. On an H100 (132 multiprocessors, two blocks on each),
// microseconds with the adding up of partial sums, 64 MiB, with 2048, 1024 and 528 blocks:
//   sum of the gradient, float32     37.0  35.7  37.5 (256 MiB: 104.1  100.8  114.5)
//   sum of the gradient, bfloat16    36.2  34.1  31.8
//   gradient times tensor, float32   61.5  58.4  56.9
//   gradient times tensor, bfloat16  65.6  63.8  60.5
// so what converts or multiplies takes 528. 80 registers a thread instead of 128, for three blocks, gained where products with
// factors that are the same all along the loop were formed, which they are not any more; it cost 5 us in the second row.
constexpr int64_t kBlocksOfPlainSums = 1024;
constexpr int64_t kBlocksOfProducts = 528;

// Partial sums of one call may take this much memory, or 1/32 of the gradient they are taken from, whichever is more.
constexpr int64_t kWorkspaceFloor = int64_t(1) << 20;
constexpr int64_t kWorkspaceShare = 32;

// Indices at or above this take 64-bit arithmetic: FastDivisor<uint32_t> is exact below 2^31. Tests lower it.
constexpr int64_t kIndexLimit = int64_t(1) << 31;

// Elements of a 16-byte access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// A 16-bit element may stand beside float operands, and a float beside operands of 16 bits.
template <class T>
inline constexpr bool kMayMix = sizeof(T) == 2 || std::is_same_v<T, float>;

// Vectors that a thread has in flight. More would cost so many registers that fewer threads fit.
template <class T, bool Mixed, int V>
inline constexpr int kElementwiseUnroll = V == 1 && sizeof(T) <= 4   ? 4
                                          : Mixed || sizeof(T) == 16 ? 2
                                                                     : 4;

constexpr int kUnalignedUnroll = 2;

// What fits in 128 registers.
template <class T, bool Mixed, int V, class I, bool reads_both_operands>
inline constexpr int kReduceUnroll = V == 1                ? (sizeof(T) <= 8 && sizeof(I) == 4 ? 4 : 2)
                                     : !Mixed              ? 4
                                     : reads_both_operands ? 2
                                                           : 3;

constexpr int kPartialsUnroll = 8;

// Rounds of loads that a thread of a reduction adds up before it puts the sum aside; shorter runs would cost time.
constexpr int64_t kShortestRun = 8;

} // namespace safe_inplace::cuda
