// What a call must pass before any byte changes, in torch's words where it has some.
#pragma once

#include "call.h"

namespace safe_inplace {

// Refuses a tensor whose version counter cannot be raised; torch itself notices after the write.
void check_writable(const at::Tensor& input);

void check_shape(const at::Tensor& input, const at::Tensor& operand);

// torch's in-place methods let an operand on the meta device pass, and write nothing.
void check_devices(const Call& call);

// A storage may have been shrunk or given back since the tensor was made of it: what lies behind its end is not the tensor's.
void check_allocated(const at::Tensor& tensor, const char* op, const char* role, const char* name);

// The refusals that the layout and the memory of a call give reason for, where all its tensors are dense.
void check_memory(const Call& call);

// Whether reading the operand element by element beside writing the input gives what reading all of it first would.
bool readable_in_place(const at::Tensor& input, const at::Tensor& operand);

} // namespace safe_inplace
