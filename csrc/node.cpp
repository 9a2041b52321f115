#include <torch/csrc/utils/python_stub.h>

#include "node.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include "backend.h"
#include "dispatch.h"
#include "numbers.h"
#include "ownership.h"

namespace safe_inplace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

namespace {

// A type of its own for each op, by which Python tells them apart.
template <class Op, Form in_form>
struct NodeOf final : OpNode {
  NodeOf() : OpNode(op_index<Op>, in_form) {}
};

} // namespace

NodePtr<OpNode> make_node_of(int op, Form form) {
  NodePtr<OpNode> node;
  with_op(op, [&]<class Op>(Op) {
    if (form == Form::InPlace) {
      node = make_node<NodeOf<Op, Form::InPlace>>();
    } else {
      node = make_node<NodeOf<Op, Form::OutOfPlace>>();
    }
  });
  return node;
}

namespace {

template <class Op, Form form>
void register_node_type() {
  static PyTypeObject type;
  // Without tables of its own the type gets the methods and properties that every node of torch has.
  torch::autograd::_initFunctionPyTypeObject(type, Op::nodes[int(form)], nullptr, nullptr);
  torch::autograd::registerCppFunction(typeid(NodeOf<Op, form>), &type);
}

} // namespace

void register_node_types() {
  for (int op = 0; op < AllOps::size; ++op) {
    with_op(op, []<class Op>(Op) {
      register_node_type<Op, Form::InPlace>();
      register_node_type<Op, Form::OutOfPlace>();
    });
  }
}

OperandShape shape_of(const at::Tensor& tensor) {
  return {at::SymDimVector(tensor.sizes().begin(), tensor.sizes().end()), tensor.scalar_type()};
}

bool OpNode::needs(Factor factor) const {
  for (int position = 0; position <= info().operands; ++position) {
    if (info().derivatives[position].factor == factor && should_compute_output(position)) {
      return true;
    }
  }
  return false;
}

void OpNode::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  // A pass that asked for `shift` alone read nothing: torch's own two nodes would leave the product's values alone.
  if (read_in != torch::autograd::get_current_graph_task_id()) {
    return;
  }
  for (SavedVariable& variable : saved) {
    variable.reset_data();
  }
}

void OpNode::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  read_in = torch::autograd::get_current_graph_task_id(); // the compiled graph takes them as its inputs
  args.collect(op);
  args.collect(static_cast<int>(form));
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

// A kept value that was written aside by a kernel has no history. Higher derivatives need one: it is the old input, or the
// old input plus the first operand.
at::Tensor OpNode::kept_with_history(const at::Tensor& kept) const {
  if (form == Form::OutOfPlace && info().kept == Kept::Input) {
    return kept; // the input itself
  }
  at::Tensor value = kept.variable_data();
  if (info().kept == Kept::Input) {
    if (next_edge(0).is_valid()) {
      torch::autograd::impl::set_gradient_edge(value, next_edge(0));
    }
    return value;
  }
  if (next_edge(0).is_valid() || next_edge(1).is_valid()) {
    NodePtr<OpNode> sum = make_node_of(op_index<Add>, Form::OutOfPlace);
    sum->shapes[0] = shapes[0];
    sum->shapes[1] = shapes[1];
    sum->add_next_edge(next_edge(0));
    sum->add_next_edge(next_edge(1));
    const auto output = sum->add_input_metadata(value);
    torch::autograd::impl::set_gradient_edge(value, {std::move(sum), output});
  }
  return value;
}

void OpNode::unpack(BackwardCall& call) {
  for (int position = 0; position <= info().operands; ++position) {
    const Factor factor = info().derivatives[position].factor;
    if (factor == Factor::One || !wanted(position) || call.factors[int(factor)].tensor.defined()) {
      continue;
    }
    read_in = torch::autograd::get_current_graph_task_id();
    FactorValue& value = call.factors[int(factor)];
    value.tensor = saved[int(factor)].unpack();
    if (!value.tensor.defined() && factor != Factor::Kept) {
      value.number = numbers[int(factor)];
    } else if (factor == Factor::Kept && c10::GradMode::is_enabled()) {
      value.tensor = kept_with_history(value.tensor);
    }
  }
}

variable_list OpNode::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  variable_list results(num_outputs());
  if (!grads[0].defined()) {
    return results;
  }
  {
    BackwardCall call;
    call.op = op;
    call.form = form;
    call.parameter = parameter;
    // The engine's handle is taken over, so that the count of the others tells whether the memory may be reused.
    call.grad = std::move(grads[0]);
    unpack(call);
    if (!compute(call, results)) {
      for (int position = 0; position < static_cast<int>(num_outputs()); ++position) {
        if (wanted(position)) {
          results[position] = gradient_by_fallback(call, position, shapes[position]);
        }
      }
    }
  }
  keep_apart(results, next_edges());
  return results;
}

c10::IntArrayRef OpNode::sizes_of(int position) const {
  return c10::asIntArrayRefUnchecked(shapes[position].sizes);
}

// Whether a gradient has the incoming one's sizes and dtype.
bool OpNode::has_grads_layout(int position, const BackwardCall& call) const {
  return sizes_of(position) == call.grad.sizes() && shapes[position].dtype == call.grad.scalar_type();
}

// A tracer, a recorder of higher derivatives or a wrapper must see operations it knows. A hook of the node may have put another
// gradient in the place of this one.
bool OpNode::kernel_may_see(const BackwardCall& call) const {
  if (c10::GradMode::is_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() || !has_kernel(call.grad)) {
    return false;
  }
  for (const FactorValue& factor : call.factors) {
    if (factor.tensor.defined() && !has_kernel(factor.tensor)) {
      return false;
    }
  }
  const bool sums_input = wanted(0) && sizes_of(0) != call.grad.sizes();
  return has_results_sizes(call.grad) && (!sums_input || backend_of(call.grad.device().type())->sums_for_input);
}

bool OpNode::has_results_sizes(const at::Tensor& grad) const {
  return form == Form::InPlace ? grad.sizes() == sizes_of(0)
                               : grad.sizes() == c10::asIntArrayRefUnchecked(input_metadata(0).shape_as_dim_vector());
}

// A gradient that equals the incoming one is the incoming one, as in torch's own add.
bool OpNode::is_grad_itself(int position, const BackwardCall& call) const {
  const Derivative& derivative = info().derivatives[position];
  return derivative.factor == Factor::One && (!derivative.times_parameter || parameter.equal(1)) &&
         has_grads_layout(position, call);
}

// ... and one that equals the input's gradient is that one.
bool OpNode::is_inputs(int position, const BackwardCall& call) const {
  return position > 0 && wanted(0) && info().derivatives[position] == info().derivatives[0] && has_grads_layout(position, call) &&
         has_grads_layout(0, call);
}

// What was saved is nobody's once the graph is released: where nobody else sees it, a gradient of the same layout is written over it.
bool OpNode::take_saved(BackwardCall& call, int factor) {
  at::Tensor& value = call.factors[factor].tensor;
  if (!value.defined() || !graph_is_released()) {
    return false;
  }
  // From here on the graph cannot be walked again: it would be released after this call anyway.
  saved[factor].reset_data();
  if (value.scalar_type() != call.grad.scalar_type() || value.sizes() != call.grad.sizes() || !may_overwrite_saved(value)) {
    return false;
  }
  // What is written there has not its history, is no part of anything, and is not its object in Python, whose `.grad` and attributes
  // would come along.
  value = value.variable_data();
  value.unsafeGetTensorImpl()->set_allow_tensor_metadata_change(true);
  return true;
}

// Whether an element-wise gradient other than this one is multiplied by the factor: it might be computed after this one is written.
bool OpNode::others_read(int factor, int position) const {
  for (int other = 0; other < static_cast<int>(num_outputs()); ++other) {
    const bool reads = wanted(other) && int(info().derivatives[other].factor) == factor;
    if (other != position && reads && sizes_of(other) == sizes_of(position)) {
      return true;
    }
  }
  return false;
}

at::Tensor OpNode::fresh_gradient(int position, const at::Tensor& grad) const {
  const auto options = grad.options().dtype(stored_dtype(grad, shapes[position].dtype));
  return sizes_of(position) == grad.sizes() ? at::empty_like(grad, options) : at::empty(sizes_of(position), options);
}

// The saved values and the incoming gradient, unless it is handed on, give their memory where they can. The operands choose before
// the input, which takes what they leave.
void OpNode::choose_memory(BackwardCall& call) {
  const int count = static_cast<int>(num_outputs());
  bool factor_is_free[3];
  for (int factor = 0; factor < 3; ++factor) {
    factor_is_free[factor] = take_saved(call, factor);
  }
  bool grad_is_free = true;
  for (int position = 0; position < count; ++position) {
    grad_is_free = grad_is_free && !(wanted(position) && is_grad_itself(position, call));
  }
  grad_is_free = grad_is_free && may_overwrite_in_backward(call.grad);

  for (int position = count - 1; position >= 0; --position) {
    if (!wanted(position) || is_grad_itself(position, call) || is_inputs(position, call)) {
      continue;
    }
    at::Tensor& out = call.grads[position];
    if (!has_grads_layout(position, call)) {
      out = fresh_gradient(position, call.grad);
      continue;
    }
    const bool reads_kept = info().derivatives[position].factor == Factor::Kept;
    for (int factor = 0; factor < 3 && !out.defined(); ++factor) {
      if (!factor_is_free[factor] || others_read(factor, position)) {
        continue;
      }
      const at::Tensor& value = call.factors[factor].tensor;
      const bool better_left = factor == int(Factor::Kept) ? !reads_kept && (position != 0 || grad_is_free)
                                                           : grad_is_free || value.strides() != call.grad.strides();
      if (!better_left) {
        out = value;
        factor_is_free[factor] = false;
      }
    }
    if (!out.defined() && grad_is_free) {
      out = call.grad;
      grad_is_free = false;
    }
    if (!out.defined()) {
      out = fresh_gradient(position, call.grad);
    }
  }
}

void OpNode::hand_out(const BackwardCall& call, variable_list& results) const {
  for (int position = 0; position < static_cast<int>(results.size()); ++position) {
    if (wanted(position)) {
      const at::Tensor& computed = call.grads[is_inputs(position, call) ? 0 : position];
      results[position] = is_grad_itself(position, call) ? call.grad : cast_gradient(computed, shapes[position].dtype);
    }
  }
}

bool OpNode::compute(BackwardCall& call, variable_list& results) {
  if (!kernel_may_see(call)) {
    return false;
  }
  check_factors(call);
  const at::AutoDispatchBelowADInplaceOrView guard;
  choose_memory(call);
  if (!run_backward(call)) {
    return false;
  }
  hand_out(call, results);
  return true;
}

// The node as a function of its gradient and of what it holds, as compiled autograd calls it while it traces.
variable_list gradients_by_fallback(const variable_list& grads, const std::vector<c10::IValue>& held) {
  torch::dynamo::autograd::PackedArgs args(held);
  BackwardCall call;
  call.grad = grads[0];
  call.op = static_cast<int>(args.unpack<int64_t>());
  call.form = Form::InPlace; // no matter in the fallback
  call.parameter = args.unpack<at::Scalar>();
  const auto wanted = args.unpack<std::vector<bool>>();
  for (FactorValue& factor : call.factors) {
    factor.tensor = args.unpack<at::Tensor>();
    factor.number = args.unpack<at::Scalar>();
  }
  variable_list results(wanted.size());
  for (size_t position = 0; position < wanted.size(); ++position) {
    const auto sizes = args.unpack<std::vector<c10::SymInt>>();
    const auto dtype = args.unpack<at::ScalarType>();
    if (wanted[position] && call.grad.defined()) {
      results[position] = gradient_by_fallback(call, static_cast<int>(position), {{sizes.begin(), sizes.end()}, dtype});
    }
  }
  return results;
}

// Compiled autograd hands out gradients without sizes and asks for a function that it can put into its graph.
variable_list OpNode::apply_with_saved(const variable_list& inputs, torch::dynamo::autograd::SwapSavedVariables& swap) {
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
  const std::string function = compiler->bind_function(swap.get_py_compiler(), name(), gradients_by_fallback, types,
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

} // namespace safe_inplace
