#include "operands.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/TensorBody.h>
#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>
#include <limits>

#include <c10/util/SmallVector.h>

#include "device.h"
#include "extent.h"

namespace safe_inplace {

namespace {

constexpr int kDeviceTypes = static_cast<int>(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES);
std::array<DeviceKernels, kDeviceTypes>& registered_kernels() {
  static std::array<DeviceKernels, kDeviceTypes> kernels = {};
  return kernels;
}

const c10::DispatchKeySet plain_keys = c10::DispatchKeySet({
    c10::DispatchKey::CPU,
    c10::DispatchKey::CUDA,
    c10::DispatchKey::AutogradCPU,
    c10::DispatchKey::AutogradCUDA,
    c10::DispatchKey::ADInplaceOrView,
    c10::DispatchKey::AutocastCPU,
    c10::DispatchKey::AutocastCUDA,
});

} // namespace

RegisterDevice::RegisterDevice(c10::DeviceType type, DeviceKernels kernels) {
  registered_kernels()[static_cast<int>(type)] = kernels;
}

const DeviceKernels* device_kernels(c10::DeviceType type) {
  const DeviceKernels& kernels = registered_kernels()[static_cast<int>(type)];
  return kernels.forward == nullptr ? nullptr : &kernels;
}

bool is_plain(const at::Tensor& tensor) {
  // Not the set difference, which never removes a backend's bit.
  return (tensor.key_set().raw_repr() & ~plain_keys.raw_repr()) == 0;
}

bool is_plain(const Call& call) {
  if (!is_plain(*call.input)) {
    return false;
  }
  for (int i = 0; i < call.info().operands; ++i) {
    if (call.operands[i].tensor != nullptr && !is_plain(*call.operands[i].tensor)) {
      return false;
    }
  }
  return true;
}

void check_writable(const at::Tensor& input) {
  TORCH_CHECK(!input.is_inference() || c10::InferenceMode::is_enabled(),
              "Inplace update to inference tensor outside InferenceMode is not allowed.You can make a clone to get a "
              "normal tensor before doing inplace update.See https://github.com/pytorch/rfcs/pull/17 for more details.");
}

bool share_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.is_same(b) || (a.has_storage() && b.has_storage() && a.is_alias_of(b));
}

bool kernel_dtype(at::ScalarType type, DType& dtype) {
  switch (type) {
    case at::kHalf:
      dtype = DType::Half;
      return true;
    case at::kBFloat16:
      dtype = DType::BFloat16;
      return true;
    case at::kFloat:
      dtype = DType::Float;
      return true;
    case at::kDouble:
      dtype = DType::Double;
      return true;
    case at::kComplexFloat:
      dtype = DType::ComplexFloat;
      return true;
    case at::kComplexDouble:
      dtype = DType::ComplexDouble;
      return true;
    default:
      return false;
  }
}

at::ScalarType math_type(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

bool equals(const at::Scalar& number, int value) {
  return !number.isSymbolic() && number.equal(value);
}

namespace {

// A number that every kernel dtype of the same category rounds as torch does.
bool take_number(const at::Scalar& number, at::ScalarType input_type, double* out) {
  // A symbolic number belongs to a tracer; a wide integer would be rounded twice on its way through double.
  if (number.isSymbolic() || number.type() == at::kUInt64) {
    return false;
  }
  if (number.isBoolean()) {
    out[0] = number.toBool() ? 1 : 0;
    out[1] = 0;
    return true;
  }
  if (number.isComplex()) {
    const auto value = number.toComplexDouble();
    out[0] = value.real();
    out[1] = value.imag();
    return at::isComplexType(input_type);
  }
  if (number.isIntegral(/*includeBool=*/false)) {
    constexpr int64_t kExact = int64_t(1) << 53;
    const int64_t value = number.toLong();
    out[0] = static_cast<double>(value);
    out[1] = 0;
    return value >= -kExact && value <= kExact;
  }
  out[0] = number.toDouble();
  out[1] = 0;
  return true;
}

// torch refuses a parameter that overflows the arithmetic dtype, and a boolean; its words come with the aten formula.
bool take_parameter(const at::Scalar& number, at::ScalarType input_type, double* out) {
  if (number.isBoolean() || !take_number(number, input_type, out)) {
    return false;
  }
  if (at::toRealValueType(math_type(input_type)) == at::kFloat) {
    constexpr double kMost = std::numeric_limits<float>::max();
    for (int part = 0; part < 2; ++part) {
      if (std::isfinite(out[part]) && std::abs(out[part]) > kMost) {
        return false;
      }
    }
  }
  return true;
}

// The value of a 0-dim CPU tensor: torch treats it as a number of its dtype.
bool take_scalar_tensor(const at::Tensor& tensor, at::ScalarType input_type, double* out) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      out[0] = *tensor.const_data_ptr<double>();
      return true;
    case at::kFloat:
      out[0] = *tensor.const_data_ptr<float>();
      return true;
    case at::kHalf:
      out[0] = static_cast<float>(*tensor.const_data_ptr<at::Half>());
      return true;
    case at::kBFloat16:
      out[0] = static_cast<float>(*tensor.const_data_ptr<at::BFloat16>());
      return true;
    case at::kLong:
      return take_number(*tensor.const_data_ptr<int64_t>(), input_type, out);
    default:
      return false;
  }
}

void round_number(DType dtype, double* number) {
  const auto value = static_cast<float>(number[0]);
  if (dtype == DType::Half) {
    number[0] = widen(narrow<Half>(value));
  } else if (dtype == DType::BFloat16) {
    number[0] = widen(narrow<BFloat16>(value));
  }
}

void check_shape(const at::Tensor& input, const at::Tensor& operand) {
  if (operand.sizes() == input.sizes()) {
    return;
  }
  const auto shape = at::infer_size_dimvector(input.sizes(), operand.sizes());
  TORCH_CHECK(at::IntArrayRef(shape) == input.sizes(), "output with shape ", input.sizes(),
              " doesn't match the broadcast shape ", at::IntArrayRef(shape));
}

// How many elements of memory lie from the first to behind the last.
inline int64_t span_of(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) {
    return tensor.numel();
  }
  const at::IntArrayRef sizes = tensor.sizes();
  const at::IntArrayRef strides = tensor.strides();
  int64_t last = 0;
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    last += (sizes[dim] - 1) * strides[dim];
  }
  return last + 1;
}

// Bytes from the first to behind the last element.
std::pair<uintptr_t, uintptr_t> byte_range(const at::Tensor& tensor) {
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + span_of(tensor) * tensor.element_size()};
}

// A storage may have been shrunk or given back since the tensor was made of it: what lies behind its end is not the tensor's.
inline void check_allocated(const at::Tensor& tensor, const char* op, const char* role, const char* name) {
  if (tensor.numel() == 0) {
    return;
  }
  const size_t needed = static_cast<size_t>(tensor.storage_offset() + span_of(tensor)) * tensor.element_size();
  const size_t held = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()->nbytes();
  TORCH_CHECK(needed <= held, op, "(): ", role, " '", name, "' has lost its memory: its storage holds ", held,
              " bytes and its elements take ", needed, "; resize the storage before the call, or use a tensor that has memory");
}

} // namespace

void check_memory(const Call& call) {
  const at::Tensor& input = *call.input;
  const OpInfo& op = call.info();
  check_allocated(input, op.name, "argument", "input");
  TORCH_CHECK(!overlaps_itself(input),
              "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
              "Please clone() the tensor before performing the operation.");
  for (int i = 0; i < op.operands; ++i) {
    const at::Tensor* tensor = call.operands[i].tensor;
    if (tensor == nullptr) {
      continue;
    }
    check_allocated(*tensor, op.name, "argument", op.operand_names[i]);
    if (share_storage(input, *tensor) && !tensor->is_same(input)) {
      at::assert_no_partial_overlap(input, *tensor);
    }
  }
}

bool readable_in_place(const at::Tensor& input, const at::Tensor& operand) {
  if (!share_storage(input, operand) || operand.numel() == 0) {
    return true;
  }
  const auto status = at::get_overlap_status(input, operand);
  if (status == at::MemOverlapStatus::Full || status == at::MemOverlapStatus::No) {
    return true;
  }
  if (input.const_data_ptr() == operand.const_data_ptr() && input.sizes() == operand.sizes() &&
      input.strides() == operand.strides()) {
    return true;
  }
  const auto [input_begin, input_end] = byte_range(input);
  const auto [operand_begin, operand_end] = byte_range(operand);
  return input_end <= operand_begin || operand_end <= input_begin;
}

namespace {

// The tensors of a plan while its dimensions are still those of the input.
struct Layout {
  static constexpr int kMostEntries = 7;
  struct Entry {
    Arg* arg;
    int64_t* strides;
  };
  int ndim = 0;
  at::IntArrayRef sizes;
  // Tensors may have any number of dimensions, and usually have few.
  c10::SmallVector<int64_t, kMostEntries * 6> strides;
  Entry entries[kMostEntries];
  int count = 0;

  explicit Layout(const at::Tensor& input)
      : ndim(static_cast<int>(input.dim())), sizes(input.sizes()), strides(kMostEntries * input.dim()) {}

  void add(Arg& arg, const at::Tensor& tensor, void* data, DType dtype) {
    arg.data = data;
    arg.dtype = dtype;
    Entry& entry = entries[count];
    entry.arg = &arg;
    entry.strides = strides.data() + int64_t(count++) * ndim;
    const int offset = ndim - static_cast<int>(tensor.dim());
    for (int dim = 0; dim < ndim; ++dim) {
      const bool broadcast = dim < offset || tensor.size(dim - offset) == 1;
      entry.strides[dim] = broadcast ? 0 : tensor.stride(dim - offset);
    }
  }

  // Sorts the dimensions by the first tensor's strides, innermost first, merges what every tensor can walk as one, and
  // writes the result into the plan. False if too many remain.
  bool finish(Shape& shape) {
    shape.numel = 1;
    c10::SmallVector<int, 12> order(ndim);
    int kept = 0;
    for (int dim = ndim - 1; dim >= 0; --dim) {
      shape.numel *= sizes[dim];
      if (sizes[dim] != 1) {
        int at = kept++;
        for (; at > 0 && before(dim, order[at - 1]); --at) {
          order[at] = order[at - 1];
        }
        order[at] = dim;
      }
    }
    if (shape.numel == 0) {
      return true;
    }
    shape.ndim = 0;
    for (int i = 0; i < kept; ++i) {
      const int dim = order[i];
      if (shape.ndim > 0 && merges(shape, dim)) {
        shape.sizes[shape.ndim - 1] *= sizes[dim];
        continue;
      }
      if (shape.ndim == kMaxDims) {
        return false;
      }
      shape.sizes[shape.ndim] = sizes[dim];
      for (int entry = 0; entry < count; ++entry) {
        entries[entry].arg->strides[shape.ndim] = entries[entry].strides[dim];
      }
      ++shape.ndim;
    }
    if (shape.ndim == 0) {
      shape.ndim = 1;
      shape.sizes[0] = 1;
    }
    return true;
  }

 private:
  bool before(int a, int b) const {
    for (int entry = 0; entry < count; ++entry) {
      const int64_t stride_a = entries[entry].strides[a];
      const int64_t stride_b = entries[entry].strides[b];
      // An expanded tensor says nothing about the order.
      if (stride_a != stride_b && stride_a != 0 && stride_b != 0) {
        return stride_a < stride_b;
      }
    }
    return false;
  }

  bool merges(const Shape& shape, int dim) const {
    const int last = shape.ndim - 1;
    for (int entry = 0; entry < count; ++entry) {
      if (entries[entry].strides[dim] != entries[entry].arg->strides[last] * shape.sizes[last]) {
        return false;
      }
    }
    return true;
  }
};

bool fits_beside(DType operand, DType input) {
  const bool reduced = input == DType::Half || input == DType::BFloat16;
  return operand == input || (reduced && operand == DType::Float);
}

// Puts an operand into a plan: as a number where torch treats it as one, otherwise into the layout. False where no
// kernel takes it.
bool place_operand(const Operand& operand, const at::Tensor& value, const at::Tensor& input, DType dtype, Arg& arg,
                   Layout& layout) {
  if (operand.tensor == nullptr) {
    return take_number(operand.number, input.scalar_type(), arg.number);
  }
  DType operand_dtype = dtype;
  const bool known = kernel_dtype(value.scalar_type(), operand_dtype);
  if (value.dim() == 0 && value.is_cpu() && (input.dim() > 0 || (known && operand_dtype == dtype)) &&
      !at::isComplexType(value.scalar_type())) {
    return take_scalar_tensor(value, input.scalar_type(), arg.number);
  }
  if (!known || !fits_beside(operand_dtype, dtype) || value.device() != input.device()) {
    return false;
  }
  // A 0-dim tensor takes part in promotion as a number only: its own, wider dtype is not used.
  if (value.dim() == 0 && operand_dtype != dtype) {
    return false;
  }
  layout.add(arg, value, const_cast<void*>(value.const_data_ptr()), operand_dtype);
  return true;
}

// Calls whose bits only torch's own kernel gives. On a CPU it rounds a product and a sum once in the body of a row and twice
// at its end, or the other way round. On a GPU its product with a complex number is number * input: of the two products in
// an imaginary part the compiler fuses the first with the sum, so that the order shows in the last bit.
bool needs_torch_kernel(const Call& call) {
  if (call.op == op_index<Add>) {
    return call.input->is_cpu() && !equals(call.parameter, 1) && !equals(call.parameter, -1);
  }
  if (call.op != op_index<Mul> || !call.input->is_complex()) {
    return false;
  }
  return call.input->is_cpu() || (call.operands[0].tensor == nullptr && call.operands[0].number.isComplex());
}

} // namespace

bool plan_forward(const Call& call, Forward& forward) {
  const at::Tensor& input = *call.input;
  check_memory(call);
  DType dtype;
  if (!kernel_dtype(input.scalar_type(), dtype) || device_kernels(input.device().type()) == nullptr ||
      needs_torch_kernel(call)) {
    return false;
  }
  ForwardPlan& plan = forward.plan;
  if (call.info().parameter != nullptr && !take_parameter(call.parameter, input.scalar_type(), plan.parameter)) {
    return false;
  }
  const at::Tensor* values[2] = {nullptr, nullptr};
  for (int i = 0; i < call.info().operands; ++i) {
    const at::Tensor* tensor = call.operands[i].tensor;
    values[i] = tensor;
    if (tensor == nullptr) {
      continue;
    }
    check_shape(input, *tensor);
    if (!readable_in_place(input, *tensor)) {
      forward.copies[i] = tensor->detach().clone();
      values[i] = &forward.copies[i];
    }
  }

  plan.op = call.op;
  plan.dtype = dtype;
  Layout layout(input);
  layout.add(plan.input, input, nullptr, dtype);
  for (int i = 0; i < call.info().operands; ++i) {
    static const at::Tensor none;
    if (!place_operand(call.operands[i], values[i] != nullptr ? *values[i] : none, input, dtype, plan.operands[i],
                       layout)) {
      return false;
    }
  }
  if (call.op == op_index<Add> && plan.operands[0].data == nullptr && input.is_cpu()) {
    // torch's add rounds a number to the input's dtype first; its mul does not, nor does its add on a GPU.
    round_number(dtype, plan.operands[0].number);
  }
  return layout.finish(plan.shape);
}

// The kept value has the input's strides where those are dense, and is contiguous otherwise: a copy of the input's
// dimension order either way, so the plan's merged dimensions are only kept when they fit it too.
void set_kept(Forward& forward, const Call& call, const at::Tensor& kept) {
  ForwardPlan& plan = forward.plan;
  if (kept.strides() == call.input->strides()) {
    plan.kept = plan.input;
    plan.kept.data = kept.mutable_data_ptr();
    return;
  }
  Layout layout(*call.input);
  layout.add(plan.input, *call.input, nullptr, plan.dtype);
  layout.add(plan.kept, kept, kept.mutable_data_ptr(), plan.dtype);
  for (int i = 0; i < call.info().operands; ++i) {
    Arg& arg = plan.operands[i];
    if (arg.data != nullptr) {
      const at::Tensor& value = forward.copies[i].defined() ? forward.copies[i] : *call.operands[i].tensor;
      layout.add(arg, value, arg.data, arg.dtype);
    }
  }
  const bool fits = layout.finish(plan.shape);
  TORCH_INTERNAL_ASSERT(fits, "safe_inplace: a copy of the input needs more dimensions than the input");
}

void run_forward(Forward& forward, const Call& call) {
  ForwardPlan& plan = forward.plan;
  if (plan.shape.numel == 0) {
    return;
  }
  const at::Tensor& input = *call.input;
  plan.input.data = input.mutable_data_ptr();
  const c10::OptionalDeviceGuard guard(input.is_cpu() ? std::nullopt : std::make_optional(input.device()));
  device_kernels(input.device().type())->forward(plan);
}

void check_factors(const Backward& backward) {
  const OpInfo& op = infos[backward.op];
  check_allocated(backward.grad, op.node, "the gradient of", "input");
  for (int i = 0; i < 3; ++i) {
    const at::Tensor& value = backward.factors[i].tensor;
    if (value.defined()) {
      check_shape(backward.grad, value);
      check_allocated(value, op.node, "the saved", i < op.operands ? op.operand_names[i] : "input");
    }
  }
}

bool plan_backward(const Backward& backward, BackwardPlan& plan) {
  const at::Tensor& grad = backward.grad;
  DType dtype;
  if (!kernel_dtype(grad.scalar_type(), dtype) || device_kernels(grad.device().type()) == nullptr) {
    return false;
  }
  plan.op = backward.op;
  plan.dtype = dtype;
  const OpInfo& op = infos[backward.op];
  if (op.parameter != nullptr && !take_parameter(backward.parameter, grad.scalar_type(), plan.parameter)) {
    return false;
  }
  Layout layout(grad);
  layout.add(plan.grad, grad, const_cast<void*>(grad.const_data_ptr()), dtype);
  bool placed[3] = {false, false, false};
  for (int i = 0; i < 3; ++i) {
    const at::Tensor& out = backward.grads[i];
    plan.wanted[i] = out.defined();
    if (!plan.wanted[i]) {
      continue;
    }
    DType out_dtype;
    if (!kernel_dtype(out.scalar_type(), out_dtype) || !fits_beside(out_dtype, dtype)) {
      return false;
    }
    plan.numel[i] = out.numel();
    plan.reduced[i] = out.numel() != grad.numel();
    layout.add(plan.grads[i], out, out.mutable_data_ptr(), out_dtype);
    if (op.partials[i].factor == Factor::One) {
      continue;
    }
    const int factor = int(op.partials[i].factor);
    if (placed[factor]) {
      continue;
    }
    placed[factor] = true;
    const FactorValue& value = backward.factors[factor];
    const Operand operand = value.tensor.defined() ? Operand(value.tensor) : Operand(value.number);
    if (!place_operand(operand, value.tensor, grad, dtype, plan.factors[factor], layout)) {
      return false;
    }
  }
  return layout.finish(plan.shape);
}

void run_backward(const BackwardPlan& plan, const at::Tensor& grad) {
  if (plan.shape.numel == 0) {
    return;
  }
  const c10::OptionalDeviceGuard guard(grad.is_cpu() ? std::nullopt : std::make_optional(grad.device()));
  device_kernels(grad.device().type())->backward(plan);
}

} // namespace safe_inplace
