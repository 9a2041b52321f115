#include "split.h"

#include <algorithm>

namespace safe_inplace {
namespace {

// What a block of the backward pass covers at most.
constexpr CutLimits kLimits = {2048, 1024, 4096};

int64_t partial_elements(const BackwardPlan& plan, const Split& split) {
  int64_t elements = 0;
  for (int i = 0; i < 3; ++i) {
    if (plan.wanted[i] && plan.reduced[i] && plan.grads[i].strides[split.dim] == 0 && split.chunks > 1) {
      elements += split.chunks * plan.numel[i];
    }
  }
  return elements;
}

Split split_by(const BackwardPlan& plan, int dim, int64_t wanted) {
  const int64_t size = plan.shape.sizes[dim];
  // A chunk of the innermost dimension keeps whole cache lines.
  const int64_t unit = dim == 0 ? 64 : 1;
  const int64_t units = (size + unit - 1) / unit;
  const int64_t step = (units + std::min(units, wanted) - 1) / std::min(units, wanted) * unit;
  return {dim, (size + step - 1) / step, step};
}

} // namespace

Split choose_split(const BackwardPlan& plan) {
  constexpr int64_t kMaxChunks = 64;
  const int64_t wanted = std::clamp<int64_t>(plan.shape.numel / kGrain, 1, kMaxChunks);
  const int64_t enough = std::min<int64_t>(wanted, 8);
  Split best = split_by(plan, plan.shape.ndim - 1, wanted);
  const auto poor = [&](const Split& split) {
    return split.chunks < enough || partial_elements(plan, split) > plan.shape.numel / 16;
  };
  for (int dim = plan.shape.ndim - 2; dim >= 0 && poor(best); --dim) {
    const Split other = split_by(plan, dim, wanted);
    const bool smaller = partial_elements(plan, other) < partial_elements(plan, best);
    if (!poor(other) || (other.chunks >= enough && (smaller || best.chunks < enough))) {
      best = other;
    }
  }
  // Few, large outer dimensions over a long row: one chunk rather than partial sums as large as the input.
  if (partial_elements(plan, best) > plan.shape.numel / 2) {
    return {0, 1, plan.shape.sizes[0]};
  }
  return best;
}

Cut choose_cut(const Shape& shape, const Split& split, bool transposed) {
  const auto extent = [&](int dim) {
    return dim >= shape.ndim ? 1 : split.dim == dim ? std::min(split.step, shape.sizes[dim]) : shape.sizes[dim];
  };
  return cut_box(extent(0), extent(1), transposed ? transposed_limits(extent(1)) : kLimits);
}

} // namespace safe_inplace
