// What guard asks of Python: the events that need a decision, and what only Python knows of a tensor. The protocol is
// safe_inplace/_guard/policy.py; a policy's methods are named here and there, and nowhere else.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/operator_name.h>
#include <c10/util/FunctionRef.h>

#include "guard/place.h"
#include "guard/python_object.h"
#include "guard/saved_value.h"

namespace safe_inplace::guard {

// Which of the plain tensors that a subclass is made of: all, those whose values have arrived, those that a write changes.
enum class Which { all, arrived, written };

// Borrowed, and used with the GIL held.
class Policy {
 public:
  explicit Policy(PyObject* object) : object_(object) {}

  // That of this thread's innermost guard, none outside of all guards. Torch hands it on to the threads of a backward.
  static Policy current();
  static void set_current(PyObject* policy); // nullptr: none

  explicit operator bool() const { return object_ != nullptr; }
  PyObject* get() const { return object_; }

  bool verify() const;
  // For each value a note, or None where the write is of no interest any more; None for all where none is.
  Object on_write(const std::vector<Object>& values, const c10::OperatorName& op, const Place& place, bool update) const;
  void on_version(const SavedValue* value) const;
  void on_stale(const SavedValue* value) const;
  Object on_exchange(const SavedValue* value, const at::Tensor& now) const;
  void on_mismatch(const SavedValue* value) const;
  void compare(const SavedValue* value, const at::Tensor& then, const at::Tensor& now) const;
  void no_digest(const at::Tensor& tensor) const;
  Object parts(const at::Tensor& tensor, Which which) const;

 private:
  PyObject* object_;
};

Object operator_name(const c10::OperatorName& name);

// The plain tensors that a tensor is made of: itself, or the parts of a subclass.
void each_plain(const at::Tensor& tensor, const Policy& policy, c10::function_ref<void(const at::Tensor&)> visit,
                Which which = Which::all);

// Calls visit(value, note) for each value that the policy answered with a note.
void each_note(const std::vector<Object>& values, const Object& notes, c10::function_ref<void(const Object&, PyObject*)> visit);

} // namespace safe_inplace::guard
