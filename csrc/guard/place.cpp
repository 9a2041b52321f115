// The frames of Python, walked at every save: so an answer about a code object is kept in it.
//
// The layout of a frame, whose variables Python 3.11 has no function for.
#include <Python.h>
#if PY_VERSION_HEX < 0x030C0000
#define Py_BUILD_CORE
extern "C" {
#include <internal/pycore_frame.h>
}
#undef Py_BUILD_CORE
#endif

#include "guard/place.h"

#include <cstdint>
#include <utility>

namespace safe_inplace::guard {

namespace {

// The frame's first variable, in a method its `self`.
Object first_argument(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030C0000
  static PyObject* const name = PyUnicode_InternFromString("self");
  Object value(PyFrame_GetVar(frame, name));
  if (!value) {
    PyErr_Clear();
  }
  return value;
#else
  // Asking for the variables by the interface that Python 3.11 has would leave a copy of them in the frame.
  PyObject* value = frame->f_frame->localsplus[0];
  return share(value != nullptr && PyCell_Check(value) ? PyCell_GET(value) : value);
#endif
}

#if PY_VERSION_HEX >= 0x030C0000
constexpr auto request_code_extra = PyUnstable_Eval_RequestCodeExtraIndex;
constexpr auto get_code_extra = PyUnstable_Code_GetExtra;
constexpr auto set_code_extra = PyUnstable_Code_SetExtra;
#else
constexpr auto request_code_extra = _PyEval_RequestCodeExtraIndex;
constexpr auto get_code_extra = _PyCode_GetExtra;
constexpr auto set_code_extra = _PyCode_SetExtra;
#endif

PyObject* whose_code = nullptr; // Python: code object -> 0 a library's, 1 an installed package's, 2 the user's own
PyObject* module_call = nullptr; // the code object of Module.__call__

// The answer is kept in the code object itself: as long as that lives, and no longer.
Py_ssize_t answer_slot = -1;

enum class Owner : uintptr_t { unknown = 0, library, package, user };

Owner owner_of(PyObject* code) {
  void* answer = nullptr;
  if (get_code_extra(code, answer_slot, &answer) != 0) {
    rethrow_python();
  }
  if (static_cast<Owner>(reinterpret_cast<uintptr_t>(answer)) == Owner::unknown) {
    const auto owner = checked(PyObject_CallOneArg(whose_code, code));
    const long number = PyLong_AsLong(owner.get());
    if (number == -1 && PyErr_Occurred()) {
      rethrow_python();
    }
    answer = reinterpret_cast<void*>(static_cast<uintptr_t>(number + 1));
    if (set_code_extra(code, answer_slot, answer) != 0) {
      rethrow_python();
    }
  }
  return static_cast<Owner>(reinterpret_cast<uintptr_t>(answer));
}

// The module that a frame of Module.__call__ calls.
Object module_of(PyFrameObject* frame) {
  const auto self = first_argument(frame);
  Object reference(self ? PyWeakref_NewRef(self.get(), nullptr) : nullptr);
  if (!reference) {
    PyErr_Clear(); // deleted, or not to be referred to: a report without a module
  }
  return reference;
}

} // namespace

Place find_place() {
  Place place;
  bool found = false;
  bool called = false; // from an installed package: its caller is wanted, too
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  while (frame != nullptr) {
    auto code = Object(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
    if (!place.module && code.get() == module_call) {
      place.module = module_of(frame);
    }
    const auto owner = found && !called ? Owner::unknown : owner_of(code.get()); // asked for where it matters
    if (!found) {
      place.instruction = PyFrame_GetLasti(frame);
      place.code = std::move(code);
      found = owner != Owner::library;
      called = owner == Owner::package;
    } else if (called && owner == Owner::user) {
      place.caller_instruction = PyFrame_GetLasti(frame);
      place.caller = std::move(code);
      called = false;
    }
    PyFrameObject* back = found && !called && place.module ? nullptr : PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = back;
  }
  return place;
}

Object place_objects(const Place& place) {
  const auto object = [](const Object& o) { return o ? o.get() : Py_None; };
  return checked(Py_BuildValue("(OiOOi)", object(place.code), place.instruction, object(place.module), object(place.caller),
                               place.caller_instruction));
}

void set_whose_code(PyObject* predicate, PyObject* call) {
  Py_XSETREF(whose_code, Py_NewRef(predicate));
  Py_XSETREF(module_call, Py_NewRef(call));
}

bool prepare_places() {
  answer_slot = request_code_extra(nullptr);
  if (answer_slot < 0) {
    PyErr_SetString(PyExc_ImportError, "safe_inplace: every slot for extra data of code objects is taken");
  }
  return answer_slot >= 0;
}

} // namespace safe_inplace::guard
