// The node of an op: what it holds for backward, and how it is asked for gradients.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <optional>
#include <string>

#include "compat.h"
#include "gradients.h"

namespace safe_inplace {

struct OpNode : torch::autograd::Node {
  using variable_list = torch::autograd::variable_list;

  int op;
  Form form;
  at::Scalar parameter = 1;
  // What the gradients are multiplied by: the operands, then the kept value, which out of place may be the input itself.
  torch::autograd::SavedVariable saved[3];
  at::Scalar numbers[2];
  // The pass that has read what is saved: the last one that has. Outside of every pass its number is -1.
  mutable std::optional<int> read_in;
  // Of input, first and second operand; numbers have none.
  OperandShape shapes[3];

  OpNode(int op_, Form form_) : op(op_), form(form_) {}

  const OpInfo& info() const { return infos[op]; }
  std::string name() const override { return info().nodes[int(form)]; }

  // Whether some gradient that this graph may be asked for is multiplied by it.
  bool needs(Factor factor) const;

  void release_variables() override;
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  variable_list apply_with_saved(const variable_list& inputs, torch::dynamo::autograd::SwapSavedVariables& swap) override;
  variable_list apply(variable_list&& grads) override;

 private:
  bool wanted(int position) const { return position < static_cast<int>(num_outputs()) && task_should_compute_output(position); }
  void unpack(BackwardCall& call);
  at::Tensor kept_with_history(const at::Tensor& kept) const;

  // By a kernel, in memory that may be that of the gradient or of the kept value. False where no kernel covers it.
  bool compute(BackwardCall& call, variable_list& results);
  c10::IntArrayRef sizes_of(int position) const;
  bool kernel_may_see(const BackwardCall& call) const;
  bool has_results_sizes(const at::Tensor& grad) const;
  bool has_grads_layout(int position, const BackwardCall& call) const;
  bool is_grad_itself(int position, const BackwardCall& call) const;
  bool is_inputs(int position, const BackwardCall& call) const;
  bool take_saved(BackwardCall& call, int factor);
  bool others_read(int factor, int position) const;
  at::Tensor fresh_gradient(int position, const at::Tensor& grad) const;
  void choose_memory(BackwardCall& call);
  void hand_out(const BackwardCall& call, variable_list& results) const;
};

// A new node of the op.
NodePtr<OpNode> make_node_of(int op, Form form);

OperandShape shape_of(const at::Tensor& tensor);

// Gives every node its own Python type; its name is what grad_fn shows.
void register_node_types();

} // namespace safe_inplace
