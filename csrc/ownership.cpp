#include "ownership.h"

#include <ATen/CachedTensorUtils.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include "operands.h"

namespace safe_inplace {

bool is_sole_owner(const at::Tensor& tensor, size_t handles) {
  if (!tensor.defined() || !is_plain(tensor) || !tensor.is_non_overlapping_and_dense()) {
    return false;
  }
  // Knows about the handles that CUDA graph trees keep.
  if (at::caching::adjusted_use_count(tensor) != handles) {
    return false;
  }
  const c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  // A view, a detached alias, or the storage object itself in somebody's hands. Memory that torch did not allocate
  // (NumPy, DLPack, another process) is not resizable, and its owner does not count here.
  return tensor.storage().use_count() == 1 && storage->resizable() &&
      static_cast<size_t>(tensor.numel()) * tensor.element_size() <= storage->nbytes();
}

bool graph_is_released() {
  return torch::autograd::get_current_graph_task_id() != -1 &&
      !torch::autograd::get_current_graph_task_keep_graph();
}

namespace {

bool has_hooks(torch::autograd::Node& node) {
  return !node.pre_hooks().empty() || !node.post_hooks().empty() || !node.tensor_pre_hooks().empty() ||
      !node.retains_grad_hooks().empty();
}

// The engine orders a consumer after the producer of a gradient, never after another consumer that ran on another
// stream and has dropped its handle since. Such a reader exists only if the graph spans streams, or if a hook put work
// on a stream of its own.
bool graph_stays_on_stream(c10::Stream current) {
  const auto* nodes = torch::autograd::get_current_graph_task_nodes_in_graph();
  if (nodes == nullptr) {
    return false;
  }
  for (torch::autograd::Node* node : *nodes) {
    if (has_hooks(*node)) {
      return false;
    }
    const auto stream = node->stream();
    if (stream.has_value() && stream->device() == current.device() && *stream != current) {
      return false;
    }
  }
  return true;
}

bool readers_are_ordered(const c10::Device device) {
  if (device.is_cpu()) {
    return true; // an operation has read its operands when it returns
  }
  const c10::Stream current = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
  // Walking the graph costs time in its size: once for each pass and stream.
  struct Answer {
    int task;
    c10::Stream stream;
    bool ordered;
  };
  thread_local std::optional<Answer> answer;
  const int task = torch::autograd::get_current_graph_task_id();
  if (!answer || answer->task != task || answer->stream != current) {
    answer = Answer{task, current, graph_stays_on_stream(current)};
  }
  return answer->ordered;
}

} // namespace

bool may_overwrite_in_backward(const at::Tensor& tensor, size_t handles) {
  return !c10::GradMode::is_enabled() && !tensor.requires_grad() && graph_is_released() &&
      is_sole_owner(tensor, handles) && readers_are_ordered(tensor.device());
}

} // namespace safe_inplace
