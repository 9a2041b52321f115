// What kernels are passed: an accessor for each tensor, offset calculators, and how the work is cut.
#pragma once

#include "offsets.h"

namespace safe_inplace::cuda {

// The tensors of a launch. Forward reads Main, First and Second and writes Out0, in place Main, and Out1 (kept); backward
// reads the gradient as Main and the kept value as Saved, and writes the element-wise gradients of input and operands.
enum Slot : int { Main, First, Second, Saved, Out0, Out1, Out2, kSlots };
constexpr int kIns = 4, kOuts = 3;

// Where backward reads a factor other than one.
SI_INLINE constexpr Slot slot_of(Factor factor) {
  return factor == Factor::First ? First : factor == Factor::Second ? Second : Saved;
}

// How the elements of one vector are reached.
enum class AccessMode : uint8_t {
  Absent,
  Number,
  Broadcast, // one element serves the whole vector
  Vector, // 16-byte accesses
  Elements, // one access per element
};

// A tensor, or a number, as a kernel reads or writes it.
template <class M>
struct Accessor {
  void* data = nullptr;
  uint64_t step = 0; // in elements, between the elements of a vector
  M number{};
  AccessMode mode = AccessMode::Absent;
  DType dtype = DType::Float; // of the tensor
};

// Element-wise launches. Index `i` is a vector; a block owns `tile` of them.
template <class M, class I>
struct ElementwiseParams {
  I count = 0;
  I tile = 0;
  OffsetCalculator<I, kSlots> offset_calculator;
  Accessor<M> accessors[kSlots];
  M parameter{};
  int op = 0;
  // Where vectors straddle the ends of rows, they count from the aligned address at or before the first element, which
  // is `head` elements earlier; `offset_calculator` then walks rows, of `row` elements.
  I numel = 0;
  I head = 0;
  FastDivisor<I> row;
};

// Element-wise launches of few vectors, over at most two dimensions, in which every tensor has vectors or one element along a
// row. A launch as short as these is made longer by each byte of its parameters and each step of index arithmetic.
template <class M>
struct SmallParams {
  void* data[kSlots] = {};
  uint32_t row_strides[kSlots] = {}; // in elements
  AccessMode modes[kSlots] = {};
  DType dtypes[kSlots] = {};
  M numbers[2] = {}; // where First or Second is one
  M parameter{};
  int op = 0;
  uint32_t count = 0; // of vectors
  FastDivisor<uint32_t> row; // of so many vectors
};

// As what a sum is stored: in the dtype of the launch, or of an operand beside it.
enum class Store : uint8_t { Accumulator, Own, Float, Half, BFloat16 };

// One reduced gradient, or its partial sums.
struct Sum {
  void* data = nullptr;
  uint64_t column_stride = 0; // elements between neighbouring columns, where each has its own sum
  uint64_t chunk_stride = 0;
  uint64_t column_block_stride = 0;
  bool wanted = false;
  bool per_column = false;
  bool times_parameter = false; // which, like a factor that is the same for all terms, is multiplied with the sum
  Store store = Store::Accumulator;
};

// The sums of one reading of the gradient. Dimensions are of two kinds: those that every sum here runs over ("loop"),
// cut in chunks, and the others ("outer"). Where some sum keeps dimension 0, threads own a vector of columns each and
// walk down them; else dimension 0 is part of the loop. A block is groups x lanes x columns threads: a group owns one
// position in the outer dimensions, its lanes share the loop.
template <class M, class I>
struct ReduceParams {
  uint32_t log_columns = 0;
  uint32_t log_lanes = 0;
  I columns = 1; // in vectors
  I outer_count = 1;
  I loop_count = 1;
  I chunk = 1;
  I run = 1; // of the loop, after which threads put their sums aside
  FastDivisor<uint32_t> column_blocks;
  FastDivisor<uint32_t> outer_blocks;
  I column_strides[kSlots] = {};
  OffsetCalculator<I, kSlots + 4> outer; // and where the two sums and their common factors lie
  OffsetCalculator<I, kSlots> loop;
  Accessor<M> accessors[kSlots]; // absent where nothing in the loop reads it
  Sum sums[2]; // of the first and the second operand
  Accessor<M> common_factors[2]; // of all terms of a sum; absent where the factor is another one for each
  I common_factor_column_strides[2] = {};
  M parameter{};
  int op = 0;
};

// The partial sums of one reduced gradient: `terms` of them for each of `count` results, one row of results after another.
template <class M>
struct PartialSums {
  const M* partials = nullptr;
  void* data = nullptr;
  uint64_t count = 0;
  uint32_t terms = 0;
  uint32_t log_lanes = 0;
  uint32_t run = 1; // rounds, a power of two
  Store store = Store::Own;
  OffsetCalculator<uint64_t, 1> offset_calculator;
};

template <class M>
struct ReducePartialsParams {
  uint32_t first_blocks = 0; // blocks of sums[0]
  PartialSums<M> sums[2];
};

// What was chosen for a launch.
struct Trace {
  const char* kernel;
  int vector; // elements per access
  int index_bits;
  int64_t workspace = 0; // bytes of partial sums
};

} // namespace safe_inplace::cuda
