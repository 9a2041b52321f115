#include <torch/csrc/utils/python_stub.h>

#include "autograd.h"

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include "checks.h"
#include "fallback.h"
#include "node.h"
#include "ownership.h"
#include "prepare.h"

namespace safe_inplace {

using torch::autograd::Edge;
using torch::autograd::SavedVariable;

namespace {

// Saved-tensor hooks run Python in the middle of a call. What they change of its tensors meanwhile would be in one half of the
// result and not in the other.
class Undisturbed {
 public:
  explicit Undisturbed(const Call& call) : call_(call) {
    look(*call.input, 0);
    each_tensor(call, [this](const at::Tensor& tensor, int i) { look(tensor, i + 1); });
  }

  void check() const {
    const Undisturbed now(call_);
    for (int i = 0; i <= call_.info().operands; ++i) {
      TORCH_CHECK(states_[i] == now.states_[i], call_.info().name, "(): a saved-tensor hook changed the argument '",
                  i == 0 ? "input" : call_.info().operand_names[i - 1],
                  "' while the op was saving it; nothing was written. Hooks may copy what they are given, not change it");
    }
  }

 private:
  struct State {
    const void* data = nullptr;
    at::DimVector sizes;
    at::DimVector strides;
    at::ScalarType dtype = at::ScalarType::Undefined;
    uint32_t version = 0;
    const torch::autograd::Node* history = nullptr;
    bool requires_grad = false;

    bool operator==(const State&) const = default;
  };

  void look(const at::Tensor& tensor, int i) {
    const auto& counter = tensor.unsafeGetTensorImpl()->version_counter();
    states_[i] = {tensor.numel() == 0 ? nullptr : tensor.const_data_ptr(),
                  at::DimVector(tensor.sizes()),
                  at::DimVector(tensor.strides()),
                  tensor.scalar_type(),
                  counter.enabled() ? counter.current_version() : 0,
                  tensor.grad_fn().get(),
                  tensor.requires_grad()};
  }

  const Call& call_;
  State states_[3];
};

bool has_forward_gradient(const Call& call) {
  return any_tensor(call, [](const at::Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); });
}

bool must_record(const Call& call) {
  if (!c10::GradMode::is_enabled()) {
    return false;
  }
  if (call.input->requires_grad() && call.input->is_view()) {
    // A view whose base has been written since learns of its history when somebody asks; until then it counts as a leaf
    // and would be refused.
    call.input->grad_fn();
  }
  return any_tensor(call, [](const at::Tensor& tensor) { return tensor.requires_grad(); });
}

// The node with its edges and with the operands that backward reads.
NodePtr<InplaceNode> record(const Call& call) {
  NodePtr<InplaceNode> node = make_node_of(call.op);
  node->parameter = call.parameter;
  node->add_next_edge(torch::autograd::impl::gradient_edge(*call.input));
  node->shapes[0] = shape_of(*call.input);
  for (int i = 0; i < call.info().operands; ++i) {
    const Operand& operand = call.operands[i];
    if (operand.tensor == nullptr) {
      node->numbers[i] = operand.number;
      node->add_next_edge(Edge());
      continue;
    }
    node->add_next_edge(operand.tensor->requires_grad() ? torch::autograd::impl::gradient_edge(*operand.tensor) : Edge());
    node->shapes[i + 1] = shape_of(*operand.tensor);
  }
  each_tensor(call, [&](const at::Tensor& tensor, int i) {
    if (node->needs(Factor(i))) {
      // What shares memory or a version counter with the input is overwritten, or looks so: save its value instead.
      const bool aliased = share_storage(tensor, *call.input);
      node->saved[i] = SavedVariable(aliased ? tensor.clone() : tensor, /*is_output=*/false);
    }
  });
  return node;
}

// The kept value by an operator that returns it: a mode may answer any of them with what it returned before.
at::Tensor kept_by_operator(const Call& call) {
  const at::Tensor& input = *call.input;
  if (call.info().kept == Kept::Input) {
    return input.clone();
  }
  const Operand& other = call.operands[0];
  const at::Tensor sum = other.tensor != nullptr ? at::add(input, *other.tensor) : at::add(input, other.number);
  return sum.scalar_type() == input.scalar_type() ? sum : sum.to(input.scalar_type()); // which would be seen to return its input
}

// The memory that the kernel will write the kept value to; or the value itself, where somebody looks at it before that: a hook,
// or a mode that sees operators by their names.
at::Tensor save_kept(const Call& call, InplaceNode& node, bool ahead) {
  at::Tensor kept;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    kept = ahead ? kept_by_operator(call) : at::empty_like(*call.input);
  }
  node.saved[int(Factor::Kept)] = SavedVariable(kept, /*is_output=*/false);
  return ahead ? at::Tensor() : kept;
}

} // namespace

void call_with_autograd(c10::DispatchKeySet keys, const Call& call, Below below) {
  const bool dense = has_kernel(call);
  if (!dense || has_forward_gradient(call)) {
    return write_by_fallback(call, dense);
  }
  // Prepare.
  const bool records = must_record(call);
  check_writable(*call.input);
  torch::autograd::check_inplace(*call.input, records);
  Prepared prepared = prepare(call);
  if (prepared.by == Prepared::By::Fallback) {
    if (records) {
      leave_view(*call.input);
    }
    return write_checked_by_fallback(call);
  }
  // Record. Everything that can fail comes before the write: what is saved is saved here, the kept value too.
  const bool listener = c10::impl::TorchDispatchModeTLS::any_modes_set();
  NodePtr<InplaceNode> node;
  at::Tensor kept;
  if (records) {
    const bool hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
    const auto before = hooks ? std::make_optional<Undisturbed>(call) : std::nullopt;
    node = record(call);
    if (node->needs(Factor::Kept)) {
      kept = save_kept(call, *node, hooks || listener || prepared.by != Prepared::By::Kernel);
    }
    if (hooks) {
      before->check();
    }
  }
  // Run.
  if (listener) {
    const at::AutoDispatchBelowAutograd guard;
    below(keys & c10::after_autograd_keyset, call);
  } else {
    if (kept.defined()) {
      set_kept(prepared, call, kept);
    }
    run(prepared, call);
    torch::autograd::increment_version(*call.input);
  }
  // Rebase.
  if (node) {
    own_view(*call.input);
    torch::autograd::rebase_history(*call.input, std::move(node));
  }
}

} // namespace safe_inplace
