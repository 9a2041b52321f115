// A call made ready: everything that can refuse it has been asked, and how its result will be written is decided.
#pragma once

#include "result.h"

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
  std::optional<ResultLayout> result; // of an out-of-place call
};

// Checks a call whose tensors have kernels as torch's own methods do, in their words, and lays it out.
Prepared prepare(const Call& call);

// Lets the kernel write the kept value as well, to `kept`.
void set_kept(Prepared& prepared, const Call& call, const at::Tensor& kept);

// Writes the result, and the kept value. The version counter is the caller's.
void run(Prepared& prepared, const Call& call);

// The same for an out-of-place call: the result, in the memory of this operand (0 is the input), or in memory of its own.
at::Tensor run_out_of_place(Prepared& prepared, const Call& call, std::optional<int> taken);

} // namespace safe_inplace
