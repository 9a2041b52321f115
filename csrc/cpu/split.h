// How a backward pass is cut into chunks for the threads, and a chunk into blocks. It depends on the plan alone, never on the number
// of threads, so that a sum is the same bits whoever computes it.
#pragma once

#include "walk.h"

namespace safe_inplace {

struct Split {
  int dim = 0;
  int64_t chunks = 1;
  int64_t step = 1; // indices of `dim` in a chunk
};

Split choose_split(const BackwardPlan& plan);

// How a chunk is cut into blocks: as the largest chunk asks for, so that all are cut alike.
struct Cut {
  int64_t columns = 1; // of a block
  int64_t rows = 1;
  int64_t column_blocks = 1; // side by side in a chunk
  int64_t row_blocks = 1;
};

Cut choose_cut(const Shape& shape, const Split& split);

} // namespace safe_inplace
