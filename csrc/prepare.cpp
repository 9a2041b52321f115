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
bool place_operands(const Call& call, Prepared& prepared, Layout& layout) {
  const at::Tensor& input = *call.input;
  ForwardPlan& plan = prepared.plan;
  for (int i = 0; i < call.info().operands; ++i) {
    const Operand& operand = call.operands[i];
    const at::Tensor* const tensor = prepared.copies[i].defined() ? &prepared.copies[i] : operand.tensor;
    if (!place_operand(operand, tensor, input, plan.dtype, plan.operands[i], layout)) {
      return false;
    }
  }
  if (call.info().rounds_numbers && plan.operands[0].data == nullptr && input.is_cpu()) {
    round_number(plan.dtype, plan.operands[0].number);
  }
  return true;
}

LeftToTorch left_to_torch(const Call& call) {
  const auto decide = call.info().left_to_torch;
  if (decide == nullptr) {
    return LeftToTorch::Nothing;
  }
  const Operand& first = call.operands[0];
  return decide({call.input->is_cpu(), call.input->is_complex(), equals(call.parameter, 1) || equals(call.parameter, -1),
                 first.tensor == nullptr && first.number.isComplex()});
}

} // namespace

Prepared prepare(const Call& call) {
  Prepared prepared;
  const at::Tensor& input = *call.input;
  ForwardPlan& plan = prepared.plan;
  check_memory(call);
  const LeftToTorch left = left_to_torch(call);
  if (left != LeftToTorch::Nothing) {
    prepared.by = left == LeftToTorch::Write ? Prepared::By::TorchKernel : Prepared::By::Fallback;
    return prepared;
  }
  if (!kernel_dtype(input.scalar_type(), plan.dtype) ||
      (call.info().parameter != nullptr && !take_parameter(call.parameter, input.scalar_type(), plan.parameter))) {
    return prepared;
  }
  each_tensor(call, [&](const at::Tensor& tensor, int i) {
    check_shape(input, tensor);
    if (!readable_in_place(input, tensor)) {
      prepared.copies[i] = tensor.detach().clone();
    }
  });
  plan.op = call.op;
  Layout layout(input);
  layout.add(plan.input, input, nullptr, plan.dtype);
  if (place_operands(call, prepared, layout) && layout.finish(plan.shape)) {
    prepared.by = Prepared::By::Kernel;
  }
  return prepared;
}

// The kept value has the input's strides where those are dense, and is contiguous otherwise: a copy of the input's
// dimension order either way, so the plan's merged dimensions are only kept when they fit it too.
void set_kept(Prepared& prepared, const Call& call, const at::Tensor& kept) {
  ForwardPlan& plan = prepared.plan;
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
  const at::Tensor& input = *call.input;
  plan.input.data = input.mutable_data_ptr();
  const c10::OptionalDeviceGuard guard(input.is_cpu() ? std::nullopt : std::make_optional(input.device()));
  backend_of(input.device().type())->forward(plan);
}

} // namespace safe_inplace
