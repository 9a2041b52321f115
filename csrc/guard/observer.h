// Who sees what a thread runs, saves and asks for in backward. Guard is one; another may sit beside it.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/FunctionRef.h>

#include "guard/arguments.h"
#include "guard/operator_facts.h"
#include "guard/saved_value.h"

namespace safe_inplace::guard {

struct Call {
  const OperatorFacts& facts;
  c10::ArrayRef<Argument> arguments;
  const torch::jit::Stack* results = nullptr; // once the operator has run; only where somebody is beside guard
};

class Observer {
 public:
  virtual ~Observer() = default;

  // An operator: runs it, by `run`, once. May be called without the GIL.
  virtual void around(Call& call, c10::function_ref<void()> run) = 0;

  // Autograd saves a value; with the GIL.
  virtual void saves(SavedValue& value) = 0;

  // Backward, or somebody who looks at a node, asks for a value: what it is given, which may be something else; with the GIL.
  virtual at::Tensor asked_for(SavedValue& value, const at::Tensor& given) = 0;
};

} // namespace safe_inplace::guard
