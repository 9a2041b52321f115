// What an operator writes: judged before it runs, and looked at once more after it.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>

#include "guard/arguments.h"
#include "guard/operator_facts.h"

namespace safe_inplace::guard {

// Runs an operator that writes, once nothing is against it.
void judge_and_run(const OperatorFacts& facts, c10::ArrayRef<Argument> arguments, c10::function_ref<void()> run);

// The same for what is no operator, and is about to write these.
void judge_and_run(const c10::OperatorName* name, const std::vector<at::Tensor>& written, c10::function_ref<void()> run);

// The arguments of the operator that is being judged, for the policy to look at.
class Judging {
 public:
  Judging(const c10::ArrayRef<Argument>& arguments, const OperatorFacts& facts)
      : arguments(arguments), facts(facts), outer_(current) {
    current = this;
  }
  ~Judging() { current = outer_; }
  Judging(const Judging&) = delete;
  Judging& operator=(const Judging&) = delete;

  static thread_local const Judging* current;
  const c10::ArrayRef<Argument>& arguments;
  const OperatorFacts& facts;

 private:
  const Judging* outer_;
};

// Guards that this thread has entered and not left.
extern constinit thread_local int entered;

} // namespace safe_inplace::guard
