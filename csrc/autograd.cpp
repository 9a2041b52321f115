#include <torch/csrc/utils/python_stub.h>

#include "autograd.h"

#include <ATen/ATen.h>
#include <ATen/SavedTensorHooks.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "aten_formula.h"
#include "compat.h"
#include "ownership.h"

namespace safe_inplace {

namespace {

using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

struct InplaceNode : Node {
  int op = 0;
  at::Scalar parameter = 1;
  // What the gradients are multiplied by: the operands, then the kept value.
  SavedVariable saved[3];
  at::Scalar numbers[2];
  mutable bool saved_were_read = false;
  // Of input, first and second operand; numbers have none.
  OperandShape shapes[3];

  explicit InplaceNode(int op_) : op(op_) {}

  const OpInfo& info() const {
    return infos[op];
  }

  std::string name() const override {
    return info().node;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    // A pass that asked for `shift` alone read nothing: torch's own two nodes would leave the product's values alone.
    if (!saved_were_read) {
      return;
    }
    for (SavedVariable& variable : saved) {
      variable.reset_data();
    }
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    saved_were_read = true; // the compiled graph takes them as its inputs
    args.collect(op);
    args.collect(parameter);
    for (const at::Scalar& number : numbers) {
      args.collect(number);
    }
    for (const SavedVariable& variable : saved) {
      args.collect(variable, /*is_output=*/false);
    }
    for (const OperandShape& shape : shapes) {
      args.collect(shape.sizes.size());
      for (const c10::SymInt& size : shape.sizes) {
        args.collect(size);
      }
      args.collect(shape.dtype);
    }
  }

  variable_list apply_with_saved(const variable_list& inputs,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override;

  variable_list apply(variable_list&& grads) override;

 private:
  bool wanted(int position) const {
    return position < static_cast<int>(num_outputs()) && task_should_compute_output(position);
  }
  void unpack(Backward& backward);
  at::Tensor kept_with_history(const at::Tensor& kept) const;
  bool run_kernel(Backward& backward, variable_list& results);
};

template <class Op>
struct OpNode final : InplaceNode {
  OpNode() : InplaceNode(op_index<Op>) {}
};

template <class... Ops>
NodePtr<InplaceNode> make_op_node(int op, OpList<Ops...>) {
  NodePtr<InplaceNode> node;
  ((op_index<Ops> == op ? void(node = make_node<OpNode<Ops>>()) : void()), ...);
  return node;
}

OperandShape shape_of(const at::Tensor& tensor) {
  return {at::SymDimVector(tensor.sizes().begin(), tensor.sizes().end()), tensor.scalar_type()};
}

// The kept value was written aside by a kernel and has no history. Higher derivatives need one: it is the old input,
// or the old input plus the first operand.
at::Tensor InplaceNode::kept_with_history(const at::Tensor& kept) const {
  at::Tensor value = kept.variable_data();
  if (info().kept == Kept::Input) {
    if (next_edge(0).is_valid()) {
      torch::autograd::impl::set_gradient_edge(value, next_edge(0));
    }
    return value;
  }
  if (next_edge(0).is_valid() || next_edge(1).is_valid()) {
    auto sum = make_node<OpNode<Add>>();
    sum->shapes[0] = shapes[0];
    sum->shapes[1] = shapes[1];
    sum->add_next_edge(next_edge(0));
    sum->add_next_edge(next_edge(1));
    const auto output = sum->add_input_metadata(value);
    torch::autograd::impl::set_gradient_edge(value, {std::move(sum), output});
  }
  return value;
}

void InplaceNode::unpack(Backward& backward) {
  for (int position = 0; position <= info().operands; ++position) {
    const Factor factor = info().partials[position].factor;
    if (factor == Factor::One || !wanted(position) || backward.factors[int(factor)].tensor.defined()) {
      continue;
    }
    saved_were_read = true;
    FactorValue& value = backward.factors[int(factor)];
    value.tensor = saved[int(factor)].unpack();
    if (!value.tensor.defined() && factor != Factor::Kept) {
      value.number = numbers[int(factor)];
    } else if (factor == Factor::Kept && c10::GradMode::is_enabled()) {
      value.tensor = kept_with_history(value.tensor);
    }
  }
}

variable_list InplaceNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  variable_list results(num_outputs());
  if (!grads[0].defined()) {
    return results;
  }
  {
    Backward backward;
    backward.op = op;
    backward.parameter = parameter;
    // The engine's handle is taken over, so that the count of the others tells whether the memory may be reused.
    backward.grad = std::move(grads[0]);
    unpack(backward);
    if (!run_kernel(backward, results)) {
      for (int position = 0; position < static_cast<int>(num_outputs()); ++position) {
        if (wanted(position)) {
          results[position] = gradient_by_formula(backward, position, shapes[position]);
        }
      }
    }
  }
  keep_apart(results, next_edges());
  return results;
}

// The node as a function of its gradient and of what it holds, as compiled autograd calls it while it traces.
variable_list gradients_by_formula(const variable_list& grads, const std::vector<c10::IValue>& held) {
  torch::dynamo::autograd::PackedArgs args(held);
  Backward backward;
  backward.grad = grads[0];
  backward.op = static_cast<int>(args.unpack<int64_t>());
  backward.parameter = args.unpack<at::Scalar>();
  const auto wanted = args.unpack<std::vector<bool>>();
  for (FactorValue& factor : backward.factors) {
    factor.tensor = args.unpack<at::Tensor>();
    factor.number = args.unpack<at::Scalar>();
  }
  variable_list results(wanted.size());
  for (size_t position = 0; position < wanted.size(); ++position) {
    const auto sizes = args.unpack<std::vector<c10::SymInt>>();
    const auto dtype = args.unpack<at::ScalarType>();
    if (wanted[position] && backward.grad.defined()) {
      results[position] = gradient_by_formula(backward, static_cast<int>(position), {{sizes.begin(), sizes.end()}, dtype});
    }
  }
  return results;
}

// Compiled autograd hands out gradients without sizes and asks for a function that it can put into its graph.
variable_list InplaceNode::apply_with_saved(const variable_list& inputs,
                                            torch::dynamo::autograd::SwapSavedVariables& swap) {
  for (SavedVariable& variable : saved) {
    swap.before(variable);
  }
  for (OperandShape& shape : shapes) {
    swap.before(shape.sizes);
  }
  torch::dynamo::autograd::PackedArgs args;
  std::vector<at::TypePtr> types;
  const auto pack = [&]<class T>(const T& value) {
    args.pack(value);
    types.push_back(torch::dynamo::autograd::IValuePacker<T>::packed_type());
  };
  pack(int64_t(op));
  pack(parameter);
  std::vector<bool> wanted_outputs;
  for (int position = 0; position < static_cast<int>(num_outputs()); ++position) {
    wanted_outputs.push_back(wanted(position));
  }
  pack(wanted_outputs);
  for (int factor = 0; factor < 3; ++factor) {
    pack(saved[factor].unpack());
    pack(factor < 2 ? numbers[factor] : at::Scalar(0));
  }
  for (size_t position = 0; position < wanted_outputs.size(); ++position) {
    pack(std::vector<c10::SymInt>(shapes[position].sizes.begin(), shapes[position].sizes.end()));
    pack(shapes[position].dtype);
  }
  const auto& compiler = torch::dynamo::autograd::getPyCompilerInterface();
  const std::string function = compiler->bind_function(swap.get_py_compiler(), name(), gradients_by_formula, types,
                                                       /*is_custom_function=*/true, /*is_traceable=*/true);
  using Metadata = std::vector<std::optional<torch::autograd::InputMetadata>>;
  variable_list results = compiler->call_function(
      swap.get_py_compiler(), "apply_functional", function, inputs, std::move(args).vec(),
      torch::dynamo::autograd::IValuePacker<Metadata>::pack(torch::dynamo::autograd::get_input_metadata(next_edges())));
  for (SavedVariable& variable : saved) {
    swap.after(variable);
  }
  for (OperandShape& shape : shapes) {
    swap.after(shape.sizes);
  }
  return results;
}

bool InplaceNode::run_kernel(Backward& backward, variable_list& results) {
  // A tracer, a recorder of higher derivatives or a wrapper must see operations it knows.
  if (c10::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() || !is_plain(backward.grad)) {
    return false;
  }
  for (const FactorValue& factor : backward.factors) {
    if (factor.tensor.defined() && !is_plain(factor.tensor)) {
      return false;
    }
  }
  // A hook of the node may have put another gradient in the place of this one.
  if (backward.grad.sizes() != c10::asIntArrayRefUnchecked(shapes[0].sizes)) {
    return false;
  }
  check_factors(backward);
  const at::AutoDispatchBelowADInplaceOrView guard;
  const at::ScalarType dtype = backward.grad.scalar_type();
  const at::ScalarType math = math_type(dtype);
  at::Tensor& kept = backward.factors[int(Factor::Kept)].tensor;
  bool kept_is_free = false;
  if (kept.defined() && graph_is_released()) {
    // From here on the graph cannot be walked again: it would be released after this call anyway.
    saved[int(Factor::Kept)].reset_data();
    kept_is_free = kept.scalar_type() == dtype && may_overwrite_in_backward(kept);
  }

  const auto sizes_of = [&](int position) {
    return c10::asIntArrayRefUnchecked(shapes[position].sizes);
  };
  const auto full_size = [&](int position) { return sizes_of(position) == backward.grad.sizes(); };
  // A gradient that equals the incoming one is the incoming one, as in torch's own add.
  const auto is_grad_itself = [&](int position) {
    const Partial& partial = info().partials[position];
    return partial.factor == Factor::One && (!partial.times_parameter || parameter.equal(1)) && full_size(position) &&
        shapes[position].dtype == dtype;
  };
  bool grad_is_passed_on = false;
  for (int position = 0; position < static_cast<int>(results.size()); ++position) {
    grad_is_passed_on = grad_is_passed_on || (wanted(position) && is_grad_itself(position));
  }
  bool grad_is_free = !grad_is_passed_on && may_overwrite_in_backward(backward.grad);

  bool any = false;
  for (int position = static_cast<int>(results.size()) - 1; position >= 0; --position) {
    if (!wanted(position) || is_grad_itself(position)) {
      continue;
    }
    if (position > 0 && wanted(0) && info().partials[position] == info().partials[0] && full_size(position) &&
        shapes[position].dtype == dtype) {
      continue; // the gradient of the input is this one too
    }
    any = true;
    const OperandShape& shape = shapes[position];
    at::Tensor& out = backward.grads[position];
    if (full_size(position) && shape.dtype == dtype) {
      const bool reads_kept = info().partials[position].factor == Factor::Kept;
      if (kept_is_free && (reads_kept || position == 0) && kept.sizes() == backward.grad.sizes() &&
          (reads_kept || !grad_is_free)) {
        out = kept;
        kept_is_free = false;
      } else if (grad_is_free) {
        out = backward.grad;
        grad_is_free = false;
      } else {
        out = at::empty_like(backward.grad);
      }
    } else {
      const at::ScalarType out_dtype = shape.dtype == dtype ? dtype : math;
      out = at::empty(sizes_of(position), backward.grad.options().dtype(out_dtype));
    }
  }
  if (any) {
    BackwardPlan plan;
    if (!plan_backward(backward, plan)) {
      return false;
    }
    if (backward.grad.numel() == 0) {
      for (at::Tensor& out : backward.grads) {
        if (out.defined()) {
          out.zero_();
        }
      }
    } else {
      run_backward(plan, backward.grad);
    }
  }
  for (int position = 0; position < static_cast<int>(results.size()); ++position) {
    if (!wanted(position)) {
      continue;
    }
    const at::Tensor& computed = backward.grads[backward.grads[position].defined() ? position : 0];
    results[position] = is_grad_itself(position) ? backward.grad : cast_gradient(computed, shapes[position].dtype);
  }
  return true;
}

// A Python mode below autograd wants to see the op by its name.
bool has_listener() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Saved-tensor hooks run Python in the middle of a call. What they change of its tensors meanwhile would be in one half of the
// result and not in the other.
class Undisturbed {
 public:
  explicit Undisturbed(const Call& call) : call_(call) {
    look(*call.input, 0);
    for (int i = 0; i < call.info().operands; ++i) {
      if (call.operands[i].tensor != nullptr) {
        look(*call.operands[i].tensor, i + 1);
      }
    }
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
    const Node* history = nullptr;
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
  if (call.input->_fw_grad(0).defined()) {
    return true;
  }
  for (const Operand& operand : call.operands) {
    if (operand.tensor != nullptr && operand.tensor->_fw_grad(0).defined()) {
      return true;
    }
  }
  return false;
}

bool requires_grad(const Operand& operand) {
  return operand.tensor != nullptr && operand.tensor->requires_grad();
}

NodePtr<InplaceNode> record(const Call& call) {
  const OpInfo& info = call.info();
  NodePtr<InplaceNode> node = make_op_node(call.op, AllOps{});
  node->parameter = call.parameter;
  node->add_next_edge(torch::autograd::impl::gradient_edge(*call.input));
  node->shapes[0] = shape_of(*call.input);
  for (int i = 0; i < info.operands; ++i) {
    const Operand& operand = call.operands[i];
    if (operand.tensor == nullptr) {
      node->numbers[i] = operand.number;
      node->add_next_edge(Edge());
      continue;
    }
    node->add_next_edge(requires_grad(operand) ? torch::autograd::impl::gradient_edge(*operand.tensor) : Edge());
    node->shapes[i + 1] = shape_of(*operand.tensor);
  }
  for (int position = 0; position <= info.operands; ++position) {
    const Factor factor = info.partials[position].factor;
    if (factor != Factor::First && factor != Factor::Second) {
      continue;
    }
    const at::Tensor* tensor = call.operands[int(factor)].tensor;
    SavedVariable& saved = node->saved[int(factor)];
    const bool again = position > 0 && info.partials[position] == info.partials[0] && node->should_compute_output(0);
    if (tensor == nullptr || again || !node->should_compute_output(position)) {
      continue;
    }
    // What shares memory or a version counter with the input is overwritten, or looks so: save its value instead.
    const bool aliased = share_storage(*tensor, *call.input);
    saved = SavedVariable(aliased ? tensor->clone() : *tensor, /*is_output=*/false);
  }
  return node;
}

bool keeps_value(const InplaceNode& node) {
  for (int position = 0; position <= node.info().operands; ++position) {
    if (node.info().partials[position].factor == Factor::Kept && node.should_compute_output(position)) {
      return true;
    }
  }
  return false;
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

} // namespace

void call_with_autograd(c10::DispatchKeySet keys, const Call& call, Below below) {
  if (!is_plain(call) || has_forward_gradient(call)) {
    return write_by_formula(call);
  }
  bool any_requires_grad = false;
  if (c10::GradMode::is_enabled()) {
    any_requires_grad = call.input->requires_grad();
    if (any_requires_grad && call.input->is_view()) {
      // A view whose base has been written since learns of its history when somebody asks; until then it counts as a leaf
      // and would be refused.
      call.input->grad_fn();
    }
    for (const Operand& operand : call.operands) {
      any_requires_grad = any_requires_grad || requires_grad(operand);
    }
  }
  check_writable(*call.input);
  torch::autograd::check_inplace(*call.input, any_requires_grad);
  Forward forward;
  const bool planned = plan_forward(call, forward);
  // torch's kernel adds a multiple, but not torch's node: that hands on gradients whose memory others see.
  if (!planned && !(call.op == op_index<Add> && !equals(call.parameter, 1))) {
    return write_by_formula(call);
  }

  // Everything that can fail comes before the write: what is saved is saved here, the kept value too.
  NodePtr<InplaceNode> node;
  at::Tensor kept;
  const bool listener = has_listener();
  if (any_requires_grad) {
    const bool hooks = !at::SavedTensorDefaultHooks::get_tls_state().stack.empty();
    const auto before = hooks ? std::make_optional<Undisturbed>(call) : std::nullopt;
    node = record(call);
    if (keeps_value(*node)) {
      {
        // A hook reads it now, and the op that a listener sees does not write it.
        const at::AutoDispatchBelowADInplaceOrView guard;
        kept = listener || hooks ? kept_by_operator(call) : at::empty_like(*call.input);
      }
      node->saved[int(Factor::Kept)] = SavedVariable(kept, /*is_output=*/false);
    }
    if (hooks) {
      before->check();
      kept.reset();
    }
  }
  if (listener) {
    const at::AutoDispatchBelowAutograd guard;
    below(keys & c10::after_autograd_keyset, call);
  } else {
    if (kept.defined()) {
      set_kept(forward, call, kept);
    }
    if (planned) {
      run_forward(forward, call);
    } else {
      const at::AutoDispatchBelowADInplaceOrView guard;
      write_by_formula(call);
    }
    torch::autograd::increment_version(*call.input);
  }
  if (node) {
    torch::autograd::rebase_history(*call.input, std::move(node));
  }
}

namespace {

template <class Op>
void register_node_type() {
  static PyTypeObject type;
  // Without tables of its own the type gets the methods and properties that every node of torch has.
  torch::autograd::_initFunctionPyTypeObject(type, Op::node, nullptr, nullptr);
  torch::autograd::registerCppFunction(typeid(OpNode<Op>), &type);
}

template <class... Ops>
void register_all(OpList<Ops...>) {
  (register_node_type<Ops>(), ...);
}

} // namespace

void register_node_types() {
  register_all(AllOps{});
}

} // namespace safe_inplace
