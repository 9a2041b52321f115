// The Python type of a saved value.
#pragma once

#include "guard/python_object.h"

namespace safe_inplace::guard {

// False with a Python error set where that fails.
bool add_saved_type(PyObject* module);

bool is_saved_object(PyObject* object);

// Of a value that nothing is known of but the policy that it is saved under.
Object new_saved_object(PyObject* policy);

} // namespace safe_inplace::guard
