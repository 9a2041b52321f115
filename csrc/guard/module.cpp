// The functions guard_* of the extension.
#include "guard/module.h"

#include <algorithm>
#include <utility>
#include <vector>

#include <pthread.h>

#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include "frames.h"
#include "guard/dispatch_key.h"
#include "guard/ledger.h"
#include "guard/operators.h"
#include "guard/policy.h"
#include "guard/saved_type.h"
#include "guard/saving.h"
#include "guard/watcher.h"
#include "guard/writes.h"

namespace safe_inplace::guard {
namespace {

PyObject* hooks[2] = {nullptr, nullptr};

bool top_hooks_are_ours() {
  return at::SavedTensorDefaultHooks::get_tls_state().stack.top().first.ptr(getPyInterpreter()) == hooks[0];
}

// The thread's watch begins, by this policy.
PyObject* enter(PyObject*, PyObject* policy) {
  HANDLE_TH_ERRORS
  at::SavedTensorDefaultHooks::lazy_initialize();
  at::SavedTensorDefaultHooks::push_hooks(c10::SafePyObject(share(hooks[0]).release(), getPyInterpreter()),
                                          c10::SafePyObject(share(hooks[1]).release(), getPyInterpreter()));
  Policy::set_current(policy);
  ++entered;
  c10::impl::tls_set_dispatch_key_included(kKey, true);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// One guard less, that with `inside` guards inside of it; `policy` decides from here, None where the watch ends.
PyObject* exit(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject* policy = nullptr;
  int inside = 0;
  if (!PyArg_ParseTuple(arguments, "Oi", &policy, &inside)) {
    return nullptr;
  }
  // Hooks that were pushed inside the guard and outlive it (an ExitStack closed in another order) stay as they are.
  std::vector<std::pair<c10::SafePyObject, c10::SafePyObject>> others;
  const auto& stack = at::SavedTensorDefaultHooks::get_tls_state().stack;
  while (!stack.empty() && (!top_hooks_are_ours() || inside-- > 0)) {
    others.push_back(at::SavedTensorDefaultHooks::pop_hooks());
  }
  if (!stack.empty()) {
    at::SavedTensorDefaultHooks::pop_hooks();
  }
  for (; !others.empty(); others.pop_back()) {
    at::SavedTensorDefaultHooks::push_hooks(std::move(others.back().first), std::move(others.back().second));
  }
  --entered;
  if (policy == Py_None) {
    c10::impl::tls_set_dispatch_key_included(kKey, false);
    policy = nullptr;
  }
  Policy::set_current(policy);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* current(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  const auto policy = Policy::current();
  return Py_NewRef(policy ? policy.get() : Py_None);
  END_HANDLE_TH_ERRORS
}

PyObject* live(PyObject*, PyObject*) {
  return PyLong_FromSize_t(ledger().size.load(std::memory_order_relaxed));
}

PyObject* whose_code(PyObject*, PyObject* arguments) {
  PyObject* predicate = nullptr;
  PyObject* call = nullptr;
  if (!PyArg_ParseTuple(arguments, "OO", &predicate, &call)) {
    return nullptr;
  }
  set_whose_code(predicate, call);
  Py_RETURN_NONE;
}

PyObject* parameter_type(PyObject*, PyObject* type) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyType_Check(type), "guard_parameter_type takes a class");
  set_parameter_type(reinterpret_cast<PyTypeObject*>(Py_NewRef(type)));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// A storage, by the address of its StorageImpl, has another size.
PyObject* resized(PyObject*, PyObject* address) {
  HANDLE_TH_ERRORS
  void* storage = PyLong_AsVoidPtr(address);
  if (storage == nullptr && PyErr_Occurred() != nullptr) {
    return nullptr;
  }
  ledger().resized(static_cast<const c10::StorageImpl*>(storage));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// A compiled region is about to write `tensors`; `raise_versions` is called with them.
PyObject* compiled_writes(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "guard_compiled_writes takes the tensors and a function");
  static const auto* name = kept_for_ever(c10::OperatorName("torch::compile", ""));
  const auto sequence = checked(PySequence_Fast(arguments[0], "guard_compiled_writes takes a sequence of tensors"));
  std::vector<at::Tensor> tensors;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.get()); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(sequence.get(), i);
    TORCH_CHECK_TYPE(THPVariable_Check(item), "guard_compiled_writes takes tensors");
    tensors.push_back(THPVariable_Unpack(item));
  }
  judge_and_run(name, tensors, [&] { checked(PyObject_CallOneArg(arguments[1], sequence.get())); });
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* share_memory(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2 && THPVariable_Check(arguments[0]) && THPVariable_Check(arguments[1]),
                   "guard_overlap takes two tensors");
  const auto a = extent_of(THPVariable_Unpack(arguments[0]));
  const auto b = extent_of(THPVariable_Unpack(arguments[1]));
  return PyBool_FromLong(a && b && overlap(*a, *b));
  END_HANDLE_TH_ERRORS
}

// [(tensor, is it written?)]: the tensors that the operator which is being judged was called with.
PyObject* arguments(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  auto list = checked(PyList_New(0));
  if (const auto* judging = Judging::current) {
    const auto& written = judging->facts.written;
    for (size_t i = 0; i < judging->arguments.size(); ++i) {
      PyObject* is_written = std::find(written.begin(), written.end(), i) != written.end() ? Py_True : Py_False;
      each_tensor(judging->arguments[i], [&](const at::Tensor& tensor) {
        const auto wrapped = checked(THPVariable_Wrap(tensor));
        const auto pair = checked(PyTuple_Pack(2, wrapped.get(), is_written));
        if (PyList_Append(list.get(), pair.get()) != 0) {
          rethrow_python();
        }
      });
    }
  }
  return list.release();
  END_HANDLE_TH_ERRORS
}

// How many hold the tensor's storage, beside the saved values: itself, its base, views and other aliases of it.
PyObject* holders(PyObject*, PyObject* argument) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(THPVariable_Check(argument), "guard_holders takes a tensor");
  const auto& tensor = THPVariable_Unpack(argument);
  if (!tensor.has_storage()) {
    return PyLong_FromLong(-1);
  }
  const auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto count = static_cast<long>(tensor.storage().use_count());
  const auto found = ledger().by_storage.find(storage);
  if (found != ledger().by_storage.end()) {
    for (const auto* entry : found->second) {
      count -= entry->value.has_storage() && entry->value.storage().unsafeGetStorageImpl() == storage;
    }
  }
  return PyLong_FromLong(count);
  END_HANDLE_TH_ERRORS
}

// How many references to the tensor the running frames borrow, which its count leaves out.
PyObject* borrowed(PyObject*, PyObject* argument) {
  return PyLong_FromSsize_t(borrowed_references(argument));
}

PyMethodDef functions[] = {
    {"guard_enter", enter, METH_O, nullptr},
    {"guard_exit", exit, METH_VARARGS, nullptr},
    {"guard_current", current, METH_NOARGS, nullptr},
    {"guard_live", live, METH_NOARGS, nullptr},
    {"guard_pack", pack, METH_O, nullptr},
    {"guard_unpack", unpack, METH_O, nullptr},
    {"guard_arguments", arguments, METH_NOARGS, nullptr},
    {"guard_holders", holders, METH_O, nullptr},
    {"guard_borrowed", borrowed, METH_O, nullptr},
    {"guard_whose_code", whose_code, METH_VARARGS, nullptr},
    {"guard_parameter_type", parameter_type, METH_O, nullptr},
    {"guard_resized", resized, METH_O, nullptr},
    {"guard_compiled_writes", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(compiled_writes)), METH_FASTCALL, nullptr},
    {"guard_overlap", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(share_memory)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

} // namespace

bool bind(PyObject* module) {
  if (!prepare_places()) {
    return false;
  }
  listen_for_operators_that_leave();
  see_common_operators_unboxed();
  // A forked child has this thread alone: a lock that another one held would stay locked for ever.
  pthread_atfork([] { ledger().mutex.lock(); }, [] { ledger().mutex.unlock(); }, [] { ledger().mutex.unlock(); });
  if (!add_saved_type(module) || PyModule_AddFunctions(module, functions) < 0) {
    return false;
  }
  hooks[0] = PyObject_GetAttrString(module, "guard_pack");
  hooks[1] = PyObject_GetAttrString(module, "guard_unpack");
  return hooks[0] != nullptr && hooks[1] != nullptr;
}

} // namespace safe_inplace::guard
