// The operators that are running in this thread, innermost first, and what they are about to write.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/operator_name.h>

#include "extent.h"
#include "guard/place.h"
#include "guard/python_object.h"

namespace safe_inplace::guard {

// What an operator that writes is about to do. Taken before it runs: a kernel that takes an argument by value moves it away.
struct Writing {
  struct Target {
    c10::VariableVersion counter;
    Extent extent;
    uint32_t version; // before the write
  };

  std::vector<Target> targets; // what it is about to overwrite
  std::vector<Extent> filled; // ... as one more result
  std::vector<Extent> statistics; // what it saves and its backward does not read
  std::vector<Object> unfinished; // saved values that it has yet to fill, and that are to be fingerprinted then
};

// An operator that is running, and what it runs within.
struct Running {
  const c10::OperatorName* op;
  Writing* writing; // null where it writes nothing
  Running* outer;
  bool placed = false; // its place in the program was looked up
};

extern constinit thread_local Running* running;

class RunningScope {
 public:
  explicit RunningScope(const c10::OperatorName* op, Writing* writing = nullptr) : entry_{op, writing, running} {
    running = &entry_;
  }
  ~RunningScope() { running = entry_.outer; }
  RunningScope(const RunningScope&) = delete;
  RunningScope& operator=(const RunningScope&) = delete;

 private:
  Running entry_;
};

// Of whatever runs now: looked up once for all that an operator saves.
SharedPlace current_place();

} // namespace safe_inplace::guard
