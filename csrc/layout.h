// The tensors of a plan while its dimensions are still those of the input.
#pragma once

#include <ATen/core/TensorBody.h>
#include <c10/util/SmallVector.h>

#include "call.h"

namespace safe_inplace {

class Layout {
 public:
  explicit Layout(const at::Tensor& input)
      : ndim_(static_cast<int>(input.dim())), sizes_(input.sizes()), strides_(kMostTensors * input.dim()) {}

  void add(Arg& arg, const at::Tensor& tensor, void* data, DType dtype); // runs at every call: below, to be inlined

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

// Whether an operand of that dtype has a kernel beside an input of this one.
bool fits_beside(DType operand, DType input);

// Puts an operand, whose tensor may be replaced by a copy in `value`, into a plan: as a number where torch treats it as one,
// otherwise into the layout. False where no kernel takes it.
bool place_operand(const Operand& operand, const at::Tensor* value, const at::Tensor& input, DType dtype, Arg& arg,
                   Layout& layout);

inline void Layout::add(Arg& arg, const at::Tensor& tensor, void* data, DType dtype) {
  arg.data = data;
  arg.dtype = dtype;
  Entry& entry = entries_[count_];
  entry.arg = &arg;
  entry.strides = strides_.data() + int64_t(count_++) * ndim_;
  const int offset = ndim_ - static_cast<int>(tensor.dim());
  for (int dim = 0; dim < ndim_; ++dim) {
    const bool broadcast = dim < offset || tensor.size(dim - offset) == 1;
    entry.strides[dim] = broadcast ? 0 : tensor.stride(dim - offset);
  }
}

} // namespace safe_inplace
