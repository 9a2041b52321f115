#include "result.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/TypeProperties.h>
#include <c10/core/DefaultDtype.h>

#include "dispatch.h"
#include "fallback.h"

namespace safe_inplace {

// The op table's formulas over dtypes. Not in an unnamed namespace: the formulas find these operators by the namespace of their
// arguments.
namespace promotion {

struct Typed {
  at::ScalarType dtype;
  bool has_dims = false;
  bool is_number = false;

  Typed(const at::Tensor& tensor) : dtype(tensor.scalar_type()), has_dims(tensor.dim() > 0) {}
  Typed(const at::Scalar& number) : dtype(number.type()), is_number(true) {
    if (at::isComplexType(dtype)) {
      dtype = c10::typeMetaToScalarType(c10::get_default_complex_dtype());
    } else if (at::isFloatingType(dtype)) {
      dtype = c10::typeMetaToScalarType(c10::get_default_dtype());
    }
  }
  Typed(const Operand& operand) : Typed(operand.tensor != nullptr ? Typed(*operand.tensor) : Typed(operand.number)) {}
};

void put(const Typed& value, at::native::ResultTypeState& state) {
  at::ScalarType& of_its_kind = value.has_dims ? state.dimResult : value.is_number ? state.wrappedResult : state.zeroResult;
  of_its_kind = of_its_kind == at::ScalarType::Undefined ? value.dtype : c10::promoteTypes(of_its_kind, value.dtype);
}

Typed promoted(const Typed& a, const Typed& b) {
  at::native::ResultTypeState state = {};
  put(a, state);
  put(b, state);
  Typed result = a;
  result.dtype = at::native::result_type(state);
  result.has_dims = a.has_dims || b.has_dims;
  result.is_number = a.is_number && b.is_number;
  return result;
}

Typed operator*(const Typed& a, const Typed& b) {
  return promoted(a, b);
}

Typed operator+(const Typed& a, const Typed& b) {
  return promoted(a, b);
}

Typed multiply_add(const Typed& a, const Typed& b, const Typed& c) {
  return a * b + c;
}

Typed add_product(const Typed& input, const Typed& a, const Typed& b, const Typed&) {
  return input + a * b;
}

Typed add_scaled(const Typed& input, const Typed& other, const Typed&) {
  return input + other;
}

} // namespace promotion

using promotion::Typed;

at::ScalarType result_dtype(const Call& call) {
  at::ScalarType dtype = at::ScalarType::Undefined;
  with_op(call.op, [&]<class Op>(Op) {
    dtype = Op::template result<Typed>(*call.input, call.operands[0], call.operands[1], call.parameter).dtype;
  });
  return dtype;
}

namespace {

// Of an expanded dimension the others decide where it lies.
bool decides_order(const at::Tensor& input) {
  for (int64_t dim = 0; dim < input.dim(); ++dim) {
    if (input.stride(dim) == 0 && input.size(dim) > 1) {
      return false;
    }
  }
  return true;
}

} // namespace

ResultLayout result_layout(const Call& call) {
  const at::Tensor& input = *call.input;
  ResultLayout layout;
  layout.dtype = result_dtype(call);
  layout.sizes = input.sizes();
  each_tensor(call, [&](const at::Tensor& operand, int) {
    if (operand.sizes() != at::IntArrayRef(layout.sizes)) {
      layout.sizes = at::infer_size_dimvector(layout.sizes, operand.sizes());
    }
  });
  // Every formula's last step has the input, or what has the input's layout, as its first operand: a full one decides alone.
  if (input.sizes() != at::IntArrayRef(layout.sizes) || !decides_order(input)) {
    layout.strides = meta_result(call).strides();
  } else if (input.is_non_overlapping_and_dense()) {
    layout.strides = input.strides();
  } else {
    layout.strides = at::infer_dense_strides(input.sizes(), input.strides());
  }
  return layout;
}

at::Tensor make_fresh(const ResultLayout& layout, c10::Device device) {
  if (device.is_cpu()) {
    return at::detail::empty_strided_cpu(layout.sizes, layout.strides, layout.dtype);
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return at::empty_strided(layout.sizes, layout.strides, at::TensorOptions().dtype(layout.dtype).device(device));
}

at::Tensor take_over(const at::Tensor& temporary) {
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(temporary.storage()),
      c10::DispatchKeySet(c10::computeDispatchKey(temporary.scalar_type(), {}, temporary.device())), temporary.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(temporary.sizes(), temporary.strides());
  return result;
}

} // namespace safe_inplace
