// Where in the user's code: found by walking the frames, put into words only when a report is made.
#pragma once

#include <memory>

#include "guard/python_object.h"

namespace safe_inplace::guard {

// The code object and the instruction of the innermost frame of the user's code; where that lies in an installed package,
// also of the frame outside that led there; and the innermost module that is being called. Line, text and the module's path
// are looked up only when a report is printed.
struct Place {
  Object code;
  int instruction = -1;
  Object caller;
  int caller_instruction = -1;
  Object module; // a weak reference: the module may hold what holds this
};

using SharedPlace = std::shared_ptr<const Place>;

// Asks `predicate` whose a code object is: 0 a library's, 1 an installed package's, 2 the user's own. `module_call` is the code
// object of Module.__call__.
void set_whose_code(PyObject* predicate, PyObject* module_call);

// Before any other: false with a Python error set where no slot of code objects is left for the answers.
bool prepare_places();

Place find_place();

// As guard's Python knows it.
Object place_objects(const Place& place);

} // namespace safe_inplace::guard
