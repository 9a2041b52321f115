// May this memory be written over? Who sees it? The one place that answers.
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
// the handle behind that is the last one on the tensor and its memory, or the only one beside a base that nobody else can reach.
bool may_take_over(const at::Tensor& temporary);

// Gives every gradient that may become a leaf's `.grad` as it is memory that nobody else sees: copies it where somebody does.
// `edges` are where the gradients go.
void keep_apart(std::vector<at::Tensor>& gradients, const torch::autograd::edge_list& edges);

// A saved value is given to a node of the running pass that may hand it on as a gradient. Under saved-tensor hooks it is a tensor of
// its own, which AccumulateGrad would take for a gradient that nobody else has: sees to it that no leaf's `.grad` has its memory
// when the pass is through. False where that cannot be told.
bool keep_out_of_leaves(const at::Tensor& saved, const torch::autograd::Node& node);

// Whether the graph of the running backward pass is released after it.
bool graph_is_released();

// A tensor that was written, and whose history is about to be rebased: torch's checks have passed, and no forward gradient is
// there. If it is a view of all of a base that nobody else can reach, it becomes a tensor of its own, without a history; a view's
// history goes through its base, by copies (CopySlices). What a view was is counted.
void own_view(const at::Tensor& tensor);

// The same write done by torch's methods: a view stays one, and is counted.
void leave_view(const at::Tensor& tensor);

} // namespace safe_inplace
