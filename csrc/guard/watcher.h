// The kernels that see every operator of a thread before autograd does, and the hooks that see what it saves.
#pragma once

#include <Python.h>

namespace safe_inplace::guard {

// The saved-tensor hooks, as Python functions: pack takes a tensor and returns a Saved, unpack takes that.
PyObject* pack(PyObject*, PyObject* argument);
PyObject* unpack(PyObject*, PyObject* argument);

} // namespace safe_inplace::guard
