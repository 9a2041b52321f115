// The arguments of an operator where they lie, boxed or not.
#pragma once

#include <optional>

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>

namespace safe_inplace::guard {

// An argument, where it lies: the tensors in it, or whether it is true.
struct Argument {
  c10::ArrayRef<at::Tensor> tensors;
  const c10::IValue* boxed = nullptr;
  bool flag = false;

  Argument(const c10::IValue& value) : boxed(&value) {}
  Argument(const at::Tensor& tensor) : tensors(tensor) {}
  Argument(const std::optional<at::Tensor>& tensor) {
    if (tensor) {
      tensors = *tensor;
    }
  }
  Argument(at::TensorList list) : tensors(list) {}
  Argument(bool flag) : flag(flag) {}
  template <class Other>
  explicit Argument(const Other&) {} // a number, an option

  bool is_true() const { return boxed != nullptr ? boxed->toBool() : flag; }
};

template <class F>
void each_tensor(const c10::IValue& value, const F& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) {
      visit(value.toTensor());
    }
  } else if (value.isTensorList()) {
    const auto list = value.toTensorVector();
    for (const at::Tensor& tensor : list) {
      visit(tensor);
    }
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef()) {
      each_tensor(item, visit);
    }
  }
}

template <class F>
void each_tensor(const Argument& argument, const F& visit) {
  if (const auto* value = argument.boxed) {
    each_tensor(*value, visit);
  }
  for (const at::Tensor& tensor : argument.tensors) {
    if (tensor.defined()) {
      visit(tensor);
    }
  }
}

} // namespace safe_inplace::guard
