// The Python module of the simulator: a table of kernels for the CPU device, and what a test sets and reads.
#include "simulator.h"

#include <mutex>
#include <utility>
#include <vector>

#include <pybind11/pybind11.h>

#include "backend.h"
#include "cuda/accessor.h"
#include "dispatch.h"

namespace safe_inplace::simulator {

namespace {

std::mutex mutex;
Simulation current;
std::vector<Launch> launches;

} // namespace

Simulation current_simulation() {
  const std::lock_guard<std::mutex> lock(mutex);
  return current;
}

void record(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex);
  launches.push_back(launch);
}

namespace {

namespace py = pybind11;

// What the library calls in place of the CPU's kernels. Fingerprints are not its matter.
const Backend backend{
    c10::DeviceType::CPU,
    [](const ForwardPlan& plan) { with_dtype(plan.dtype, [&]<class T>(T) { forward<T>(plan); }); },
    [](const BackwardPlan& plan) { with_dtype(plan.dtype, [&]<class T>(T) { backward<T>(plan); }); },
    nullptr,
    /*takes_narrower=*/true,
};

// Returns what was set before.
py::dict configure(int64_t index_limit, int64_t small_limit, bool reversed, int64_t target_blocks) {
  const std::lock_guard<std::mutex> lock(mutex);
  const Simulation before = std::exchange(current, {reversed, index_limit, small_limit, target_blocks});
  py::dict entry;
  entry["index_limit"] = before.index_limit;
  entry["small_limit"] = before.small_limit;
  entry["reversed"] = before.reversed;
  entry["target_blocks"] = before.target_blocks;
  return entry;
}

// The launches since the last call.
py::list take_launches() {
  std::vector<Launch> taken;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    taken = std::exchange(launches, {});
  }
  py::list list;
  for (const Launch& launch : taken) {
    py::dict entry;
    entry["kernel"] = launch.trace.kernel;
    entry["vector"] = launch.trace.vector;
    entry["index_bits"] = launch.trace.index_bits;
    entry["blocks"] = launch.blocks;
    entry["workspace"] = launch.trace.workspace;
    list.append(entry);
  }
  return list;
}

// Counts loads of these bytes from now on.
void watch(uintptr_t begin, size_t bytes) {
  cuda::watched = {begin, std::vector<uint8_t>(bytes)};
}

// How often each of them was loaded since.
py::bytes take_loads() {
  const cuda::Watched watched = std::exchange(cuda::watched, {});
  return {reinterpret_cast<const char*>(watched.loads.data()), watched.loads.size()};
}

} // namespace

PYBIND11_MODULE(_simulator, m) {
  const Simulation device;
  m.attr("backend") = py::capsule(&backend, kBackendCapsule);
  m.def("configure", configure, py::arg("index_limit") = device.index_limit, py::arg("small_limit") = device.small_limit,
        py::arg("reversed") = device.reversed, py::arg("target_blocks") = device.target_blocks);
  m.def("launches", take_launches);
  m.def("watch", watch);
  m.def("take_loads", take_loads);
}

} // namespace safe_inplace::simulator
