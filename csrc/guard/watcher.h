// The kernels that see every operator of a thread before autograd does, and the hooks that see what it saves.
#pragma once

#include <Python.h>

#include "guard/observer.h"

namespace safe_inplace::guard {

// From here on `observer` sees what guard sees, every operator with its stack: the common ones are boxed again, so this is
// called before a program runs. Guard's saved-tensor hooks and key are what brings the events: `enter` without a policy.
void watch_beside_guard(Observer* observer);

// The saved-tensor hooks, as Python functions: pack takes a tensor and returns a Saved, unpack takes that.
PyObject* pack(PyObject*, PyObject* argument);
PyObject* unpack(PyObject*, PyObject* argument);

} // namespace safe_inplace::guard
