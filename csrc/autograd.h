// A call under autograd: prepare, record, run, rebase.
#pragma once

#include <c10/core/DispatchKeySet.h>

#include "call.h"

namespace safe_inplace {

// Run the call as the Autograd kernel of its op: in place, and out of place. `below` continues in the dispatcher, below autograd:
// used where somebody listens there.
using WriteBelow = void (*)(c10::DispatchKeySet, const Call&);
void write_with_autograd(c10::DispatchKeySet keys, const Call& call, WriteBelow below);

using CallBelow = at::Tensor (*)(c10::DispatchKeySet, const Call&);
at::Tensor call_with_autograd(c10::DispatchKeySet keys, const Call& call, CallBelow below);

} // namespace safe_inplace
