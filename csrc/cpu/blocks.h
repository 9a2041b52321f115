// Blocks of rows: how large they are, and those that are not contiguous along the row on their way through a buffer.
#pragma once

#include <algorithm>

#include "walk.h"

namespace safe_inplace {

// How a box of two dimensions is cut into blocks, all alike but for the last ones.
struct Cut {
  int64_t columns = 1; // of a block
  int64_t rows = 1;
  int64_t column_blocks = 1; // side by side
  int64_t row_blocks = 1;
};

struct CutLimits {
  int64_t columns;
  int64_t rows;
  int64_t elements;
};

// Where a tensor is transposed a block has 16 rows at least, whole cache lines of what is contiguous along the columns. More
// columns than 256 gain nothing there, fewer make the other tensors slow (Zen 4).
constexpr int64_t kTransposedBlock = 4096;

inline CutLimits transposed_limits(int64_t height) {
  return {std::clamp<int64_t>(kTransposedBlock / height / 64 * 64, 256, 2048), 1024, kTransposedBlock};
}

Cut cut_box(int64_t width, int64_t height, const CutLimits& limits);

// A dimension along which some tensor that is not contiguous along dimension 0 is closer to it: a block has to be wide in both, so
// that each cache line is asked for once. 0 where there is no such tensor.
int transposed_dim(const ForwardPlan& plan);
int transposed_dim(const BackwardPlan& plan);

// The same plan with dimension `dim` as its dimension 1; or, in backward, as its dimension 0, if rows are short.
ForwardPlan with_rows_along(int dim, const ForwardPlan& plan);
BackwardPlan with_rows_along(int dim, const BackwardPlan& plan);

// From one element of a block to the next, in elements.
struct Steps {
  int64_t column;
  int64_t row;
};

inline Steps steps_of(const Shape& shape, const Arg& arg) {
  return {arg.strides[0], shape.ndim > 1 ? arg.strides[1] : 0};
}

void copy_block(DType dtype, char* to, Steps to_steps, const char* from, Steps from_steps, int64_t columns, int64_t rows);

// Adds elements of an arithmetic dtype.
void add_block(DType math, char* to, Steps to_steps, const char* from, Steps from_steps, int64_t columns, int64_t rows);

// Where the `rows` rows of n elements at index stand, contiguous along the row and no narrower than the dtype (through the
// buffer if they are not), and the stride from row to row.
const char* read_block(const Shape& shape, const Arg& arg, DType dtype, const Index& index, int64_t rows, int64_t n, char* buffer,
                       int64_t& stride);

// The other way: rows of n elements in the buffer, narrowed where the tensor is narrower than the dtype.
void write_block(const Shape& shape, const Arg& arg, DType dtype, const Index& index, int64_t rows, int64_t n, char* buffer);

// Copies a block between memory laid out as arg says and a contiguous buffer.
template <bool to_buffer>
void copy_rows(const Shape& shape, const Arg& arg, const Index& index, int64_t rows, int64_t n, char* buffer) {
  char* const data = address(arg, offset_of(shape, arg, index));
  if constexpr (to_buffer) {
    copy_block(arg.dtype, buffer, {1, n}, data, steps_of(shape, arg), n, rows);
  } else {
    copy_block(arg.dtype, data, steps_of(shape, arg), buffer, {1, n}, n, rows);
  }
}

// The same of n elements that start at index and run over row ends.
template <bool to_buffer>
void copy_elements(const Shape& shape, const Arg& arg, Index index, int64_t n, char* buffer) {
  const int64_t inner = shape.sizes[0];
  while (n > 0) {
    const int64_t columns = std::min(n, inner - index[0]);
    const int64_t rows = columns == inner ? std::min(n / inner, shape.sizes[1] - index[1]) : 1;
    copy_rows<to_buffer>(shape, arg, index, rows, columns, buffer);
    buffer += rows * columns * dtype_size[int(arg.dtype)];
    n -= rows * columns;
    next_row(shape, index, rows);
  }
}

// What these need of a buffer for that many elements.
int64_t block_bytes(const Arg& arg, DType dtype, int64_t elements);

} // namespace safe_inplace
