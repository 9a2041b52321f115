#include "layout.h"

#include "backend.h"
#include "numbers.h"

namespace safe_inplace {

bool Layout::finish(Shape& shape) {
  shape.numel = 1;
  c10::SmallVector<int, 12> order;
  for (int dim = ndim_ - 1; dim >= 0; --dim) {
    shape.numel *= sizes_[dim];
    if (sizes_[dim] != 1) {
      auto place = order.end();
      while (place != order.begin() && before(dim, place[-1])) {
        --place;
      }
      order.insert(place, dim);
    }
  }
  if (shape.numel == 0) {
    return true;
  }
  shape.ndim = 0;
  for (const int dim : order) {
    if (shape.ndim > 0 && merges(shape, dim)) {
      shape.sizes[shape.ndim - 1] *= sizes_[dim];
      continue;
    }
    if (shape.ndim == kMaxDims) {
      return false;
    }
    shape.sizes[shape.ndim] = sizes_[dim];
    for (int entry = 0; entry < count_; ++entry) {
      entries_[entry].arg->strides[shape.ndim] = entries_[entry].strides[dim];
    }
    ++shape.ndim;
  }
  if (shape.ndim == 0) {
    shape.ndim = 1;
    shape.sizes[0] = 1;
  }
  return true;
}

bool Layout::before(int a, int b) const {
  for (int entry = 0; entry < count_; ++entry) {
    const int64_t stride_a = entries_[entry].strides[a];
    const int64_t stride_b = entries_[entry].strides[b];
    // An expanded tensor says nothing about the order.
    if (stride_a != stride_b && stride_a != 0 && stride_b != 0) {
      return stride_a < stride_b;
    }
  }
  return false;
}

bool Layout::merges(const Shape& shape, int dim) const {
  const int last = shape.ndim - 1;
  for (int entry = 0; entry < count_; ++entry) {
    if (entries_[entry].strides[dim] != entries_[entry].arg->strides[last] * shape.sizes[last]) {
      return false;
    }
  }
  return true;
}

namespace {

bool is_reduced(DType dtype) {
  return dtype == DType::Half || dtype == DType::BFloat16;
}

} // namespace

bool fits_beside(DType operand, const Main& main) {
  return operand == main.dtype || (is_reduced(main.dtype) && operand == DType::Float) ||
         (main.dtype == DType::Float && is_reduced(operand) && backend_of(main.device.type())->takes_narrower);
}

bool place_operand(const Operand& operand, const at::Tensor* tensor, const Main& main, Arg& arg, Layout& layout) {
  if (tensor == nullptr) {
    return take_number(operand.number, main.type, arg.number);
  }
  const at::Tensor& value = *tensor;
  DType operand_dtype = main.dtype;
  const bool known = kernel_dtype(value.scalar_type(), operand_dtype);
  if (value.dim() == 0 && value.is_cpu() && (main.dim > 0 || (known && operand_dtype == main.dtype)) &&
      !at::isComplexType(value.scalar_type())) {
    return take_scalar_tensor(value, main.type, arg.number);
  }
  if (!known || !fits_beside(operand_dtype, main) || value.device() != main.device) {
    return false;
  }
  // A 0-dim tensor takes part in promotion as a number only: its own, wider dtype is not used.
  if (value.dim() == 0 && operand_dtype != main.dtype) {
    return false;
  }
  layout.add(arg, value, const_cast<void*>(value.const_data_ptr()), operand_dtype);
  return true;
}

} // namespace safe_inplace
