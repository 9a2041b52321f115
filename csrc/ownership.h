// May this memory be written over? The one place that answers.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/edge.h>
#include <torch/csrc/autograd/function.h>

#include <vector>

namespace safe_inplace {

// True only if the caller's handle is the last one on the tensor and its memory, the tensor covers that memory without
// gaps or overlaps, and no program outside torch can have been given the address. `handles`: how many the caller holds.
bool is_sole_owner(const at::Tensor& tensor, size_t handles = 1);

// The same during a backward pass, for a tensor of this pass: also that the graph is released afterwards, that no
// higher derivative is recorded, and, off the CPU, that every reader of the tensor was ordered before the current
// stream.
bool may_overwrite_in_backward(const at::Tensor& tensor, size_t handles = 1);

// The same for a value that the graph saved, which may have a history. What is written there has none: take it by variable_data().
bool may_overwrite_saved(const at::Tensor& saved, size_t handles = 1);

// Whether a temporary's memory may be a result's from now on: the caller's evaluation stack holds its only Python reference, and
// the handle behind that is the last one on the tensor and its memory.
bool may_take_over(const at::Tensor& temporary);

// Gives every gradient that may become a leaf's `.grad` as it is memory that nobody else sees: copies it where somebody does.
// `edges` are where the gradients go.
void keep_apart(std::vector<at::Tensor>& gradients, const torch::autograd::edge_list& edges);

// Whether the graph of the running backward pass is released after it.
bool graph_is_released();

} // namespace safe_inplace
