// The plan of a reduction: which dimensions are summed, what a block owns, how the summed dimensions are cut in chunks, and
// where the partial sums lie.
#pragma once

#include "problem.h"

namespace safe_inplace::cuda {

// args[i] is the reduced gradient of operand i, where wanted[i].
struct SumTargets {
  int op = 0;
  Arg args[2];
  bool wanted[2] = {};

  const Derivative& derivative(int i) const { return infos[op].derivatives[1 + i]; }

  // Whether sum i has a result for each position in dimension d.
  bool keeps(int i, int d, const Shape& shape) const { return shape.sizes[d] > 1 && args[i].strides[d] != 0; }
};

template <class M, class I>
struct Reduction {
  ReduceParams<M, I> params;
  ReducePartialsParams<M> partials;
  int64_t blocks = 0;
  int64_t workspace = 0; // bytes; with it, the partial sums are added up by a second launch
  int64_t workspace_at[2] = {-1, -1}; // of each sum, -1 where it is final already
  int64_t partials_blocks = 0;
  int64_t largest = 0; // of the numbers that the index type must hold, besides the strides of the problem
};

// The dimensions that every sum runs over ("loop") and the others ("outer"); dimension 0 is in neither where threads own
// its columns.
struct ReductionDims {
  bool by_column = false;
  int64_t row = 1; // of dimension 0, in vectors
  int64_t columns = 1; // in vectors
  int outer_ndim = 0, loop_ndim = 0;
  int outer[kMaxDims], loop[kMaxDims];
  int64_t outer_count = 1, loop_count = 1;

  int64_t size(const Shape& shape, int d) const { return d == 0 ? row : shape.sizes[d]; }
};

inline ReductionDims sort_dims(const Shape& shape, const SumTargets& targets, int width) {
  const auto kept = [&](int d) {
    return (targets.wanted[0] && targets.keeps(0, d, shape)) || (targets.wanted[1] && targets.keeps(1, d, shape));
  };
  ReductionDims dims;
  dims.by_column = kept(0);
  dims.row = shape.sizes[0] / width;
  dims.columns = dims.by_column ? dims.row : 1;
  for (int d = dims.by_column ? 1 : 0; d < shape.ndim; ++d) {
    if (kept(d)) {
      dims.outer[dims.outer_ndim++] = d;
      dims.outer_count *= dims.size(shape, d);
    } else {
      dims.loop[dims.loop_ndim++] = d;
      dims.loop_count *= dims.size(shape, d);
    }
  }
  return dims;
}

// Whether the factor of sum i is the same for all that a group of threads adds up of it: then it multiplies the sum, and no term.
// It is read last. As it is broadcast, no gradient has been written over it by then.
inline bool has_common_factor(const Problem& problem, const SumTargets& targets, int i, const ReductionDims& dims) {
  if (targets.derivative(i).factor == Factor::One || dims.loop_ndim == 0) {
    return false;
  }
  const int slot = slot_of(targets.derivative(i).factor);
  for (int n = 0; n < dims.loop_ndim; ++n) {
    if (stride_of(problem, slot, dims.loop[n]) != 0) {
      return false;
    }
  }
  return !dims.by_column || targets.keeps(i, 0, problem.shape) || stride_of(problem, slot, 0) == 0;
}

// Whether an op's sums are of the gradient itself, where its operands are broadcast alike: a matter of the op alone, so that what
// follows from it does not change with the gradients that are asked for.
inline bool may_sum_plainly(int op) {
  const OpInfo& info = infos[op];
  return info.derivatives[1].factor != Factor::Kept && (info.operands == 1 || info.derivatives[2].factor != Factor::Kept);
}

// Whether one sum of the gradient is all that the call needs: of both operands, or of the one that is asked for.
inline bool sums_plainly(const Problem& problem, const SumTargets& targets, int width) {
  if (!may_sum_plainly(targets.op) || is_tensor(problem, Out0) || is_tensor(problem, Out1) || is_tensor(problem, Out2)) {
    return false;
  }
  const ReductionDims dims = sort_dims(problem.shape, targets, width);
  for (int i = 0; i < 2; ++i) {
    if (targets.wanted[i] && targets.derivative(i).factor != Factor::One && !has_common_factor(problem, targets, i, dims)) {
      return false;
    }
  }
  return !dims.by_column || !targets.wanted[0] || !targets.wanted[1] ||
         targets.keeps(0, 0, problem.shape) == targets.keeps(1, 0, problem.shape);
}

inline int64_t preferred_blocks(const Problem& problem, int op) {
  return may_sum_plainly(op) && dtype_size[int(problem.dtype)] > 2 ? kBlocksOfPlainSums : kBlocksOfProducts;
}

// What a block owns, and how many there are for each chunk of the loop.
struct BlockShape {
  uint32_t log_columns = 0, log_lanes = 0;
  int64_t lanes = 1, groups = 1;
  int64_t column_blocks = 1, outer_blocks = 1;
};

// A warp reads 32 neighbouring vectors where a row has as many. Lanes share the loop as far as each still has a few
// rounds of loads to issue; what is left of the block goes to neighbouring positions of the outer dimensions.
inline BlockShape shape_block(const ReductionDims& dims, int unroll) {
  BlockShape block;
  block.log_columns = dims.by_column ? std::min<uint32_t>(ceil_log2(dims.columns), 5) : 0;
  const uint32_t log_free = kLogThreads - block.log_columns;
  uint32_t log_lanes = floor_log2(std::max<int64_t>(dims.loop_count / unroll, 1));
  if (!dims.by_column) {
    // Short rows: a warp on each, so that a block covers neighbouring ones.
    const uint32_t log_row = std::max<uint32_t>(ceil_log2(dims.row), 5);
    log_lanes = std::clamp(log_lanes, std::min<uint32_t>(ceil_log2(dims.loop_count), 5), log_row);
  }
  block.log_lanes = std::min(log_lanes, log_free);
  block.lanes = int64_t(1) << block.log_lanes;
  block.groups = int64_t(1) << (log_free - block.log_lanes);
  block.column_blocks = ceil_divide(dims.columns, int64_t(1) << block.log_columns);
  block.outer_blocks = ceil_divide(dims.outer_count, block.groups);
  return block;
}

// Of one sum: how many results it has, and how many partial sums each chunk of the loop adds to each of them.
struct Spread {
  int64_t results = 1;
  int64_t per_chunk = 1;
};

inline Spread spread_of(const Shape& shape, const SumTargets& targets, int i, const ReductionDims& dims,
                        const BlockShape& block) {
  Spread spread;
  for (int d = 0; d < shape.ndim; ++d) {
    spread.results *= targets.keeps(i, d, shape) ? shape.sizes[d] : 1;
  }
  for (int n = 0; n < dims.outer_ndim; ++n) {
    spread.per_chunk *= targets.keeps(i, dims.outer[n], shape) ? 1 : shape.sizes[dims.outer[n]];
  }
  spread.per_chunk *= dims.by_column && !targets.keeps(i, 0, shape) ? block.column_blocks : 1;
  return spread;
}

inline int64_t workspace_budget(const Problem& problem) {
  return std::max(kWorkspaceFloor, problem.shape.numel * dtype_size[int(problem.dtype)] / kWorkspaceShare);
}

// How the loop is cut.
struct Chunks {
  int64_t count = 1, size = 1;
};

inline Chunks cut_loop(const ReductionDims& dims, const BlockShape& block, int64_t bytes_per_chunk, int64_t budget, int unroll,
                       int64_t target_blocks) {
  int64_t count = std::max<int64_t>(target_blocks / (block.column_blocks * block.outer_blocks), 1);
  count = std::min(count, std::max<int64_t>(dims.loop_count / (block.lanes * unroll * 2), 1));
  // Half of the budget for each of two sums, so that both fit, and the gradient is read once.
  count = std::min(count, std::max<int64_t>(budget / (2 * bytes_per_chunk), 1));
  const int64_t size = ceil_divide(dims.loop_count, count);
  return {ceil_divide(dims.loop_count, size), size};
}

// How many rounds a thread of `rounds` adds up, `terms` of them in a round, before it puts the sum aside and starts anew: so
// many that both chains of additions, in a run and of the runs, are about equally long. A power of two.
inline int64_t choose_run(int64_t rounds, int64_t terms) {
  int64_t run = kShortestRun;
  while (run * run * terms < rounds) {
    run *= 2;
  }
  return run;
}

template <class M, class I>
void set_grid(Reduction<M, I>& plan, const ReductionDims& dims, const BlockShape& block, const Chunks& chunks, int unroll) {
  const int64_t round = block.lanes * unroll;
  ReduceParams<M, I>& params = plan.params;
  params.log_columns = block.log_columns;
  params.log_lanes = block.log_lanes;
  params.columns = I(dims.columns);
  params.outer_count = I(dims.outer_count);
  params.loop_count = I(dims.loop_count);
  params.chunk = I(chunks.size);
  params.run = I(round * choose_run(ceil_divide(chunks.size, round), unroll));
  params.column_blocks = FastDivisor<uint32_t>(block.column_blocks);
  params.outer_blocks = FastDivisor<uint32_t>(block.outer_blocks);
  plan.blocks = block.column_blocks * block.outer_blocks * chunks.count;
  plan.largest = std::max({dims.loop_count + round, dims.outer_count + block.groups, dims.columns});
}

// Whether a gradient that is written, or a term of a sum, is made of it.
template <class M, class I>
bool is_read_in_loop(const Problem& problem, const SumTargets& targets, int slot, const ReduceParams<M, I>& params) {
  for (int out = 0; out < 3; ++out) {
    const Factor factor = infos[targets.op].derivatives[out].factor;
    const bool summed = out > 0 && targets.wanted[out - 1] && params.common_factors[out - 1].mode == AccessMode::Absent;
    if (factor != Factor::One && slot_of(factor) == slot && (summed || problem.present[Out0 + out])) {
      return true;
    }
  }
  return false;
}

// How the tensors of the problem are walked.
template <class M, class I>
void set_accesses(Reduction<M, I>& plan, const Problem& problem, const SumTargets& targets, const ReductionDims& dims,
                  const Chunks& chunks, int width) {
  const Shape& shape = problem.shape;
  ReduceParams<M, I>& params = plan.params;
  for (int slot = 0; slot < kSlots; ++slot) {
    params.accessors[slot] = make_row_accessor<M>(problem, slot, width);
    params.column_strides[slot] = dims.by_column ? I(stride_of(problem, slot, 0) * width) : 0;
  }
  params.outer.ndim = dims.outer_ndim;
  for (int n = 0; n < dims.outer_ndim; ++n) {
    params.outer.sizes[n] = FastDivisor<I>(shape.sizes[dims.outer[n]]);
    for (int slot = 0; slot < kSlots; ++slot) {
      params.outer.strides[slot][n] = I(stride_of(problem, slot, dims.outer[n]));
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (targets.wanted[i] && has_common_factor(problem, targets, i, dims)) {
      const int slot = slot_of(targets.derivative(i).factor);
      params.common_factors[i] = params.accessors[slot];
      params.common_factor_column_strides[i] = params.column_strides[slot];
      for (int n = 0; n < dims.outer_ndim; ++n) {
        params.outer.strides[kSlots + 2 + i][n] = params.outer.strides[slot][n];
      }
    }
  }
  for (int slot : {First, Second, Saved}) {
    if (!is_read_in_loop(problem, targets, slot, params)) {
      params.accessors[slot] = {};
    }
  }
  params.loop.ndim = dims.loop_ndim;
  // What offsets in the loop reach: all of it, or one chunk where the loop is of one dimension.
  int64_t spans[kSlots] = {};
  for (int n = 0; n < dims.loop_ndim; ++n) {
    const int d = dims.loop[n];
    const int64_t size = dims.size(shape, d);
    params.loop.sizes[n] = FastDivisor<I>(size);
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t stride = stride_of(problem, slot, d) * (d == 0 ? width : 1);
      params.loop.strides[slot][n] = I(stride);
      spans[slot] += ((dims.loop_ndim == 1 ? chunks.size : size) - 1) * stride;
    }
  }
  plan.largest = std::max(plan.largest, *std::max_element(spans, spans + kSlots));
}

inline Store store_of(const Problem& problem, const Arg& target) {
  return target.dtype == problem.dtype  ? Store::Own
         : target.dtype == DType::Float ? Store::Float
         : target.dtype == DType::Half  ? Store::Half
                                        : Store::BFloat16;
}

// A sum of one term for each result goes where the gradient lies.
template <class M, class I>
void place_final(Reduction<M, I>& plan, int i, const Problem& problem, const Arg& target, const ReductionDims& dims) {
  Sum& sum = plan.params.sums[i];
  sum.data = target.data;
  sum.store = store_of(problem, target);
  sum.column_stride = uint64_t(target.strides[0]);
  for (int n = 0; n < dims.outer_ndim; ++n) {
    plan.params.outer.strides[kSlots + i][n] = I(target.strides[dims.outer[n]]);
    plan.largest = std::max(plan.largest, target.strides[dims.outer[n]]);
  }
}

// Derivative sums lie in rows of all results; a row for each chunk, column block and position in the outer dimensions that
// this sum runs over.
template <class M, class I>
void place_partials(Reduction<M, I>& plan, int i, const Shape& shape, const SumTargets& targets, const ReductionDims& dims,
                    const BlockShape& block, const Chunks& chunks, const Spread& spread) {
  Sum& sum = plan.params.sums[i];
  const int64_t row_blocks = sum.per_column ? 1 : block.column_blocks;
  sum.store = Store::Accumulator;
  sum.column_stride = 1;
  sum.column_block_stride = uint64_t(sum.per_column ? 0 : spread.results);
  sum.chunk_stride = uint64_t(row_blocks * spread.results);
  int64_t result = sum.per_column ? shape.sizes[0] : 1;
  int64_t term = chunks.count * row_blocks * spread.results;
  for (int n = 0; n < dims.outer_ndim; ++n) {
    int64_t& stride = targets.keeps(i, dims.outer[n], shape) ? result : term;
    plan.params.outer.strides[kSlots + i][n] = I(stride);
    plan.largest = std::max(plan.largest, stride);
    stride *= shape.sizes[dims.outer[n]];
  }
  plan.workspace_at[i] = plan.workspace;
  plan.workspace += ceil_divide(spread.per_chunk * chunks.count * spread.results * int64_t(sizeof(M)), 16) * 16;
}

// The second launch, which adds up the partial sums of sum i.
template <class M, class I>
void add_up_partials(Reduction<M, I>& plan, int i, const Problem& problem, const SumTargets& targets, int64_t terms,
                     int64_t results) {
  const Arg& target = targets.args[i];
  PartialSums<M>& partials = plan.partials.sums[i];
  partials.data = target.data;
  partials.store = store_of(problem, target);
  partials.count = uint64_t(results);
  partials.terms = uint32_t(terms);
  // The sums wait for the last of them: lanes for as many as one round of loads covers, down to the results of a
  // sector of 32 bytes.
  partials.log_lanes = std::min<uint32_t>(floor_log2(std::max<int64_t>(terms / kPartialsUnroll, 1)),
                                          kLogThreads - std::min(ceil_log2(results), floor_log2(32 / int64_t(sizeof(M)))));
  partials.run = uint32_t(choose_run(ceil_divide(terms, int64_t(kPartialsUnroll) << partials.log_lanes), 1));
  OffsetCalculator<uint64_t, 1>& offsets = partials.offset_calculator;
  for (int d = 0; d < problem.shape.ndim; ++d) {
    if (targets.keeps(i, d, problem.shape)) {
      offsets.sizes[offsets.ndim] = FastDivisor<uint64_t>(problem.shape.sizes[d]);
      offsets.strides[0][offsets.ndim++] = uint64_t(target.strides[d]);
    }
  }
  const int64_t blocks = ceil_divide(results, kThreads >> partials.log_lanes);
  plan.partials_blocks += blocks;
  if (i == 0) {
    plan.partials.first_blocks = uint32_t(blocks);
  }
}

template <class T, class I>
Reduction<OpMath<T>, I> plan_reduction(const Problem& problem, const SumTargets& targets, int width, int unroll,
                                       int64_t target_blocks) {
  using M = OpMath<T>;
  const Shape& shape = problem.shape;
  const ReductionDims dims = sort_dims(shape, targets, width);
  const BlockShape block = shape_block(dims, unroll);

  // The larger sum decides on the chunks: two sums of one pattern are cut as each would be alone, so that asking for one
  // does not change bits of the other.
  Spread spreads[2];
  int64_t bytes_per_chunk = 0;
  for (int i = 0; i < 2; ++i) {
    if (targets.wanted[i]) {
      spreads[i] = spread_of(shape, targets, i, dims, block);
      bytes_per_chunk = std::max(bytes_per_chunk, spreads[i].results * spreads[i].per_chunk * int64_t(sizeof(M)));
    }
  }
  const Chunks chunks = cut_loop(dims, block, bytes_per_chunk, workspace_budget(problem), unroll, target_blocks);

  Reduction<M, I> plan;
  set_grid(plan, dims, block, chunks, unroll);
  set_accesses(plan, problem, targets, dims, chunks, width);
  for (int i = 0; i < 2; ++i) {
    if (!targets.wanted[i]) {
      continue;
    }
    plan.params.sums[i].wanted = true;
    plan.params.sums[i].per_column = dims.by_column && targets.keeps(i, 0, shape);
    plan.params.sums[i].times_parameter = targets.derivative(i).times_parameter;
    const int64_t terms = spreads[i].per_chunk * chunks.count;
    if (terms == 1) {
      place_final(plan, i, problem, targets.args[i], dims);
    } else {
      place_partials(plan, i, shape, targets, dims, block, chunks, spreads[i]);
      add_up_partials(plan, i, problem, targets, terms, spreads[i].results);
    }
  }
  return plan;
}

} // namespace safe_inplace::cuda
