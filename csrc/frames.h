// What the frames of running Python code hold, by their layout: no function of Python's own tells.
#pragma once

#include <Python.h>

namespace safe_inplace {

// Whether a plain call of `function` from the running frame put `value` on the evaluation stack, as one of its `given` arguments at
// `args`, with a reference of its own: then that reference goes with the call. A tuple's items (f(*args), functools.partial, map), and
// what another function in C hands on, may be used after it.
bool goes_with_a_plain_call(PyObject* value, PyObject* const* args, Py_ssize_t given, PyCFunction function);

// How many places in this thread's running frames hold `object` without a reference of their own, since another place there has one:
// what its count does not tell. -1 where that cannot be told.
Py_ssize_t borrowed_references(PyObject* object);

} // namespace safe_inplace
