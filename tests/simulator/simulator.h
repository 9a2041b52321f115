// What the files of the simulator share. It runs the CUDA kernels' own code on the host, block by block and thread by thread:
// the choice of path, index arithmetic, tails, alignment and order of summation are the device's.
#pragma once

#include "cuda/params.h"

namespace safe_inplace::simulator {

struct Simulation {
  bool reversed = false; // blocks and threads last to first: what is right must not depend on it
  int64_t index_limit = cuda::kIndexLimit; // from which on indices take 64 bits
  int64_t small_limit = cuda::kSmallLimit; // from which on vectors are too many for the short kernel
  int64_t target_blocks = 0; // of a reduction, instead of what its kind prefers: with fewer, threads sum more
};

struct Launch {
  cuda::Trace trace;
  int64_t blocks;
};

Simulation current_simulation();
void record(const Launch& launch);

// The kernels of a dtype. Each is compiled in a file of its own, so that a build uses its processors.
template <class T>
void forward(const ForwardPlan& plan);

template <class T>
void backward(const BackwardPlan& plan);

} // namespace safe_inplace::simulator
