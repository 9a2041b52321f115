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

// Launches are cut for a device that holds about this many blocks, a few for each multiprocessor of a large one.
constexpr int64_t kTargetBlocks = 2048;

// Derivative sums may take this much memory, or 1/32 of the gradient they are taken from, whichever is more.
constexpr int64_t kWorkspaceFloor = int64_t(1) << 20;
constexpr int64_t kWorkspaceShare = 32;

// Indices at or above this take 64-bit arithmetic: FastDivisor<uint32_t> is exact below 2^31. Tests lower it.
constexpr int64_t kIndexLimit = int64_t(1) << 31;

// Elements of a 16-byte access.
template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// A 16-bit element may stand beside float operands.
template <class T>
inline constexpr bool kMayMix = sizeof(T) == 2;

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
