// A call under autograd: prepare, record, run, rebase.
#pragma once

#include <c10/core/DispatchKeySet.h>

#include "call.h"

namespace safe_inplace {

// Runs the call as the Autograd kernel of its op. `below` continues in the dispatcher, below autograd: used where
// somebody listens there.
using Below = void (*)(c10::DispatchKeySet, const Call&);
void call_with_autograd(c10::DispatchKeySet keys, const Call& call, Below below);

} // namespace safe_inplace
