// The ops in torch's own operations: for every tensor and every transform that the kernels do not know.
#pragma once

#include "call.h"

namespace safe_inplace {

// Same result, same refusals, version counter up by one. `dense`: what has_kernel says of the call.
void write_by_fallback(const Call& call, bool dense);

// The same for a dense call whose memory prepare() has checked.
void write_checked_by_fallback(const Call& call);

// The out-of-place call: torch's operators, their nodes included.
at::Tensor result_by_fallback(const Call& call);

} // namespace safe_inplace
