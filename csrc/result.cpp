#include "result.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/TypeProperties.h>
#include <c10/core/Contiguity.h>
#include <c10/core/DefaultDtype.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/accumulate.h>
#include <c10/util/strides.h>

#include <algorithm>
#include <numeric>
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
    } else if (dtype == at::kUInt64) {
      dtype = at::kLong; // a number of that kind, which torch promotes with no other
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
  Typed type;
  at::DimVector sizes;
  at::DimVector strides;
  bool is_dense = true;
  bool on_cpu = true;

  Placed(const at::Tensor& tensor)
      : type(tensor),
        sizes(tensor.sizes()),
        strides(tensor.strides()),
        is_dense(tensor.is_non_overlapping_and_dense()),
        on_cpu(tensor.is_cpu()) {}
  Placed(const at::Scalar& number) : type(number) {}
  Placed(const Operand& operand) : Placed(operand.tensor != nullptr ? Placed(*operand.tensor) : Placed(operand.number)) {}

  bool is_contiguous() const { return c10::_compute_contiguous<int64_t>(sizes, strides, c10::multiply_integers(sizes)); }
  bool is_channels_last() const { return c10::_compute_channels_last_contiguous_2d<int64_t>(sizes, strides); }
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

at::DimVector strides_by_order(const Placed& a, const Placed& b, const at::DimVector& sizes) {
  const size_t ndim = sizes.size();
  at::DimVector as_they_stand(ndim); // innermost first
  std::iota(as_they_stand.rbegin(), as_they_stand.rend(), 0);
  // An insertion sort, since not every pair can be told apart.
  at::DimVector order = as_they_stand;
  for (size_t i = 1; i < ndim; ++i) {
    size_t moving = i;
    for (size_t before = i; before-- > 0;) {
      const int outside = lies_outside(a, b, sizes, order[before], order[moving]);
      if (outside > 0) {
        std::swap(order[before], order[moving]);
        moving = before;
      } else if (outside < 0) {
        break;
      }
    }
  }
  if (order == as_they_stand) {
    return c10::contiguous_strides(sizes);
  }
  at::DimVector strides(ndim);
  int64_t stride = 1;
  for (const int64_t dim : order) {
    strides[dim] = stride;
    stride *= sizes[dim];
  }
  return strides;
}

// Operands of one shape may not need the order; where sizes of 1 leave strides open, that makes others.
at::DimVector strides_of_two(const Placed& a, const Placed& b, const at::DimVector& sizes) {
  if (a.sizes == b.sizes) {
    if (a.is_contiguous() && b.is_contiguous()) {
      return c10::contiguous_strides(sizes);
    }
    if (a.is_channels_last() && b.is_channels_last()) {
      return at::DimVector(c10::get_channels_last_strides_2d(sizes));
    }
    if (a.is_dense && b.is_dense && a.strides == b.strides) {
      return a.strides;
    }
  }
  return strides_by_order(a, b, sizes);
}

// TensorIterator promotes by a copy on the CPU, and a copy is dense.
void promote(Placed& operand, const Placed& result) {
  if (result.on_cpu && operand.type.dtype != result.type.dtype && !operand.is_dense) {
    operand.strides = at::infer_dense_strides(operand.sizes, operand.strides);
  }
}

Placed of_two(Placed a, Placed b) {
  Placed result = a;
  result.type = of_two(a.type, b.type);
  result.is_dense = true;
  result.on_cpu = a.on_cpu && b.on_cpu;
  result.sizes = a.sizes == b.sizes ? a.sizes : at::infer_size_dimvector(a.sizes, b.sizes);
  promote(a, result);
  promote(b, result);
  result.strides = strides_of_two(a, b, result.sizes);
  return result;
}

// Whether the input alone decides, as mostly. Every formula's last step has it, or what is laid out as it is, as its first operand:
// it decides if it is dense and not broadcast. Where a size of 1 leaves strides open the other operands have a say, unless all lie as
// `empty` makes them.
bool is_laid_out_as_input(const Call& call) {
  const at::IntArrayRef sizes = call.input->sizes();
  const bool open = std::any_of(sizes.begin(), sizes.end(), [](int64_t size) { return size < 2; });
  const auto decided = [&](const at::Tensor& tensor) {
    return !open || (tensor.numel() != 0 && tensor.strides() == at::IntArrayRef(c10::contiguous_strides(tensor.sizes())));
  };
  bool decides = call.input->is_non_overlapping_and_dense() && decided(*call.input);
  each_tensor(call, [&](const at::Tensor& operand, int) {
    decides = decides && (operand.sizes() == sizes || at::is_expandable_to(operand.sizes(), sizes)) && decided(operand);
  });
  return decides;
}

} // namespace

ResultLayout result_layout(const Call& call) {
  const at::Tensor& input = *call.input;
  ResultLayout layout;
  layout.dtype = result_dtype(call);
  if (is_laid_out_as_input(call)) {
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

bool has_layout(const at::Tensor& tensor, const ResultLayout& layout) {
  if (tensor.scalar_type() != layout.dtype || tensor.sizes() != at::IntArrayRef(layout.sizes)) {
    return false;
  }
  for (size_t dim = 0; dim < layout.sizes.size(); ++dim) {
    if (layout.sizes[dim] > 1 && tensor.strides()[dim] != layout.strides[dim]) {
      return false;
    }
  }
  return true;
}

at::Tensor take_over(const at::Tensor& temporary, const ResultLayout& layout) {
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(temporary.storage()),
      c10::DispatchKeySet(c10::computeDispatchKey(temporary.scalar_type(), {}, temporary.device())), temporary.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(layout.sizes, layout.strides);
  return result;
}

} // namespace safe_inplace
