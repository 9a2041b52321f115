// Launches on the host, and the entry points of a dtype, defined; a .cpp file for each dtype instantiates them.
#pragma once

#include <cstring>
#include <memory>

#include "cuda/dispatch.h"
#include "simulator.h"

namespace safe_inplace::simulator {

class HostLauncher {
 public:
  int64_t index_limit() const { return simulation_.index_limit; }

  int64_t small_limit() const { return simulation_.small_limit; }

  int64_t target_blocks(int64_t preferred) const { return simulation_.target_blocks > 0 ? simulation_.target_blocks : preferred; }

  template <class Kernel>
  void elementwise(const typename Kernel::Params& params, int64_t blocks, const cuda::Trace& trace) {
    record({trace, blocks});
    each(blocks, [&](uint32_t block) { each(cuda::kThreads, [&](uint32_t thread) { Kernel::run(params, block, thread); }); });
  }

  template <class Kernel>
  void reduce(const typename Kernel::Params& params, int64_t blocks, const cuda::Trace& trace) {
    record({trace, blocks});
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
    void* data() const { return memory.get(); }
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

  const Simulation simulation_ = current_simulation();
};

template <class T>
void forward(const ForwardPlan& plan) {
  HostLauncher launcher;
  cuda::dispatch_forward<T>(plan, launcher);
}

template <class T>
void backward(const BackwardPlan& plan) {
  HostLauncher launcher;
  cuda::dispatch_backward<T>(plan, launcher);
}

} // namespace safe_inplace::simulator
