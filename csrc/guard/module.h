// The part of guard that runs at every operator and every save: it knows what is saved and sees what is written. What
// a hazard means is decided in Python, which is called only when there is one.
#pragma once

#include <Python.h>

namespace safe_inplace::guard {

// Adds the type Saved and the functions guard_* to the module. False with a Python error set where that fails.
bool bind(PyObject* module);

} // namespace safe_inplace::guard
