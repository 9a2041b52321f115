// The policy of a thread, and the calls of its methods.
#include "guard/policy.h"

#include <memory>
#include <string>

#include <ATen/ThreadLocalPythonObjects.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include "guard/tensor_parts.h"

namespace safe_inplace::guard {
namespace {

// Torch copies it for each node of a backward: a short name is copied without an allocation.
const std::string& key() {
  static const auto* key = new std::string("safe_inplace");
  return *key;
}

struct Names {
  PyObject* verify = PyUnicode_InternFromString("verify");
  PyObject* on_write = PyUnicode_InternFromString("_on_write");
  PyObject* on_version = PyUnicode_InternFromString("_on_version");
  PyObject* on_stale = PyUnicode_InternFromString("_on_stale");
  PyObject* on_exchange = PyUnicode_InternFromString("_on_exchange");
  PyObject* on_mismatch = PyUnicode_InternFromString("_on_mismatch");
  PyObject* compare = PyUnicode_InternFromString("_compare");
  PyObject* no_digest = PyUnicode_InternFromString("_no_digest");
  PyObject* parts = PyUnicode_InternFromString("_parts");
  PyObject* arrived_parts = PyUnicode_InternFromString("_arrived_parts");
  PyObject* written_parts = PyUnicode_InternFromString("_written_parts");
};

const Names& names() {
  static const Names* names = new Names();
  return *names;
}

template <class... Arguments>
Object call(PyObject* policy, PyObject* method, const Arguments&... arguments) {
  return checked(PyObject_CallMethodObjArgs(policy, method, arguments..., nullptr));
}

Object wrapped(const at::Tensor& tensor) {
  return checked(THPVariable_Wrap(tensor));
}

} // namespace

Policy Policy::current() {
  if (!at::impl::ThreadLocalPythonObjects::contains(key())) {
    return Policy(nullptr);
  }
  const auto& held = at::impl::ThreadLocalPythonObjects::get(key());
  return Policy(held != nullptr ? held->ptr(getPyInterpreter()) : nullptr);
}

void Policy::set_current(PyObject* policy) {
  // A thread that ended with an object here would wait for the GIL to let go of it, and the process dies where the interpreter
  // ends meanwhile. The entry itself cannot be erased before torch 2.13.
  at::impl::ThreadLocalPythonObjects::set(
      key(), policy != nullptr ? std::make_shared<c10::SafePyObject>(share(policy).release(), getPyInterpreter()) : nullptr);
}

bool Policy::verify() const {
  return truth(checked(PyObject_GetAttr(object_, names().verify)).get());
}

Object Policy::on_write(const std::vector<Object>& values, const c10::OperatorName& op, const Place& place, bool update) const {
  const auto list = checked(PyList_New(static_cast<Py_ssize_t>(values.size())));
  for (size_t i = 0; i < values.size(); ++i) {
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), share(values[i].get()).release());
  }
  return call(object_, names().on_write, list.get(), operator_name(op).get(), place_objects(place).get(),
              update ? Py_True : Py_False);
}

void Policy::on_version(const SavedValue* value) const {
  const auto& [op, place] = *value->beside;
  call(object_, names().on_version, value->object, operator_name(*op).get(), place_objects(*place).get());
}

void Policy::on_stale(const SavedValue* value) const {
  call(object_, names().on_stale, value->object);
}

Object Policy::on_exchange(const SavedValue* value, const at::Tensor& now) const {
  return call(object_, names().on_exchange, value->object, wrapped(now).get());
}

void Policy::on_mismatch(const SavedValue* value) const {
  call(object_, names().on_mismatch, value->object);
}

void Policy::compare(const SavedValue* value, const at::Tensor& then, const at::Tensor& now) const {
  call(object_, names().compare, value->object, wrapped(then).get(), wrapped(now).get());
}

void Policy::no_digest(const at::Tensor& tensor) const {
  call(object_, names().no_digest, checked(PyUnicode_FromString(tensor.device().str().c_str())).get());
}

Object Policy::parts(const at::Tensor& tensor, Which which) const {
  PyObject* method = which == Which::all       ? names().parts
                     : which == Which::arrived ? names().arrived_parts
                                               : names().written_parts;
  return call(object_, method, wrapped(tensor).get());
}

Object operator_name(const c10::OperatorName& name) {
  const auto text = c10::toString(name);
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

void each_plain(const at::Tensor& tensor, const Policy& policy, c10::function_ref<void(const at::Tensor&)> visit, Which which) {
  if (plain(tensor)) {
    visit(tensor);
  } else if (policy) {
    const auto parts = policy.parts(tensor, which);
    const auto sequence = checked(PySequence_Fast(parts.get(), "the parts of a tensor subclass"));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.get()); ++i) {
      visit(THPVariable_Unpack(PySequence_Fast_GET_ITEM(sequence.get(), i)));
    }
  }
}

void each_note(const std::vector<Object>& values, const Object& notes, c10::function_ref<void(const Object&, PyObject*)> visit) {
  if (notes.get() == Py_None) {
    return;
  }
  const auto sequence = checked(PySequence_Fast(notes.get(), "a note, or None, for each value that is overwritten"));
  TORCH_CHECK(PySequence_Fast_GET_SIZE(sequence.get()) == static_cast<Py_ssize_t>(values.size()));
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* note = PySequence_Fast_GET_ITEM(sequence.get(), static_cast<Py_ssize_t>(i));
    if (note != Py_None) {
      visit(values[i], note);
    }
  }
}

} // namespace safe_inplace::guard
