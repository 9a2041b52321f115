// The ops as the dispatcher knows them.
#pragma once

#include "call.h"

namespace safe_inplace {

// Sends a call through the dispatcher, to the overload that fits its operands.
void dispatch(const Call& call);

} // namespace safe_inplace
