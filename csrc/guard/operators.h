// The common operators, watched without boxing their arguments.
#pragma once

namespace safe_inplace::guard {

void see_common_operators_unboxed();

} // namespace safe_inplace::guard
