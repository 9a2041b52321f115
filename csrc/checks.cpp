#include "checks.h"

#include <ATen/ExpandUtils.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/TensorBody.h>
#include <c10/core/InferenceMode.h>

#include <utility>

#include "extent.h"

namespace safe_inplace {

void check_writable(const at::Tensor& input) {
  TORCH_CHECK(!input.is_inference() || c10::InferenceMode::is_enabled(),
              "Inplace update to inference tensor outside InferenceMode is not allowed.You can make a clone to get a "
              "normal tensor before doing inplace update.See https://github.com/pytorch/rfcs/pull/17 for more details.");
}

void check_shape(const at::Tensor& input, const at::Tensor& operand) {
  if (operand.sizes() == input.sizes()) {
    return;
  }
  const auto shape = at::infer_size_dimvector(input.sizes(), operand.sizes());
  TORCH_CHECK(at::IntArrayRef(shape) == input.sizes(), "output with shape ", input.sizes(), " doesn't match the broadcast shape ",
              at::IntArrayRef(shape));
}

void check_devices(const Call& call) {
  each_tensor(call, [&](const at::Tensor& operand, int i) {
    TORCH_CHECK(!operand.is_meta() || call.input->is_meta(), call.name(),
                "(): Expected all tensors to be on the same device, but argument '", call.info().operand_names[i],
                "' is on meta and input is on ", call.input->device(), "; move it with .to(input.device)");
  });
}

namespace {

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

} // namespace

void check_allocated(const at::Tensor& tensor, const char* op, const char* role, const char* name) {
  if (tensor.numel() == 0) {
    return;
  }
  const size_t needed = static_cast<size_t>(tensor.storage_offset() + span_of(tensor)) * tensor.element_size();
  const size_t held = tensor.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl()->nbytes();
  TORCH_CHECK(needed <= held, op, "(): ", role, " '", name, "' has lost its memory: its storage holds ", held,
              " bytes and its elements take ", needed, "; resize the storage before the call, or use a tensor that has memory");
}

void check_memory(const Call& call) {
  const at::Tensor& input = *call.input;
  const bool written = call.form == Form::InPlace;
  check_allocated(input, call.name(), "argument", "input");
  TORCH_CHECK(!written || !overlaps_itself(input),
              "unsupported operation: more than one element of the written-to tensor refers to a single memory location. "
              "Please clone() the tensor before performing the operation.");
  each_tensor(call, [&](const at::Tensor& tensor, int i) {
    check_allocated(tensor, call.name(), "argument", call.info().operand_names[i]);
    if (written && share_storage(input, tensor) && !tensor.is_same(input)) {
      at::assert_no_partial_overlap(input, tensor);
    }
  });
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

} // namespace safe_inplace
