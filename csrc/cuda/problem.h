// The problem that a launch is planned for, and what both plans ask of it: contiguity, alignment, how each tensor is reached.
#pragma once

#include "params.h"

namespace safe_inplace::cuda {

// The tensors and numbers of one launch, before a dtype and an index type are chosen.
struct Problem {
  DType dtype = DType::Float;
  Shape shape;
  Arg args[kSlots];
  bool present[kSlots] = {}; // as an operand that is read or written, number or tensor
};

inline int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

inline uint32_t floor_log2(int64_t n) {
  uint32_t log = 0;
  while ((int64_t(2) << log) <= n) {
    ++log;
  }
  return log;
}

inline uint32_t ceil_log2(int64_t n) {
  const uint32_t log = floor_log2(n);
  return log + ((int64_t(1) << log) < n ? 1 : 0);
}

inline bool is_tensor(const Problem& problem, int slot) {
  return problem.present[slot] && problem.args[slot].data != nullptr;
}

inline int64_t item_size(const Arg& arg) {
  return dtype_size[int(arg.dtype)];
}

// Every run of vectors along dimension 0 starts at a multiple of their size, or of 16 bytes where they are larger.
inline bool has_aligned_rows(const Arg& arg, const Shape& shape, int width) {
  const int64_t alignment = std::min<int64_t>(width * item_size(arg), 16);
  if (arg.strides[0] != 1 || reinterpret_cast<uintptr_t>(arg.data) % alignment != 0) {
    return false;
  }
  for (int d = 1; d < shape.ndim; ++d) {
    if (shape.sizes[d] > 1 && arg.strides[d] * item_size(arg) % alignment != 0) {
      return false;
    }
  }
  return true;
}

// The tensor whose layout decides: forward's result; for gradients, one that is written in full, else one read in full.
inline int anchor(const Problem& problem) {
  for (int slot : {Out0, Out1, Out2, Main, Saved}) {
    if (is_tensor(problem, slot) && !is_broadcast(problem.args[slot], problem.shape)) {
      return slot;
    }
  }
  return Main;
}

// A kept value beside a gradient of 16 bits is of its dtype, unless a hook has put another in its place. That one is read element
// by element, so that vectors of it cost no kernel its registers.
inline bool vectors_take_dtypes(const Problem& problem) {
  return dtype_size[int(problem.dtype)] != 2 || !is_tensor(problem, Saved) || problem.args[Saved].dtype == problem.dtype;
}

inline bool rows_take_vectors(const Problem& problem, int width) {
  const Shape& shape = problem.shape;
  if (width == 1 || shape.sizes[0] % width != 0 || !has_aligned_rows(problem.args[anchor(problem)], shape, width) ||
      !vectors_take_dtypes(problem)) {
    return false;
  }
  // Contiguous memory read element by element is best read by neighbouring threads.
  for (int slot = 0; slot < kSlots; ++slot) {
    const Arg& arg = problem.args[slot];
    if (is_tensor(problem, slot) && arg.strides[0] == 1 && !is_broadcast(arg, shape) && !has_aligned_rows(arg, shape, width)) {
      return false;
    }
  }
  return true;
}

inline bool strides_fit(const Problem& problem, int width, int64_t index_limit) {
  for (int slot = 0; slot < kSlots; ++slot) {
    for (int d = 0; is_tensor(problem, slot) && d < problem.shape.ndim; ++d) {
      if (problem.args[slot].strides[d] * (d == 0 ? width : 1) >= index_limit) {
        return false;
      }
    }
  }
  return true;
}

template <class M>
Accessor<M> make_accessor(const Problem& problem, int slot) {
  Accessor<M> accessor;
  const Arg& arg = problem.args[slot];
  if (problem.present[slot]) {
    accessor.data = arg.data;
    accessor.number = Number<M>::from(arg.number);
    accessor.dtype = arg.dtype;
    accessor.mode = arg.data == nullptr ? AccessMode::Number : AccessMode::Elements;
  }
  return accessor;
}

// Of vectors of `width` elements along rows.
template <class M>
Accessor<M> make_row_accessor(const Problem& problem, int slot, int width) {
  Accessor<M> accessor = make_accessor<M>(problem, slot);
  if (accessor.mode == AccessMode::Elements) {
    const Arg& arg = problem.args[slot];
    accessor.step = uint64_t(arg.strides[0]);
    accessor.mode = width == 1                                    ? AccessMode::Elements
                    : arg.strides[0] == 0                         ? AccessMode::Broadcast
                    : has_aligned_rows(arg, problem.shape, width) ? AccessMode::Vector
                                                                  : AccessMode::Elements;
  }
  return accessor;
}

inline int64_t stride_of(const Problem& problem, int slot, int d) {
  return is_tensor(problem, slot) ? problem.args[slot].strides[d] : 0;
}

} // namespace safe_inplace::cuda
