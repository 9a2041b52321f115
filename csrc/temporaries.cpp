#include "temporaries.h"

#include "frames.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <utility>

namespace safe_inplace {

namespace {

// Nor does a finalizer see the tensor when it goes.
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
        goes_with_a_plain_call(value, args, given, function)) {
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
