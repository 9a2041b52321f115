#include "result.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/TypeProperties.h>
#include <c10/core/DefaultDtype.h>

#include <algorithm>
#include <utility>

#include "dispatch.h"

namespace safe_inplace {

namespace {

// The op table's formulas over what a result is like: each of their steps is a sum or a product of two, and both look the same.
template <class V>
struct OfSteps {
  friend V operator*(const V& a, const V& b) { return of_two(a, b); }
  friend V operator+(const V& a, const V& b) { return of_two(a, b); }
  friend V multiply_add(const V& a, const V& b, const V& c) { return a * b + c; }
  friend V add_product(const V& input, const V& a, const V& b, const V&) { return input + a * b; }
  friend V add_scaled(const V& input, const V& other, const V&) { return input + other; }
};

// Its dtype.
struct Typed : OfSteps<Typed> {
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

Typed of_two(const Typed& a, const Typed& b) {
  at::native::ResultTypeState state = {};
  put(a, state);
  put(b, state);
  Typed result = a;
  result.dtype = at::native::result_type(state);
  result.has_dims = a.has_dims || b.has_dims;
  result.is_number = a.is_number && b.is_number;
  return result;
}

} // namespace

at::ScalarType result_dtype(const Call& call) {
  at::ScalarType dtype = at::ScalarType::Undefined;
  with_op(call.op, [&]<class Op>(Op) {
    dtype = Op::template result<Typed>(*call.input, call.operands[0], call.operands[1], call.parameter).dtype;
  });
  return dtype;
}

namespace {

// Its sizes and strides, as TensorIterator lays a result out.
struct Placed : OfSteps<Placed> {
  at::DimVector sizes;
  at::DimVector strides; // empty: a number

  Placed() = default;
  Placed(const at::Tensor& tensor) : sizes(tensor.sizes()), strides(tensor.strides()) {}
  Placed(const at::Scalar&) {}
  Placed(const Operand& operand) : Placed(operand.tensor != nullptr ? Placed(*operand.tensor) : Placed()) {}
};

// Of an operand beside dimensions that it may lack; 0 where it is broadcast.
int64_t stride_along(const Placed& operand, const at::DimVector& sizes, size_t dim) {
  const size_t missing = sizes.size() - operand.sizes.size();
  const bool broadcast = dim < missing || (operand.sizes[dim - missing] == 1 && sizes[dim] != 1);
  return broadcast ? 0 : operand.strides[dim - missing];
}

// Whether dimension `a` lies outside of dimension `b`: more than 0 if it must, less if it must not. The first operand that can tell
// decides; one that is broadcast along either cannot.
int lies_outside(const Placed& first, const Placed& second, const at::DimVector& sizes, int64_t a, int64_t b) {
  for (const Placed* operand : {&first, &second}) {
    const int64_t along_a = stride_along(*operand, sizes, a);
    const int64_t along_b = stride_along(*operand, sizes, b);
    if (along_a == 0 || along_b == 0) {
      continue;
    }
    if (along_a != along_b) {
      return along_a < along_b ? -1 : 1;
    }
    if (sizes[a] > sizes[b]) {
      return 1;
    }
  }
  return 0;
}

Placed of_two(const Placed& a, const Placed& b) {
  Placed result;
  result.sizes = a.sizes == b.sizes ? a.sizes : at::infer_size_dimvector(a.sizes, b.sizes);
  const int64_t ndim = result.sizes.size();
  // Innermost first; an insertion sort, since not every pair can be told apart.
  at::DimVector order;
  for (int64_t dim = ndim - 1; dim >= 0; --dim) {
    order.push_back(dim);
  }
  for (int64_t i = 1; i < ndim; ++i) {
    int64_t moving = i;
    for (int64_t before = i - 1; before >= 0; --before) {
      const int outside = lies_outside(a, b, result.sizes, order[before], order[moving]);
      if (outside > 0) {
        std::swap(order[before], order[moving]);
        moving = before;
      } else if (outside < 0) {
        break;
      }
    }
  }
  result.strides.resize(ndim);
  int64_t stride = 1;
  for (const int64_t dim : order) {
    result.strides[dim] = stride;
    stride *= std::max<int64_t>(result.sizes[dim], 1);
  }
  return result;
}

bool operands_fit_into(const Call& call, at::IntArrayRef sizes) {
  bool fit = true;
  each_tensor(call, [&](const at::Tensor& operand, int) {
    fit = fit && (operand.sizes() == sizes || at::is_expandable_to(operand.sizes(), sizes));
  });
  return fit;
}

} // namespace

ResultLayout result_layout(const Call& call) {
  const at::Tensor& input = *call.input;
  ResultLayout layout;
  layout.dtype = result_dtype(call);
  // Every formula's last step has the input, or what is laid out as it is, as its first operand: a dense one that is not broadcast
  // decides alone.
  if (input.is_non_overlapping_and_dense() && operands_fit_into(call, input.sizes())) {
    layout.sizes = input.sizes();
    layout.strides = input.strides();
    return layout;
  }
  with_op(call.op, [&]<class Op>(Op) {
    const Placed result = Op::template result<Placed>(input, call.operands[0], call.operands[1], call.parameter);
    layout.sizes = result.sizes;
    layout.strides = result.strides;
  });
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
