#include <torch/csrc/utils/python_stub.h>

#include "autograd.h"

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "checks.h"
#include "counts.h"
#include "fallback.h"
#include "node.h"
#include "ownership.h"
#include "prepare.h"
#include "temporaries.h"

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
      TORCH_CHECK(states_[i] == now.states_[i], call_.name(), "(): a saved-tensor hook changed the argument '",
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
NodePtr<OpNode> make_node_for(const Call& call) {
  NodePtr<OpNode> node = make_node_of(call.op, call.form);
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
      // What shares memory or a version counter with an input that is written is overwritten, or looks so: save its value instead.
      const bool overwritten = call.form == Form::InPlace && share_storage(tensor, *call.input);
      node->saved[i] = SavedVariable(overwritten ? tensor.clone() : tensor, /*is_output=*/false);
    }
  });
  return node;
}

// The kept value by an operator that returns it: a mode may answer any of them with what it returned before.
at::Tensor kept_by_operator(const Call& call, at::ScalarType dtype) {
  const at::Tensor& input = *call.input;
  if (call.info().kept == Kept::Input) {
    return input.clone();
  }
  const Operand& other = call.operands[0];
  const at::Tensor sum = other.tensor != nullptr ? at::add(input, *other.tensor) : at::add(input, other.number);
  return sum.scalar_type() == dtype ? sum : sum.to(dtype); // which would be seen to return its input
}

// What backward reads of a call besides its operands: the input of an out-of-place call as it is; else the memory that the kernel
// will write the kept value to, which is returned, or the value itself, where somebody looks at it before that: a hook, or a mode
// that sees operators by their names.
at::Tensor save_kept(const Call& call, const Prepared& prepared, OpNode& node, bool ahead) {
  SavedVariable& saved = node.saved[int(Factor::Kept)];
  const bool in_place = call.form == Form::InPlace;
  if (!in_place && call.info().kept == Kept::Input) {
    saved = SavedVariable(*call.input, /*is_output=*/false);
    return at::Tensor();
  }
  at::Tensor kept;
  {
    const at::AutoDispatchBelowADInplaceOrView guard;
    kept = ahead      ? kept_by_operator(call, in_place ? call.input->scalar_type() : prepared.result->dtype)
           : in_place ? at::empty_like(*call.input)
                      : make_fresh(*prepared.result, call.input->device());
  }
  saved = SavedVariable(kept, /*is_output=*/false);
  return ahead ? at::Tensor() : kept;
}

struct Recorded {
  NodePtr<OpNode> node;
  at::Tensor kept; // for the kernel to write, where it does
};

// Everything that can fail comes before the write: what is saved is saved here, the kept value too.
Recorded record(const Call& call, const Prepared& prepared, bool listener) {
  const bool hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
  const auto before = hooks ? std::make_optional<Undisturbed>(call) : std::nullopt;
  Recorded recorded{make_node_for(call), {}};
  if (recorded.node->needs(Factor::Kept)) {
    recorded.kept = save_kept(call, prepared, *recorded.node, hooks || listener || prepared.by != Prepared::By::Kernel);
  }
  if (hooks) {
    before->check();
  }
  return recorded;
}

} // namespace

void write_with_autograd(c10::DispatchKeySet keys, const Call& call, WriteBelow below) {
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
  // Record.
  const bool listener = c10::impl::TorchDispatchModeTLS::any_modes_set();
  auto [node, kept] = records ? record(call, prepared, listener) : Recorded();
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

namespace {

// The operand whose memory becomes the result's: a temporary, of the result's layout, that nobody sees any more. What has been
// saved somebody sees. Which it was, or why none, is counted.
std::optional<int> choose_operand(const Call& call, const Prepared& prepared, const Temporaries* temporaries) {
  if (prepared.by != Prepared::By::Kernel || torch::jit::tracer::isTracing()) {
    return std::nullopt;
  }
  Event outcome = Event::ResultNoTemporary;
  std::optional<int> found;
  const auto consider = [&](const at::Tensor& tensor, int position) {
    if (found || temporaries == nullptr || !temporaries->contain(tensor)) {
      return;
    }
    if (!has_layout(tensor, *prepared.result)) {
      outcome = Event::ResultOfAnotherLayout;
    } else if (!may_take_over(tensor)) {
      outcome = Event::ResultMemoryHeld;
    } else {
      outcome = Event::ResultTakenOver;
      found = position;
    }
  };
  consider(*call.input, 0);
  each_tensor(call, [&](const at::Tensor& tensor, int i) { consider(tensor, i + 1); });
  count(outcome);
  return found;
}

} // namespace

at::Tensor call_with_autograd(c10::DispatchKeySet keys, const Call& call, CallBelow below) {
  const Temporaries* const temporaries = Temporaries::claim();
  const bool dense = has_kernel(call);
  if (!dense || has_forward_gradient(call)) {
    return result_by_fallback(call);
  }
  // Prepare.
  const bool records = must_record(call);
  Prepared prepared = prepare(call);
  if (prepared.by == Prepared::By::Fallback) {
    return result_by_fallback(call);
  }
  // Record.
  const bool listener = c10::impl::TorchDispatchModeTLS::any_modes_set();
  auto [node, kept] = records ? record(call, prepared, listener) : Recorded();
  // Run.
  at::Tensor result;
  if (listener) {
    const at::AutoDispatchBelowAutograd guard;
    result = below(keys & c10::after_autograd_keyset, call);
  } else {
    if (kept.defined()) {
      set_kept(prepared, call, kept);
    }
    result = run_out_of_place(prepared, call, choose_operand(call, prepared, temporaries));
  }
  if (node) {
    torch::autograd::set_history(result, std::move(node));
  }
  return result;
}

} // namespace safe_inplace
