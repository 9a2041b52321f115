// How a backward pass is cut into chunks for the threads, and a chunk into blocks. It depends on the plan alone, never on the number
// of threads, so that a sum is the same bits whoever computes it.
#pragma once

#include "blocks.h"

namespace safe_inplace {

struct Split {
  int dim = 0;
  int64_t chunks = 1;
  int64_t step = 1; // indices of `dim` in a chunk
};

Split choose_split(const BackwardPlan& plan);

// How a chunk is cut into blocks: as the largest chunk asks for, so that all are cut alike.
Cut choose_cut(const Shape& shape, const Split& split, bool transposed);

} // namespace safe_inplace
