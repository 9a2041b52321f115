// What is known of a value at the moment that it is saved.
#pragma once

#include <ATen/core/Tensor.h>

#include "guard/running.h"
#include "guard/saved_value.h"

namespace safe_inplace::guard {

// `object` is the tensor's own.
void describe(SavedValue& value, const at::Tensor& tensor, PyObject* object);

// An operator that is about to overwrite what its own autograd node saves: x.mul_(x).
const Running* about_to_overwrite(const SavedValue* entry);

// One that has yet to fill what its own node saves: rrelu's noise.
Writing* about_to_fill(const SavedValue* entry);

bool has_node(const c10::TensorImpl* impl);

void set_parameter_type(PyTypeObject* type); // torch.nn.Parameter

} // namespace safe_inplace::guard
