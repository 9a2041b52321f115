#include <torch/csrc/python_headers.h>

#include "ownership.h"

#include <ATen/CachedTensorUtils.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/generated/Functions.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/utils/grad_layout_contract.h>
#include <torch/csrc/autograd/variable.h>

#include <pybind11/pybind11.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string_view>
#include <typeinfo>

#include "call.h"
#include "counts.h"
#include "temporaries.h"

namespace safe_inplace {

namespace {

// Its memory is all of an allocation, and torch's own: what torch did not allocate (NumPy, DLPack, another process) is not resizable,
// and its owner does not count here. Nor is it pinned memory, which a device may still be reading (a copy with non_blocking).
bool is_own_allocation(const at::Tensor& tensor) {
  const c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  return tensor.is_non_overlapping_and_dense() && storage->resizable() &&
         (!tensor.is_cpu() || storage->allocator() == c10::GetCPUAllocator()) &&
         static_cast<size_t>(tensor.numel()) * tensor.element_size() <= storage->nbytes();
}

} // namespace

bool is_sole_owner(const at::Tensor& tensor, size_t handles) {
  if (!tensor.defined() || !has_kernel(tensor)) {
    return false;
  }
  // Knows about the handles that CUDA graph trees keep. The storage has another where a view, a detached alias, or the storage
  // object itself is in somebody's hands.
  return at::caching::adjusted_use_count(tensor) == handles && tensor.storage().use_count() == 1 && is_own_allocation(tensor);
}

bool graph_is_released() {
  return torch::autograd::get_current_graph_task_id() != -1 && !torch::autograd::get_current_graph_task_keep_graph();
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

namespace {

namespace generated = torch::autograd::generated;

template <class... Nodes>
bool is_one_of(const torch::autograd::Node& node) {
  return ((typeid(node) == typeid(Nodes)) || ...);
}

// What a node may hand on of a gradient as it came, or as a view of it.
enum class HandsOn { nothing, all, parts };

// Of torch's generated nodes, those with several gradients compute them afresh, but for these; one with a single gradient may be a
// view's. Nodes that others wrote may do anything. Ours look to it themselves.
HandsOn hands_on(const torch::autograd::Node& node) {
  const std::string_view type = typeid(node).name();
  if (type.starts_with("N12safe_inplace")) {
    return HandsOn::nothing;
  }
  if (!type.starts_with("N5torch8autograd9generated") || is_one_of<generated::CatBackward0, generated::StackBackward0>(node)) {
    return HandsOn::parts;
  }
  const bool hands_on =
      node.num_outputs() == 1 ||
      is_one_of<generated::AddBackward0, generated::SubBackward0, generated::RsubBackward0, generated::AddcmulBackward0,
                generated::AddcdivBackward0, generated::AddmmBackward0, generated::AddmvBackward0, generated::AddrBackward0,
                generated::AddbmmBackward0, generated::BaddbmmBackward0>(node);
  return hands_on ? HandsOn::all : HandsOn::nothing;
}

// AccumulateGrad keeps a gradient of which nobody else holds the TensorImpl; who else sees the memory it does not ask, and a view's
// node on the way has made a new TensorImpl. What is added to a `.grad` that is there is not kept, unless a hook takes that away.
class Keepers {
 public:
  using Leaf = torch::autograd::AccumulateGrad;
  using Visit = c10::function_ref<bool(const torch::autograd::Edge&, Leaf&)>;

  // Of leaves of that size; true from `visit` ends the search.
  Keepers(int64_t elements, Visit visit) : elements_(elements), visit_(visit) {}

  // Whether the search ended: by a leaf behind the edge that may keep the gradient, or a part of it, as its own, or since it would
  // take too long.
  bool behind(const torch::autograd::Edge& edge, bool parts) {
    torch::autograd::Node* const node = edge.function.get();
    if (node == nullptr) {
      return false;
    }
    if (auto* leaf = dynamic_cast<Leaf*>(node)) {
      const int64_t wanted = leaf->variable.numel();
      return (wanted == elements_ || (parts && wanted < elements_)) && visit_(edge, *leaf);
    }
    const HandsOn handed = hands_on(*node);
    if (handed == HandsOn::nothing) {
      return false;
    }
    // Longer than any chain of residual sums; past it a copy too many.
    if (--budget_ == 0) {
      return true;
    }
    const auto& edges = node->next_edges();
    return std::any_of(edges.begin(), edges.end(),
                       [&](const torch::autograd::Edge& next) { return behind(next, parts || handed == HandsOn::parts); });
  }

 private:
  int64_t elements_;
  Visit visit_;
  int budget_ = 2000;
};

bool adds_in_place(torch::autograd::AccumulateGrad& leaf) {
  return leaf.variable.grad().defined() && !has_hooks(leaf) && leaf.tensor_post_acc_grad_hooks() == nullptr;
}

bool leaf_may_keep(const at::Tensor& gradient, const torch::autograd::Edge& edge) {
  const auto keeps = [](const auto&, torch::autograd::AccumulateGrad& leaf) { return !adds_in_place(leaf); };
  return Keepers(gradient.numel(), keeps).behind(edge, /*parts=*/false);
}

} // namespace

void keep_apart(std::vector<at::Tensor>& gradients, const torch::autograd::edge_list& edges) {
  if (c10::GradMode::is_enabled()) {
    return; // nothing is kept while higher derivatives are recorded
  }
  for (size_t i = 0; i < gradients.size(); ++i) {
    at::Tensor& gradient = gradients[i];
    if (!gradient.defined() || !has_kernel(gradient) || is_sole_owner(gradient) || !leaf_may_keep(gradient, edges[i])) {
      continue;
    }
    const auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(edges[i].function.get());
    // In the layout that the leaf would copy it to otherwise.
    gradient = leaf != nullptr ? torch::autograd::utils::clone_obey_contract(gradient, leaf->variable) : gradient.clone();
  }
}

namespace {

bool lies_in(const at::Tensor& tensor, const c10::StorageImpl* storage) {
  return tensor.defined() && tensor.has_storage() && tensor.storage().unsafeGetStorageImpl() == storage;
}

} // namespace

bool keep_out_of_leaves(const at::Tensor& saved, const torch::autograd::Node& node) {
  const bool in_a_pass = torch::autograd::get_current_graph_task_id() != -1;
  if (!in_a_pass || c10::GradMode::is_enabled() || !saved.has_storage() || hands_on(node) != HandsOn::parts) {
    return true;
  }
  torch::autograd::edge_list leaves;
  const c10::StorageImpl* const storage = saved.storage().unsafeGetStorageImpl();
  const auto note = [&](const torch::autograd::Edge& found, torch::autograd::AccumulateGrad& leaf) {
    if (!lies_in(leaf.variable.grad(), storage)) {
      leaves.push_back(found);
    }
    return false;
  };
  Keepers keepers(saved.numel(), note);
  for (const torch::autograd::Edge& edge : node.next_edges()) {
    if (keepers.behind(edge, /*parts=*/true)) {
      return false;
    }
  }
  if (!leaves.empty()) {
    // Not kept alive: where it is gone, no leaf has it.
    torch::autograd::Engine::get_default_engine().queue_callback(
        [leaves = std::move(leaves), weak = saved.storage().getWeakStorageImpl()]() {
          const at::NoGradGuard no_grad;
          const auto storage = weak.lock();
          for (const torch::autograd::Edge& edge : leaves) {
            const at::Tensor& leaf = static_cast<torch::autograd::AccumulateGrad&>(*edge.function).variable;
            at::Tensor& grad = leaf.mutable_grad();
            if (storage && lies_in(grad, storage.get())) {
              grad = torch::autograd::utils::clone_obey_contract(grad, leaf);
            }
          }
        });
  }
  return true;
}

bool may_overwrite_in_backward(const at::Tensor& tensor, size_t handles) {
  return !c10::GradMode::is_enabled() && !tensor.requires_grad() && graph_is_released() && is_sole_owner(tensor, handles) &&
         readers_are_ordered(tensor.device());
}

namespace {

using torch::autograd::AutogradMeta;
using torch::autograd::DifferentiableViewMeta;

// What rebase_history would find to go through.
const DifferentiableViewMeta* recorded_view(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_view_autograd_meta(tensor);
  return meta != nullptr && meta->has_bw_view() ? meta : nullptr;
}

// Whether anybody but the view holds its base.
bool is_held(const at::Tensor& base) {
  const bool has_object = base.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() != nullptr;
  return !is_forgotten_by_python(base) || base.use_count() != (has_object ? 2 : 1) || base.weak_use_count() != 1;
}

bool covers(const at::Tensor& view, const at::Tensor& base) {
  return view.numel() == base.numel() && view.storage_offset() == base.storage_offset() && view.is_non_overlapping_and_dense() &&
         base.is_non_overlapping_and_dense();
}

// What somebody has left with a tensor, or with the node that made it, and may ask for.
std::optional<Event> left_with(const at::Tensor& tensor) {
  const AutogradMeta* meta = torch::autograd::impl::get_autograd_meta(tensor);
  if (meta == nullptr) {
    return std::nullopt;
  }
  if (meta->retains_grad_ || meta->grad_.defined() || meta->grad_dtype_ || meta->allow_grad_dtype_mismatch_) {
    return Event::ViewGradient;
  }
  const bool hooks = !meta->hooks_.empty() || meta->post_acc_grad_hooks_ != nullptr || !meta->name_.empty() ||
                     (meta->grad_fn_ && has_hooks(*meta->grad_fn_));
  return hooks ? std::make_optional(Event::ViewHooks) : std::nullopt;
}

// Why somebody might see through the base what becomes of the view; nothing if nobody can.
std::optional<Event> why_a_view(const at::Tensor& view, const DifferentiableViewMeta& meta) {
  const auto& info = meta.get_backward_view();
  const at::Tensor& base = info.base_;
  // To forward mode a view of another base, or none; elements of another type.
  if (!meta.shared_view_info() || info.has_view_fn()) {
    return Event::ViewOfAnotherKind;
  }
  // By Python, another view, a node that saved it.
  if (is_held(base)) {
    return Event::ViewBaseHeld;
  }
  // By a detached alias, a node that saved it as its result, the storage object itself.
  if (!share_storage(view, base) || view.storage().use_count() != 2) {
    return Event::ViewMemoryHeld;
  }
  // as_strided reaches from a part into the rest; its gradient needs the whole.
  if (!covers(view, base)) {
    return Event::ViewOfPart;
  }
  const auto left = left_with(view);
  return left ? left : left_with(base);
}

} // namespace

void own_view(const at::Tensor& tensor) {
  if (recorded_view(tensor) == nullptr) {
    return;
  }
  // Python's garbage collector reads what is exchanged here, from any thread.
  const pybind11::gil_scoped_acquire gil;
  const auto why = why_a_view(tensor, *recorded_view(tensor));
  count(why.value_or(Event::ViewOwn));
  if (!why) {
    // The version counter is the tensor's, and stays the one that it shared with the base.
    tensor.unsafeGetTensorImpl()->set_autograd_meta(std::make_unique<AutogradMeta>());
  }
}

namespace {

// Whether the handles are the last ones on the tensor and its memory, or, of a view, the only ones beside a base that nobody else can
// reach: then nobody can from now on.
bool nobody_else_sees(const at::Tensor& tensor, size_t handles) {
  if (!tensor.is_view()) {
    return is_sole_owner(tensor, handles);
  }
  const pybind11::gil_scoped_acquire gil;
  const auto* meta = recorded_view(tensor);
  if (meta == nullptr || tensor.use_count() != handles || why_a_view(tensor, *meta)) {
    return false;
  }
  const at::Tensor& base = meta->get_backward_view().base_;
  return has_kernel(base) && is_own_allocation(base) && hide_from_python(base);
}

} // namespace

bool may_overwrite_saved(const at::Tensor& saved, size_t handles) {
  if (c10::GradMode::is_enabled() || !graph_is_released() || !readers_are_ordered(saved.device())) {
    return false;
  }
  if (saved.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj() == nullptr) {
    return nobody_else_sees(saved, handles);
  }
  // Its Python object holds another handle. Nobody finds it between the first question and the last.
  const pybind11::gil_scoped_acquire gil;
  return is_forgotten_by_python(saved) && nobody_else_sees(saved, handles + 1) && hide_from_python(saved);
}

bool may_take_over(const at::Tensor& temporary) {
  // On other devices a reader on another stream may be on its way, and nothing here would know.
  if (!temporary.is_cpu() || temporary.storage_offset() != 0 || temporary.weak_use_count() != 1 || left_with(temporary) ||
      (temporary.is_leaf() && temporary.requires_grad())) {
    return false;
  }
  // A small result must not keep a large memory.
  if (temporary.storage().nbytes() != static_cast<size_t>(temporary.numel()) * temporary.element_size()) {
    return false;
  }
  return nobody_else_sees(temporary, /*handles=*/1);
}

void leave_view(const at::Tensor& tensor) {
  if (recorded_view(tensor) != nullptr) {
    count(Event::ViewLeftToTorch);
  }
}

} // namespace safe_inplace
