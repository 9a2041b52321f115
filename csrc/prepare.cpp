#include "prepare.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DeviceGuard.h>

#include "backend.h"
#include "checks.h"
#include "fallback.h"
#include "layout.h"
#include "numbers.h"

namespace safe_inplace {

namespace {

// Puts all operands into the plan. False where no kernel takes one of them.
bool place_operands(const Call& call, const Main& main, Prepared& prepared, Layout& layout) {
  ForwardPlan& plan = prepared.plan;
  for (int i = 0; i < call.info().operands; ++i) {
    const Operand& operand = call.operands[i];
    const at::Tensor* const tensor = prepared.copies[i].defined() ? &prepared.copies[i] : operand.tensor;
    if (!place_operand(operand, tensor, main, plan.operands[i], layout)) {
      return false;
    }
  }
  if (call.info().rounds_numbers && plan.operands[0].data == nullptr && main.device.is_cpu()) {
    round_number(plan.dtype, plan.operands[0].number);
  }
  return true;
}

LeftToTorch left_to_torch(const Call& call, at::ScalarType dtype) {
  const auto decide = call.info().left_to_torch;
  if (decide == nullptr) {
    return LeftToTorch::Nothing;
  }
  const Operand& first = call.operands[0];
  return decide({call.input->is_cpu(), at::isComplexType(dtype), equals(call.parameter, 1) || equals(call.parameter, -1),
                 first.tensor == nullptr && first.number.isComplex()});
}

// What the dtype of the result decides. False where the call is not for our kernels: then the call says whose it is.
bool takes_kernel(const Call& call, at::ScalarType dtype, Prepared& prepared) {
  const LeftToTorch left = left_to_torch(call, dtype);
  if (left != LeftToTorch::Nothing) {
    prepared.by = left == LeftToTorch::Write ? Prepared::By::TorchKernel : Prepared::By::Fallback;
    return false;
  }
  ForwardPlan& plan = prepared.plan;
  plan.op = call.op;
  return kernel_dtype(dtype, plan.dtype) &&
         (call.info().parameter == nullptr || take_parameter(call.parameter, dtype, plan.parameter));
}

// An input beside a result of another dtype is read in that dtype.
bool place_input(const at::Tensor& input, const Main& main, Arg& arg, Layout& layout) {
  DType dtype;
  const bool known = kernel_dtype(input.scalar_type(), dtype);
  if (!known || !fits_beside(dtype, main) || dtype_size[int(dtype)] > dtype_size[int(main.dtype)]) {
    return false;
  }
  layout.add(arg, input, const_cast<void*>(input.const_data_ptr()), dtype);
  return true;
}

Prepared prepare_in_place(const Call& call) {
  Prepared prepared;
  const at::Tensor& input = *call.input;
  ForwardPlan& plan = prepared.plan;
  check_memory(call);
  if (!takes_kernel(call, input.scalar_type(), prepared)) {
    return prepared;
  }
  each_tensor(call, [&](const at::Tensor& tensor, int i) {
    check_shape(input, tensor);
    if (!readable_in_place(input, tensor)) {
      prepared.copies[i] = tensor.detach().clone();
    }
  });
  Layout layout(input.sizes());
  layout.add(plan.input, input, nullptr, plan.dtype);
  const Main main{input.device(), input.scalar_type(), plan.dtype, input.dim()};
  if (place_operands(call, main, prepared, layout) && layout.finish(plan.shape)) {
    prepared.by = Prepared::By::Kernel;
  }
  return prepared;
}

Prepared prepare_out_of_place(const Call& call) {
  Prepared prepared;
  const at::Tensor& input = *call.input;
  ForwardPlan& plan = prepared.plan;
  check_memory(call);
  prepared.result = result_layout(call);
  const ResultLayout& result = *prepared.result;
  if (!takes_kernel(call, result.dtype, prepared)) {
    return prepared;
  }
  Layout layout(result.sizes);
  layout.add(plan.result, result.sizes, result.strides, nullptr, plan.dtype);
  const Main main{input.device(), result.dtype, plan.dtype, int64_t(result.sizes.size())};
  if (place_input(input, main, plan.input, layout) && place_operands(call, main, prepared, layout) && layout.finish(plan.shape)) {
    prepared.by = Prepared::By::Kernel;
  }
  return prepared;
}

// On the device of the tensor that is written.
void run_kernel(const ForwardPlan& plan, const at::Tensor& written) {
  const c10::OptionalDeviceGuard guard(written.is_cpu() ? std::nullopt : std::make_optional(written.device()));
  backend_of(written.device().type())->forward(plan);
}

} // namespace

Prepared prepare(const Call& call) {
  return call.form == Form::InPlace ? prepare_in_place(call) : prepare_out_of_place(call);
}

// The kept value has the input's strides where those are dense, and is contiguous otherwise: a copy of the input's
// dimension order either way, so the plan's merged dimensions are only kept when they fit it too.
void set_kept(Prepared& prepared, const Call& call, const at::Tensor& kept) {
  ForwardPlan& plan = prepared.plan;
  if (call.form == Form::OutOfPlace) {
    plan.kept = plan.result; // made in its layout
    plan.kept.data = kept.mutable_data_ptr();
    return;
  }
  if (kept.strides() == call.input->strides()) {
    plan.kept = plan.input;
    plan.kept.data = kept.mutable_data_ptr();
    return;
  }
  Layout layout(call.input->sizes());
  layout.add(plan.input, *call.input, nullptr, plan.dtype);
  layout.add(plan.kept, kept, kept.mutable_data_ptr(), plan.dtype);
  for (int i = 0; i < call.info().operands; ++i) {
    Arg& arg = plan.operands[i];
    if (arg.data != nullptr) {
      const at::Tensor& value = prepared.copies[i].defined() ? prepared.copies[i] : *call.operands[i].tensor;
      layout.add(arg, value, arg.data, arg.dtype);
    }
  }
  const bool fits = layout.finish(plan.shape);
  TORCH_INTERNAL_ASSERT(fits, "safe_inplace: a copy of the input needs more dimensions than the input");
}

void run(Prepared& prepared, const Call& call) {
  if (prepared.by != Prepared::By::Kernel) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return write_checked_by_fallback(call);
  }
  ForwardPlan& plan = prepared.plan;
  if (plan.shape.numel == 0) {
    return;
  }
  plan.input.data = call.input->mutable_data_ptr();
  run_kernel(plan, *call.input);
}

at::Tensor run_out_of_place(Prepared& prepared, const Call& call, std::optional<int> taken) {
  if (prepared.by != Prepared::By::Kernel) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return result_by_fallback(call);
  }
  at::Tensor result = taken ? take_over(*taken == 0 ? *call.input : *call.operands[*taken - 1].tensor, *prepared.result)
                            : make_fresh(*prepared.result, call.input->device());
  ForwardPlan& plan = prepared.plan;
  if (plan.shape.numel != 0) {
    plan.result.data = result.mutable_data_ptr();
    run_kernel(plan, result);
  }
  return result;
}

} // namespace safe_inplace
