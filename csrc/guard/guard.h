// What guard does at a save, and when backward asks for what was saved. What it does at a write is in writes.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "guard/saved_value.h"

namespace safe_inplace::guard {

// Autograd saves a value; with the GIL.
void saves(SavedValue& value);

// Backward, or somebody who looks at a node, asks for a value: what it is given, which may be something else; with the GIL.
at::Tensor asked_for(SavedValue& value);

// The tensor that was saved itself, where `given`, which backward was handed, is that still; undefined where it is not.
at::Tensor original_of(const SavedValue& value, const at::Tensor& given);

} // namespace safe_inplace::guard
