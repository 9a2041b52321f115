// Runs the CUDA kernels' own code on the host, block by block and thread by thread, in place of the CPU's kernels: the
// choice of path, index arithmetic, tails, alignment and order of summation are the device's. For tests.
#pragma once

#include <cstdint>
#include <vector>

namespace safe_inplace {

struct SimulatedLaunch {
  const char* kernel;
  int vector; // elements per access
  int index_bits;
  int64_t blocks;
  int64_t workspace; // bytes of partial sums
};

struct Simulation {
  bool reversed = false; // blocks and threads last to first: what is right must not depend on it
  int64_t index_limit = int64_t(1) << 31; // from which on indices take 64 bits
  int64_t target_blocks = 2048; // of a reduction: with fewer, threads sum more
};

// Replaces the CPU's kernels until stop_simulation.
void start_simulation(const Simulation& simulation);
void stop_simulation();

// The launches since the last call.
std::vector<SimulatedLaunch> take_simulated_launches();

} // namespace safe_inplace
