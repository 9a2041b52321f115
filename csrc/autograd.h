// Calls under autograd: the node of each op, what it saves and how it is asked for gradients.
#pragma once

#include <c10/core/DispatchKeySet.h>

#include "operands.h"

namespace safe_inplace {

// Runs the call as the Autograd kernel of its op. `below` continues in the dispatcher, below autograd: used where
// somebody listens there.
using Below = void (*)(c10::DispatchKeySet, const Call&);
void call_with_autograd(c10::DispatchKeySet keys, const Call& call, Below below);

// Gives every node its own Python type; its name is what grad_fn shows.
void register_node_types();

} // namespace safe_inplace
