// The layout of an interpreter's frames, which no function of Python's own gives.
#include <Python.h>
#include <opcode.h>
#if PY_VERSION_HEX < 0x030E0000
#define Py_BUILD_CORE
extern "C" {
#include <internal/pycore_frame.h>
}
#undef Py_BUILD_CORE
#endif

#include "temporaries.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <utility>

namespace safe_inplace {

namespace {

#if PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED)

_PyInterpreterFrame* running_frame() {
#if PY_VERSION_HEX >= 0x030D0000
  return PyThreadState_Get()->current_frame;
#else
  return PyThreadState_Get()->cframe->current_frame;
#endif
}

PyCodeObject* code_of(const _PyInterpreterFrame* frame) {
#if PY_VERSION_HEX >= 0x030D0000
  return PyCode_Check(frame->f_executable) ? reinterpret_cast<PyCodeObject*>(frame->f_executable) : nullptr;
#else
  return frame->f_code;
#endif
}

// Of the instruction that runs: how many arguments a call takes off the stack. None where a tool monitors it: that is shown the
// first of them after the call.
int arguments_of(const _PyInterpreterFrame* frame) {
#if PY_VERSION_HEX >= 0x030D0000
  const _Py_CODEUNIT instruction = *frame->instr_ptr;
#else
  const _Py_CODEUNIT instruction = *frame->prev_instr;
#endif
#if PY_VERSION_HEX >= 0x030C0000
  return instruction.op.code < MIN_INSTRUMENTED_OPCODE ? instruction.op.arg : -1;
#else
  return _Py_OPARG(instruction);
#endif
}

// Below its arguments a call has pushed what it calls, and a null pointer where the receiver of a method would be.
#if PY_VERSION_HEX >= 0x030D0000
constexpr int kCallable = -2, kNoReceiver = -1;
#else
constexpr int kCallable = -1, kNoReceiver = -2;
#endif

// Whether `args` were put on the evaluation stack of the running frame by a plain call of this function. A tuple's items
// (f(*args), functools.partial, map), and what another function in C hands on, may be used after the call. A bound method and a
// partial hand on the stack itself, one reference of their own put below it, where an outer call of the same function may have
// pushed what it calls: then they are not as many as the instruction has.
bool on_evaluation_stack(PyObject* const* args, Py_ssize_t count, PyCFunction function) {
  _PyInterpreterFrame* const frame = running_frame();
  const PyCodeObject* const code = frame != nullptr ? code_of(frame) : nullptr;
  if (code == nullptr) {
    return false;
  }
  PyObject** const stack = frame->localsplus + code->co_nlocalsplus;
  if (args < stack + 2 || args >= stack + code->co_stacksize || count != arguments_of(frame)) {
    return false;
  }
  PyObject* const callable = args[kCallable];
  return args[kNoReceiver] == nullptr && callable != nullptr && PyCFunction_CheckExact(callable) &&
         PyCFunction_GET_FUNCTION(callable) == function;
}

#else

// Later interpreters borrow references, so that a count of one proves nothing.
bool on_evaluation_stack(PyObject* const*, Py_ssize_t, PyCFunction) {
  return false;
}

#endif

// And no finalizer sees the tensor when it goes.
bool is_last_reference(PyObject* tensor) {
  return Py_REFCNT(tensor) == 1 && *PyObject_GET_WEAKREFS_LISTPTR(tensor) == nullptr && Py_TYPE(tensor)->tp_finalize == nullptr;
}

// Unless a hook or a node has it now.
bool goes_with_the_call(PyObject* tensor) {
  return Py_REFCNT(tensor) == 1 && THPVariable_Unpack(tensor).use_count() == 1;
}

thread_local const Temporaries* unclaimed = nullptr;
std::atomic<bool> enabled = true;

} // namespace

Temporaries::Temporaries(PyObject* const* values, int count, PyObject* const* args, Py_ssize_t given, PyCFunction function) {
  for (int i = 0; i < count && enabled.load(std::memory_order_relaxed); ++i) {
    PyObject* const value = values[i];
    // The count comes first: it is what most arguments fail.
    if (Py_REFCNT(value) == 1 && THPVariable_CheckExact(value) && is_last_reference(value) && PyObject_GC_IsTracked(value) &&
        on_evaluation_stack(args, given, function)) {
      values_[i] = value;
      tensors_[i] = THPVariable_Unpack(value).unsafeGetTensorImpl();
      PyObject_GC_UnTrack(value);
      unclaimed = this;
    }
  }
}

Temporaries::~Temporaries() {
  unclaimed = nullptr;
  for (PyObject* const value : values_) {
    if (value != nullptr && !(gone_ && goes_with_the_call(value))) {
      PyObject_GC_Track(value);
    }
  }
}

bool Temporaries::look(bool wanted) {
  return enabled.exchange(wanted);
}

bool is_forgotten_by_python(const at::Tensor& tensor) {
  PyObject* const object = tensor.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
  return object == nullptr || (THPVariable_CheckExact(object) && is_last_reference(object));
}

bool hide_from_python(const at::Tensor& tensor) {
  PyObject* const object = tensor.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
  if (object == nullptr) {
    return true;
  }
  const pybind11::gil_scoped_acquire lock;
  if (!is_forgotten_by_python(tensor)) {
    return false;
  }
  PyObject_GC_UnTrack(object);
  return true;
}

const Temporaries* Temporaries::claim() {
  return std::exchange(unclaimed, nullptr);
}

bool Temporaries::contain(const at::Tensor& tensor) const {
  for (int i = 0; i < kMost; ++i) {
    if (values_[i] != nullptr && tensors_[i] == tensor.unsafeGetTensorImpl()) {
      return is_last_reference(values_[i]);
    }
  }
  return false;
}

} // namespace safe_inplace
