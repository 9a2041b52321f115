// Apart, since torch's header of exceptions includes all of pybind11.
#include "guard/python_object.h"

#include <torch/csrc/Exceptions.h>

namespace safe_inplace::guard {

void rethrow_python() {
  python_error error;
  error.persist();
  throw error;
}

} // namespace safe_inplace::guard
