// The CUDA kernels as kernels of the CPU device, and the record of their launches.
#include "cuda/simulate.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "backend.h"
#include "dispatch.h"

// Many instances, each run on a few thousand elements: compiling them well would take longer than all tests. They get
// a name of their own, or the linker could take one of these for the planning of real launches.
#pragma GCC optimize("O1")
#define cuda simulated_cuda
#include "cuda/dispatch.h"

namespace safe_inplace {

namespace {

std::mutex mutex;
Simulation current;
std::vector<SimulatedLaunch> launches;
std::optional<Backend> cpu;

class HostLauncher {
 public:
  HostLauncher() {
    const std::lock_guard<std::mutex> lock(mutex);
    simulation_ = current;
  }

  int64_t index_limit() const {
    return simulation_.index_limit;
  }

  int64_t target_blocks() const {
    return simulation_.target_blocks;
  }

  template <class Kernel>
  void elementwise(const typename Kernel::Params& params, int64_t blocks, const cuda::Trace& trace) {
    record(blocks, trace);
    each(blocks, [&](uint32_t block) {
      each(cuda::kThreads, [&](uint32_t thread) { Kernel::run(params, block, thread); });
    });
  }

  template <class Kernel>
  void reduce(const typename Kernel::Params& params, int64_t blocks, const cuda::Trace& trace) {
    record(blocks, trace);
    const auto shared = std::make_unique<typename Kernel::Shared>();
    each(blocks, [&](uint32_t block) {
      // NaN in every format: what is read must have been written.
      std::memset(static_cast<void*>(shared.get()), 0xff, sizeof *shared);
      each(cuda::kThreads, [&](uint32_t thread) { Kernel::accumulate(params, block, thread, *shared); });
      for (uint32_t distance = Kernel::first_step(params); distance > 0; distance /= 2) {
        each(cuda::kThreads, [&](uint32_t thread) { Kernel::step(params, block, thread, distance, *shared); });
      }
      each(cuda::kThreads, [&](uint32_t thread) { Kernel::write(params, block, thread, *shared); });
    });
  }

  struct Workspace {
    std::unique_ptr<char[]> memory;
    void* data() const {
      return memory.get();
    }
  };
  Workspace workspace(int64_t bytes) {
    Workspace workspace{std::make_unique<char[]>(size_t(bytes))};
    std::memset(workspace.data(), 0xff, size_t(bytes));
    return workspace;
  }

 private:
  template <class Function>
  void each(int64_t count, Function&& function) const {
    for (int64_t i = 0; i < count; ++i) {
      function(uint32_t(simulation_.reversed ? count - 1 - i : i));
    }
  }

  void record(int64_t blocks, const cuda::Trace& trace) {
    const std::lock_guard<std::mutex> lock(mutex);
    launches.push_back({trace.kernel, trace.vector, trace.index_bits, blocks, trace.workspace});
  }

  Simulation simulation_;
};

void forward(const ForwardPlan& plan) {
  HostLauncher launcher;
  with_dtype(plan.dtype, [&](auto tag) { cuda::dispatch_forward<decltype(tag)>(plan, launcher); });
}

void backward(const BackwardPlan& plan) {
  HostLauncher launcher;
  with_dtype(plan.dtype, [&](auto tag) { cuda::dispatch_backward<decltype(tag)>(plan, launcher); });
}

} // namespace

void start_simulation(const Simulation& simulation) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!cpu) {
    cpu = *backend_of(c10::DeviceType::CPU);
  }
  current = simulation;
  launches.clear();
  RegisterBackend({c10::DeviceType::CPU, forward, backward, cpu->digest});
}

void stop_simulation() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (cpu) {
    RegisterBackend{*cpu};
  }
}

std::vector<SimulatedLaunch> take_simulated_launches() {
  const std::lock_guard<std::mutex> lock(mutex);
  return std::exchange(launches, {});
}

} // namespace safe_inplace
