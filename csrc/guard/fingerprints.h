// What verify compares: 64 bits of each strided tensor that a saved value is made of.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "guard/policy.h"

namespace safe_inplace::guard {

// Undefined for a part whose memory is not there.
std::vector<at::Tensor> fingerprints_of(const at::Tensor& tensor, const Policy& policy);

// Tells the policy where they differ from those of the save.
void compare_fingerprints(const SavedValue* entry, const Policy& policy);

} // namespace safe_inplace::guard
