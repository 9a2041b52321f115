// A call made ready: everything that can refuse it has been asked, and how its result will be written is decided.
#pragma once

#include "call.h"

namespace safe_inplace {

struct Prepared {
  enum class By {
    Kernel, // ours, as the plan says
    TorchKernel, // torch's, under our node
    Fallback, // all is torch's
  };
  By by = By::Fallback;
  ForwardPlan plan;
  at::Tensor copies[2]; // of operands that overlap the input in a way that cannot be read element by element
};

// Checks a call whose tensors have kernels as torch's own in-place methods do, in their words, and lays it out.
Prepared prepare(const Call& call);

// Lets the kernel write the kept value as well, to `kept`.
void set_kept(Prepared& prepared, const Call& call, const at::Tensor& kept);

// Writes the result, and the kept value. The version counter is the caller's.
void run(Prepared& prepared, const Call& call);

} // namespace safe_inplace
