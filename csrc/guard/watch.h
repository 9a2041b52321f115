// How guard stands around an operator that runs: what it writes is judged before, and once more after. Read by the boxed
// kernel that sees any operator, and by those of operators.cpp, which see the common ones without boxing their arguments.
#pragma once

#include <cstddef>
#include <optional>
#include <vector>

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>

namespace safe_inplace {

// Writes are seen by a kernel for a dispatch key that torch keeps free and that a thread can switch on. A TorchDispatchMode
// sees the same at 13 us per operator (a step that is all overhead: 3.1x).
// The key comes before autograd: a hazard is refused before the operator has done anything at all.
constexpr auto kKey = c10::DispatchKey::TESTING_ONLY_GenericMode;

inline c10::DispatchKeySet below(c10::DispatchKeySet keys) {
  return keys & c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kKey);
}

struct OperatorFacts {
  const c10::OperatorName* name; // kept for ever: an operator that is gone is still named
  std::vector<size_t> written; // positions of the arguments whose memory is written
  std::vector<size_t> filled; // written as one more result: where it is saved, backward wants it as it is after the operator
  std::vector<size_t> relaid; // whose version rises though no byte of them changes: t_, resize_, set_
  std::vector<size_t> unannotated; // written by the kernels, though the schema does not say so
  std::vector<size_t> unread; // saved for a second derivative that does not read it: batch norm's statistics, in its backward
  std::optional<size_t> only_if; // ... the last two when this boolean argument is true
  bool writes; // any of these

  explicit OperatorFacts(const c10::OperatorHandle& op);
};

// An argument, where it lies: the tensors in it, or whether it is true.
struct Argument {
  c10::ArrayRef<at::Tensor> tensors;
  const c10::IValue* boxed = nullptr;
  bool flag = false;

  Argument(const c10::IValue& value) : boxed(&value) {}
  Argument(const at::Tensor& tensor) : tensors(tensor) {}
  Argument(const std::optional<at::Tensor>& tensor) {
    if (tensor) {
      tensors = *tensor;
    }
  }
  Argument(at::TensorList list) : tensors(list) {}
  Argument(bool flag) : flag(flag) {}
  template <class Other>
  explicit Argument(const Other&) {} // a number, an option

  bool is_true() const {
    return boxed != nullptr ? boxed->toBool() : flag;
  }
};

struct Writing;

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
  ~RunningScope() {
    running = entry_.outer;
  }
  RunningScope(const RunningScope&) = delete;
  RunningScope& operator=(const RunningScope&) = delete;

 private:
  Running entry_;
};

// Judges what the operator writes, runs it, and looks at what has become of what lies beside.
void watch_write(const OperatorFacts& facts, c10::ArrayRef<Argument> arguments, c10::function_ref<void()> run);

} // namespace safe_inplace
