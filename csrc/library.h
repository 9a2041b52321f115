// The ops as the dispatcher knows them.
#pragma once

#include "call.h"

namespace safe_inplace {

// Send a call through the dispatcher, to the overload that fits its operands: in place, and out of place.
void dispatch_write(const Call& call);
at::Tensor dispatch(const Call& call);

} // namespace safe_inplace
