#include <Python.h>
#include <opcode.h>
#define Py_BUILD_CORE
extern "C" {
#if PY_VERSION_HEX >= 0x030E0000
#include <internal/pycore_interpframe_structs.h>
#else
#include <internal/pycore_frame.h>
#endif
#if PY_VERSION_HEX >= 0x030C0000
#include <internal/pycore_instruments.h>
#endif
}
#undef Py_BUILD_CORE

#include "frames.h"

#include <cstdint>

namespace safe_inplace {

#ifdef Py_GIL_DISABLED

// A count is two counts there, and what a frame holds may be in neither.
bool goes_with_a_plain_call(PyObject*, PyObject* const*, Py_ssize_t, PyCFunction) {
  return false;
}

Py_ssize_t borrowed_references(PyObject*) {
  return -1;
}

#else

namespace {

_PyInterpreterFrame* running_frame() {
#if PY_VERSION_HEX >= 0x030D0000
  return PyThreadState_Get()->current_frame;
#else
  return PyThreadState_Get()->cframe->current_frame;
#endif
}

#if PY_VERSION_HEX >= 0x030E0000
// What a place of a frame holds: the lowest bits say whether it is borrowed, or no object at all.
constexpr uintptr_t kTags = 3, kBorrowed = 1;

PyObject* object_at(_PyStackRef place) {
  return reinterpret_cast<PyObject*>(place.bits & ~kTags);
}

bool owns(_PyStackRef place, PyObject* object) {
  return place.bits == reinterpret_cast<uintptr_t>(object);
}
#endif

// None where the frame is the interpreter's own.
PyCodeObject* code_of(const _PyInterpreterFrame* frame) {
#if PY_VERSION_HEX >= 0x030D0000
#if PY_VERSION_HEX >= 0x030E0000
  PyObject* const executable = object_at(frame->f_executable);
#else
  PyObject* const executable = frame->f_executable;
#endif
  return executable != nullptr && PyCode_Check(executable) ? reinterpret_cast<PyCodeObject*>(executable) : nullptr;
#else
  return frame->f_code;
#endif
}

// Of the instruction that runs: how many arguments a call takes off the stack. None where another stands in its place.
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

// Whether a tool hears of the calls in this code. It is shown their first argument after the call, too, also where it has just
// switched off the instruction that tells it.
bool calls_are_monitored([[maybe_unused]] const PyCodeObject* code) {
#if PY_VERSION_HEX >= 0x030C0000
  return code->_co_monitoring != nullptr && code->_co_monitoring->active_monitors.tools[PY_MONITORING_EVENT_CALL] != 0;
#else
  return false;
#endif
}

// The code of a frame that makes a call with so many arguments, of which no tool hears.
const PyCodeObject* calling(const _PyInterpreterFrame* frame, Py_ssize_t given) {
  const PyCodeObject* const code = frame != nullptr ? code_of(frame) : nullptr;
  return code != nullptr && given == arguments_of(frame) && !calls_are_monitored(code) ? code : nullptr;
}

bool is(PyObject* callable, PyCFunction function) {
  return callable != nullptr && PyCFunction_CheckExact(callable) && PyCFunction_GET_FUNCTION(callable) == function;
}

} // namespace

#if PY_VERSION_HEX >= 0x030E0000

// The function is given a copy of what lies on the stack: what it calls, a null pointer where the receiver of a method would be, the
// arguments, and the names of those given by keyword. A bound method and a partial call with other arguments than lie there, or lie
// there themselves.
bool goes_with_a_plain_call(PyObject* value, PyObject* const* args, Py_ssize_t given, PyCFunction function) {
  const _PyInterpreterFrame* const frame = running_frame();
  const PyCodeObject* const code = calling(frame, given);
  // A generator shows its stack to the garbage collector, and so to anybody, while the call runs and while its arguments are dropped.
  if (code == nullptr || frame->stackpointer == nullptr || frame->owner == FRAME_OWNED_BY_GENERATOR) {
    return false;
  }
  const _PyStackRef* const stack = frame->localsplus + code->co_nlocalsplus;
  const Py_ssize_t names = frame->stackpointer > stack && object_at(frame->stackpointer[-1]) != args[given - 1];
  if (frame->stackpointer - stack < given + 2 + names) {
    return false;
  }
  const _PyStackRef* const pushed = frame->stackpointer - names - given;
  bool owned = false;
  for (Py_ssize_t i = 0; i < given; ++i) {
    if (object_at(pushed[i]) != args[i]) {
      return false;
    }
    owned |= owns(pushed[i], value);
  }
  return owned && object_at(pushed[-1]) == nullptr && is(object_at(pushed[-2]), function);
}

Py_ssize_t borrowed_references(PyObject* object) {
  Py_ssize_t found = 0;
  for (const _PyInterpreterFrame* frame = running_frame(); frame != nullptr; frame = frame->previous) {
    if (code_of(frame) == nullptr) {
      continue;
    }
    for (const _PyStackRef* place = frame->localsplus; place < frame->stackpointer; ++place) {
      found += place->bits == (reinterpret_cast<uintptr_t>(object) | kBorrowed);
    }
  }
  return found;
}

#else

// The function is given the place on the stack itself. A bound method and a partial hand that on too, one reference of their own put
// below it, where an outer call of the same function may have pushed what it calls: then they are not as many as the instruction has.
bool goes_with_a_plain_call(PyObject*, PyObject* const* args, Py_ssize_t given, PyCFunction function) {
  _PyInterpreterFrame* const frame = running_frame();
  const PyCodeObject* const code = calling(frame, given);
  if (code == nullptr) {
    return false;
  }
  PyObject** const stack = frame->localsplus + code->co_nlocalsplus;
  if (args < stack + 2 || args >= stack + code->co_stacksize) {
    return false;
  }
  // Below its arguments a call has pushed what it calls, and a null pointer where the receiver of a method would be.
#if PY_VERSION_HEX >= 0x030D0000
  constexpr int kCallable = -2, kNoReceiver = -1;
#else
  constexpr int kCallable = -1, kNoReceiver = -2;
#endif
  return args[kNoReceiver] == nullptr && is(args[kCallable], function);
}

// Each place has its own.
Py_ssize_t borrowed_references(PyObject*) {
  return 0;
}

#endif

#endif // Py_GIL_DISABLED

} // namespace safe_inplace
