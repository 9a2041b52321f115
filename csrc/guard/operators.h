// The common operators, watched without boxing their arguments.
#pragma once

namespace safe_inplace::guard {

void see_common_operators_unboxed();

// The boxed kernel sees them as well from here on. No other thread may be running an operator.
void see_all_operators_boxed();

} // namespace safe_inplace::guard
