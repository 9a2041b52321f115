// Any operator, boxed; the common ones are in operators.cpp.
#include "guard/watcher.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include "guard/arguments.h"
#include "guard/dispatch_key.h"
#include "guard/guard.h"
#include "guard/operator_facts.h"
#include "guard/policy.h"
#include "guard/running.h"
#include "guard/saved_type.h"
#include "guard/saving.h"
#include "guard/writes.h"
#include "ownership.h"

namespace safe_inplace::guard {
namespace {

void watch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& known = facts_of(op);
  if (!known->writes) {
    const RunningScope scope(known->name);
    op.redispatchBoxed(below(keys), stack);
    return;
  }
  const auto facts = known;
  c10::SmallVector<Argument, 16> arguments;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    arguments.emplace_back(value);
  }
  judge_and_run(*facts, arguments, [&] { op.redispatchBoxed(below(keys), stack); });
}

} // namespace

// Without HANDLE_TH_ERRORS, here and in unpack: it would gather warnings, which whatever runs this does as well.
PyObject* pack(PyObject*, PyObject* argument) {
  try {
    TORCH_CHECK_TYPE(THPVariable_Check(argument), "guard_pack takes a tensor");
    auto object = new_saved_object(Policy::current().get());
    auto& value = *saved(object.get());
    describe(value, THPVariable_Unpack(argument), argument);
    saves(value);
    return object.release();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

PyObject* unpack(PyObject*, PyObject* argument) {
  try {
    TORCH_CHECK_TYPE(is_saved_object(argument), "guard_unpack takes what guard_pack returned");
    auto& value = *saved(argument);
    auto given = asked_for(value);
    if (const auto node = torch::autograd::get_current_node(); node != nullptr && !keep_out_of_leaves(given, *node)) {
      given = given.clone();
    }
    return THPVariable_Wrap(given);
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&watch>());
}

} // namespace safe_inplace::guard
