// What the passes of the CPU share: a plan's elements in order, the buffers for what is not contiguous, and the choice of the
// instruction set.
#pragma once

#include <array>
#include <atomic>
#include <memory>

#include "../plan.h"
#include "rows.h"

namespace safe_inplace {

// The loops of the instruction set that ATen's kernels use, so that both round alike.
const RowTable& row_table();

// Fewer elements than this are not worth a second thread.
constexpr int64_t kGrain = 32768;

// Buffers for the threads of one call. Not on their stacks: a thread may have 64 KiB for everything. And taken before the
// first byte is written, so that where there is no memory nothing is half done.
class Scratch {
 public:
  Scratch(int64_t bytes, int64_t threads) : bytes_(aligned(bytes)) {
    if (bytes_ * threads <= int64_t(sizeof own_)) {
      first_ = own_;
    } else {
      memory_.reset(new char[bytes_ * threads + kLine]);
      first_ = reinterpret_cast<char*>(aligned(reinterpret_cast<intptr_t>(memory_.get())));
    }
  }

  // A part that is nobody else's: parallel_for calls its function at most once for each thread.
  char* part() { return first_ + bytes_ * parts_.fetch_add(1, std::memory_order_relaxed); }

  static int64_t aligned(int64_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

 private:
  static constexpr int64_t kLine = 64;
  int64_t bytes_;
  char* first_;
  std::unique_ptr<char[]> memory_;
  std::atomic<int64_t> parts_{0};
  alignas(kLine) char own_[4096]; // enough for most small calls
};

// A plan's number as one of the arithmetic dtype.
void store_number(DType dtype, const double* number, void* out);

// One element, in its arithmetic dtype.
void load_opmath(DType dtype, const char* data, void* out);

// n elements to the arithmetic dtype.
void widen_row(DType dtype, const char* from, int64_t n, char* to);

// Half or bfloat16 beside float: widened on its way in.
inline bool is_narrower(DType operand, DType dtype) {
  return dtype_size[int(operand)] < dtype_size[int(dtype)];
}

using Index = std::array<int64_t, kMaxDims>;

inline Index index_of(const Shape& shape, int64_t linear) {
  Index index = {};
  for (int dim = 0; dim < shape.ndim; ++dim) {
    index[dim] = linear % shape.sizes[dim];
    linear /= shape.sizes[dim];
  }
  return index;
}

// Moves by some rows, at most those that are left in dimension 1.
inline void next_row(const Shape& shape, Index& index, int64_t rows) {
  index[0] = 0;
  index[1] += rows - 1;
  for (int dim = 1; dim < shape.ndim; ++dim) {
    if (++index[dim] < shape.sizes[dim]) {
      return;
    }
    index[dim] = 0;
  }
}

inline int64_t offset_of(const Shape& shape, const Arg& arg, const Index& index) {
  int64_t offset = 0;
  for (int dim = 0; dim < shape.ndim; ++dim) {
    offset += index[dim] * arg.strides[dim];
  }
  return offset;
}

// A contiguous row, the same for every step of dimension 1.
inline bool repeats_row(const Shape& shape, const Arg& arg) {
  return shape.ndim > 1 && arg.strides[0] == 1 && arg.strides[1] == 0;
}

inline char* address(const Arg& arg, int64_t offset) {
  return static_cast<char*>(arg.data) + offset * dtype_size[int(arg.dtype)];
}

// What does not vary along a row: its values for some rows, in the arithmetic dtype.
const void* one_per_row(const Arg& arg, const char* from, int64_t row_stride, int64_t rows, char* buffer, int64_t& stride);

// Memory fresh from the system costs a page fault at the first touch of every page: for pages of 4 KiB several times
// what the kernel itself takes. Up to 32 MiB malloc may serve a block from its heap, whose pages are often there already,
// and which it trims: large pages made 16 MiB three times slower there. Beyond, it maps each block anew.
void prefer_large_pages(const Arg& fresh, int64_t elements);

} // namespace safe_inplace
