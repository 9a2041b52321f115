// Owned Python objects, and Python exceptions as C++ ones.
#pragma once

#include <Python.h>

#include <memory>

namespace safe_inplace::guard {

struct Decref {
  void operator()(PyObject* object) const { Py_XDECREF(object); }
};
using Object = std::unique_ptr<PyObject, Decref>;

inline Object share(PyObject* object) {
  Py_XINCREF(object);
  return Object(object);
}

// Keeps the Python exception inside the C++ one: on its way to the interpreter it may pass code without the GIL.
[[noreturn]] void rethrow_python();

inline bool truth(PyObject* object) {
  const int answer = PyObject_IsTrue(object);
  if (answer < 0) {
    rethrow_python();
  }
  return answer == 1;
}

inline Object checked(PyObject* owned) {
  if (owned == nullptr) {
    rethrow_python();
  }
  return Object(owned);
}

} // namespace safe_inplace::guard
