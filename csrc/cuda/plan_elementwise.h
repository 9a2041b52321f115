// The plan of an element-wise pass: vectors along rows, vectors that cross rows, or single elements, and who owns which.
#pragma once

#include <optional>

#include "problem.h"

namespace safe_inplace::cuda {

enum class Path {
  Vectors, // along rows that are whole numbers of them
  Unaligned, // vectors of contiguous memory that cross rows
  Elements,
};

inline Path choose_path(const Problem& problem, int width, int64_t index_limit) {
  const Shape& shape = problem.shape;
  if (rows_take_vectors(problem, width)) {
    return Path::Vectors;
  }
  const Arg& arg = problem.args[anchor(problem)];
  if (width > 1 && shape.sizes[0] >= width && shape.numel + width < index_limit && is_contiguous(arg, shape) &&
      vectors_take_dtypes(problem)) {
    return Path::Unaligned;
  }
  return Path::Elements;
}

// Vectors per block: `unroll` for each thread, fewer where that would leave a large device idle.
inline int64_t choose_tile(int64_t count, int unroll) {
  return kThreads * std::clamp<int64_t>(count / (kThreads * kElementwiseBlocks), 1, unroll);
}

// Path::Vectors, or Path::Elements with width 1.
template <class M, class I>
ElementwiseParams<M, I> plan_elementwise(const Problem& problem, int width, int unroll) {
  const Shape& shape = problem.shape;
  ElementwiseParams<M, I> params;
  params.count = I(shape.numel / width);
  params.tile = I(choose_tile(shape.numel / width, unroll));
  params.offset_calculator.ndim = shape.ndim;
  for (int d = 0; d < shape.ndim; ++d) {
    params.offset_calculator.sizes[d] = FastDivisor<I>(d == 0 ? shape.sizes[0] / width : shape.sizes[d]);
    for (int slot = 0; slot < kSlots; ++slot) {
      params.offset_calculator.strides[slot][d] = I(stride_of(problem, slot, d) * (d == 0 ? width : 1));
    }
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    params.accessors[slot] = make_row_accessor<M>(problem, slot, width);
  }
  return params;
}

// Path::Vectors, where it is small and simple enough for short code. Nothing otherwise.
template <class M>
std::optional<SmallParams<M>> plan_small(const Problem& problem, int width, int64_t limit) {
  const Shape& shape = problem.shape;
  const int64_t count = shape.numel / width;
  if (shape.ndim > 2 || count >= limit) {
    return std::nullopt;
  }
  SmallParams<M> params;
  params.count = uint32_t(count);
  params.row = FastDivisor<uint32_t>(shape.sizes[0] / width);
  for (int slot = 0; slot < kSlots; ++slot) {
    const Accessor<M> accessor = make_row_accessor<M>(problem, slot, width);
    const bool written = slot >= Out0;
    if (accessor.mode == AccessMode::Elements || (written && accessor.mode == AccessMode::Broadcast)) {
      return std::nullopt;
    }
    params.data[slot] = accessor.data;
    params.modes[slot] = accessor.mode;
    params.dtypes[slot] = accessor.dtype;
    params.row_strides[slot] = shape.ndim == 2 ? uint32_t(stride_of(problem, slot, 1)) : 0;
    if (slot == First || slot == Second) {
      params.numbers[slot - First] = accessor.number;
    }
  }
  return params;
}

// Path::Unaligned.
template <class M>
ElementwiseParams<M, uint32_t> plan_unaligned(const Problem& problem, int width, int unroll) {
  const Shape& shape = problem.shape;
  const Arg& lead = problem.args[anchor(problem)];
  const auto position = [](const Arg& arg) { return int64_t(reinterpret_cast<uintptr_t>(arg.data)) / item_size(arg); };
  ElementwiseParams<M, uint32_t> params;
  params.numel = uint32_t(shape.numel);
  params.head = uint32_t(position(lead) % width);
  params.row = FastDivisor<uint32_t>(shape.sizes[0]);
  params.count = uint32_t(ceil_divide(shape.numel + params.head, width));
  params.tile = uint32_t(choose_tile(params.count, unroll));
  params.offset_calculator.ndim = shape.ndim - 1;
  for (int d = 1; d < shape.ndim; ++d) {
    params.offset_calculator.sizes[d - 1] = FastDivisor<uint32_t>(shape.sizes[d]);
    for (int slot = 0; slot < kSlots; ++slot) {
      params.offset_calculator.strides[slot][d - 1] = uint32_t(stride_of(problem, slot, d));
    }
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    Accessor<M>& accessor = params.accessors[slot];
    accessor = make_accessor<M>(problem, slot);
    if (accessor.mode == AccessMode::Elements) {
      const Arg& arg = problem.args[slot];
      const bool in_step = (position(arg) - int64_t(params.head)) % std::min<int64_t>(16 / item_size(arg), width) == 0;
      accessor.step = uint64_t(arg.strides[0]);
      accessor.mode = is_contiguous(arg, shape) && in_step ? AccessMode::Vector
                      : arg.strides[0] == 0                ? AccessMode::Broadcast
                                                           : AccessMode::Elements;
    }
  }
  return params;
}

} // namespace safe_inplace::cuda
