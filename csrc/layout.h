// The tensors of a plan while its dimensions are still those of the input.
#pragma once

#include <ATen/core/TensorBody.h>
#include <c10/util/SmallVector.h>

#include "call.h"

namespace safe_inplace {

class Layout {
 public:
  explicit Layout(at::IntArrayRef sizes) : ndim_(static_cast<int>(sizes.size())), sizes_(sizes), strides_(kMostTensors * ndim_) {}

  // Run at every call: below, to be inlined.
  void add(Arg& arg, const at::Tensor& tensor, void* data, DType dtype) {
    add(arg, tensor.sizes(), tensor.strides(), data, dtype);
  }
  void add(Arg& arg, at::IntArrayRef sizes, at::IntArrayRef strides, void* data, DType dtype);

  // Sorts the dimensions by the first tensor's strides, innermost first, merges what every tensor can walk as one, and
  // writes the result into the plan. False if too many remain.
  bool finish(Shape& shape);

 private:
  static constexpr int kMostTensors = 7;
  struct Entry {
    Arg* arg;
    int64_t* strides;
  };

  bool before(int a, int b) const;
  bool merges(const Shape& shape, int dim) const;

  int ndim_;
  at::IntArrayRef sizes_;
  // Tensors may have any number of dimensions, and usually have few.
  c10::SmallVector<int64_t, kMostTensors * 6> strides_;
  Entry entries_[kMostTensors];
  int count_ = 0;
};

// The tensor that a plan writes, or the gradient that it reads: what every operand stands beside.
struct Main {
  c10::Device device;
  at::ScalarType type;
  DType dtype;
  int64_t dim;
};

// Whether the device has a kernel for an operand of that dtype beside a main tensor of this one.
bool fits_beside(DType operand, const Main& main);

// Puts an operand, whose tensor may be replaced by a copy in `value`, into a plan: as a number where torch treats it as one,
// otherwise into the layout. False where no kernel takes it.
bool place_operand(const Operand& operand, const at::Tensor* value, const Main& main, Arg& arg, Layout& layout);

inline void Layout::add(Arg& arg, at::IntArrayRef sizes, at::IntArrayRef strides, void* data, DType dtype) {
  arg.data = data;
  arg.dtype = dtype;
  Entry& entry = entries_[count_];
  entry.arg = &arg;
  entry.strides = strides_.data() + int64_t(count_++) * ndim_;
  const int offset = ndim_ - static_cast<int>(sizes.size());
  for (int dim = 0; dim < ndim_; ++dim) {
    const bool broadcast = dim < offset || sizes[dim - offset] == 1;
    entry.strides[dim] = broadcast ? 0 : strides[dim - offset];
  }
}

} // namespace safe_inplace
