// How a plan becomes launches: which tensors are read 16 bytes at a time, what a block and a thread own, and where the
// partial sums of a reduction lie. Nothing here depends on the device that runs it, its size or its load, so the order
// of every summation, and with it each bit of a gradient, is a function of the plan alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../plan.h"

#if defined(__CUDA_ARCH__)
#define SI_UNROLL _Pragma("unroll")
#define SI_ROLLED _Pragma("unroll 1")
#else
#define SI_UNROLL
#define SI_ROLLED
#endif

namespace safe_inplace::tiles {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kLogThreads = 8;

// Launches are cut for a device that holds about this many blocks, a few for each multiprocessor of a large one.
constexpr int64_t kTargetBlocks = 2048;

// Partial sums may take this much memory, or 1/32 of the gradient they are taken from, whichever is more.
constexpr int64_t kWorkspaceFloor = int64_t(1) << 20;
constexpr int64_t kWorkspaceShare = 32;

// Indices at or above this take 64-bit arithmetic: Divisor<uint32_t> is exact below 2^31. Tests lower it.
constexpr int64_t kIndexLimit = int64_t(1) << 31;

template <class T>
inline constexpr int kVector = 16 / sizeof(T);

// A 16-bit element may stand beside float operands.
template <class T>
inline constexpr bool kMayMix = sizeof(T) == 2;

template <class I>
struct Divisor;

// Division by multiplication with the rounded-up reciprocal (Granlund and Montgomery, 1994), exact for n < 2^31.
template <>
struct Divisor<uint32_t> {
  uint32_t size = 1, magic = 1, shift = 0;

  Divisor() = default;
  // A size past 32 bits makes a plan that does not fit, and is not divided by.
  explicit Divisor(int64_t n) : size(uint32_t(std::min(n, int64_t(UINT32_MAX)))), shift(0) {
    while ((uint64_t(1) << shift) < size) {
      ++shift;
    }
    magic = uint32_t((uint64_t(1) << 32) * ((uint64_t(1) << shift) - size) / size + 1);
  }
  SI_INLINE uint32_t divide(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, magic) + n) >> shift;
#else
    return (uint32_t((uint64_t(n) * magic) >> 32) + n) >> shift;
#endif
  }
};

template <>
struct Divisor<uint64_t> {
  uint64_t size = 1;

  Divisor() = default;
  explicit Divisor(int64_t n) : size(uint64_t(n)) {}
  SI_INLINE uint64_t divide(uint64_t n) const { return n / size; }
};

// The tensors of a launch. Forward reads Main, First and Second and writes Out0, which is Main, and Out1 (kept); backward reads
// the gradient as Main and the kept value as Saved, and writes the element-wise gradients of input and operands.
enum Slot : int { Main, First, Second, Saved, Out0, Out1, Out2, kSlots };
constexpr int kIns = 4, kOuts = 3;

// How the elements of one vector are reached.
enum class Mode : uint8_t {
  Absent,
  Number,
  Same, // one element serves the whole vector
  Vector, // 16-byte accesses
  Elements, // one access per element
};

template <class M>
struct Stream {
  void* data = nullptr;
  uint64_t step = 0; // in elements, between the elements of a vector
  M number{};
  Mode mode = Mode::Absent;
  bool wide = false; // float beside a 16-bit dtype
};

// A nest of dimensions, innermost first, with the strides of N tensors in it.
template <class I, int N>
struct Nest {
  int ndim = 0;
  Divisor<I> sizes[kMaxDims];
  I strides[N][kMaxDims] = {};

  // Adds the offsets, in tensors From to From + Count, of the `index`-th position. The outermost coordinate is what the
  // divisions leave.
  template <int From, int U, int Count, class Offset>
  SI_INLINE void add_offsets(const I (&index)[U], Offset (&offsets)[U][Count]) const {
    I rest[U];
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      rest[u] = index[u];
    }
    SI_ROLLED
    for (int d = 0; d + 1 < ndim; ++d) {
      SI_UNROLL
      for (int u = 0; u < U; ++u) {
        const I quotient = sizes[d].divide(rest[u]);
        const I coordinate = rest[u] - quotient * sizes[d].size;
        rest[u] = quotient;
        SI_UNROLL
        for (int n = 0; n < Count; ++n) {
          offsets[u][n] += Offset(coordinate) * strides[From + n][d];
        }
      }
    }
    if (ndim > 0) {
      SI_UNROLL
      for (int u = 0; u < U; ++u) {
        SI_UNROLL
        for (int n = 0; n < Count; ++n) {
          offsets[u][n] += Offset(rest[u]) * strides[From + n][ndim - 1];
        }
      }
    }
  }
};

// Element-wise launches. Index `i` is a vector; a block owns `tile` of them.
template <class M, class I>
struct MapParams {
  I count = 0;
  I tile = 0;
  Nest<I, kSlots> nest;
  Stream<M> streams[kSlots];
  M parameter{};
  int op = 0;
  // Where vectors straddle the ends of rows, they count from the aligned address at or before the first element, which
  // is `head` elements earlier; `nest` then walks rows, of `row` elements.
  I numel = 0;
  I head = 0;
  Divisor<I> row;
};

// One reduced gradient, or its partial sums.
enum class Store : uint8_t { Accumulator, Narrow, Float };

struct Sum {
  void* data = nullptr;
  uint64_t column_stride = 0; // elements between neighbouring columns, where each has its own sum
  uint64_t chunk_stride = 0;
  uint64_t column_block_stride = 0;
  bool wanted = false;
  bool per_column = false;
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
  Divisor<uint32_t> column_blocks;
  Divisor<uint32_t> outer_blocks;
  I column_strides[kSlots] = {};
  Nest<I, kSlots + 2> outer; // and where the two sums lie
  Nest<I, kSlots> loop;
  Stream<M> streams[kSlots];
  Sum sums[2]; // of the first and the second operand
  M parameter{};
  int op = 0;
};

// Adds up partial sums: `terms` of them for each of `count` results, one row of results after another.
template <class M>
struct FinishSum {
  const M* partials = nullptr;
  void* data = nullptr;
  uint64_t count = 0;
  uint32_t terms = 0;
  uint32_t log_lanes = 0;
  uint32_t run = 1; // rounds, a power of two
  Store store = Store::Narrow;
  Nest<uint64_t, 1> nest;
};

constexpr int kFinishUnroll = 8;

// Rounds of loads; shorter runs would cost time.
constexpr int64_t kShortestRun = 8;

template <class M>
struct FinishParams {
  uint32_t first_blocks = 0; // blocks of sums[0]
  FinishSum<M> sums[2];
};

// ---- Planning, on the host ----

enum class Path { Vectors, Ragged, Elements };

// What a launch works on, before a dtype and an index type are chosen.
struct Problem {
  DType dtype = DType::Float;
  Shape shape;
  Arg args[kSlots];
  bool present[kSlots] = {}; // as an operand that is read or written, number or tensor
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

inline int64_t item_size(const Arg& arg) { return dtype_size[int(arg.dtype)]; }

inline bool is_broadcast(const Arg& arg, const Shape& shape) {
  for (int d = 0; d < shape.ndim; ++d) {
    if (shape.sizes[d] > 1 && arg.strides[d] == 0) {
      return true;
    }
  }
  return false;
}

inline bool is_contiguous(const Arg& arg, const Shape& shape) {
  int64_t stride = 1;
  for (int d = 0; d < shape.ndim; ++d) {
    if (shape.sizes[d] > 1 && arg.strides[d] != stride) {
      return false;
    }
    stride *= shape.sizes[d];
  }
  return true;
}

// Every run of vectors along dimension 0 starts at a multiple of 16 bytes.
inline bool has_aligned_rows(const Arg& arg, const Shape& shape) {
  if (arg.strides[0] != 1 || reinterpret_cast<uintptr_t>(arg.data) % 16 != 0) {
    return false;
  }
  for (int d = 1; d < shape.ndim; ++d) {
    if (shape.sizes[d] > 1 && arg.strides[d] * item_size(arg) % 16 != 0) {
      return false;
    }
  }
  return true;
}

// The tensor whose layout decides: forward's input; for gradients, one that is written in full, else one read in full.
inline int anchor(const Problem& problem) {
  for (int slot : {Out0, Out1, Out2, Main, Saved}) {
    if (is_tensor(problem, slot) && !is_broadcast(problem.args[slot], problem.shape)) {
      return slot;
    }
  }
  return Main;
}

inline bool rows_take_vectors(const Problem& problem, int width) {
  const Shape& shape = problem.shape;
  if (width == 1 || shape.sizes[0] % width != 0 || !has_aligned_rows(problem.args[anchor(problem)], shape)) {
    return false;
  }
  // Contiguous memory read element by element is best read by neighbouring threads.
  for (int slot = 0; slot < kSlots; ++slot) {
    const Arg& arg = problem.args[slot];
    if (is_tensor(problem, slot) && arg.strides[0] == 1 && !is_broadcast(arg, shape) && !has_aligned_rows(arg, shape)) {
      return false;
    }
  }
  return true;
}

inline Path choose_path(const Problem& problem, int width, int64_t index_limit) {
  const Shape& shape = problem.shape;
  if (rows_take_vectors(problem, width)) {
    return Path::Vectors;
  }
  const Arg& arg = problem.args[anchor(problem)];
  if (width > 1 && shape.sizes[0] >= width && shape.numel + width < index_limit && is_contiguous(arg, shape)) {
    return Path::Ragged;
  }
  return Path::Elements;
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
Stream<M> make_stream(const Problem& problem, int slot) {
  Stream<M> stream;
  const Arg& arg = problem.args[slot];
  if (problem.present[slot]) {
    stream.data = arg.data;
    stream.number = Number<M>::from(arg.number);
    stream.wide = dtype_size[int(problem.dtype)] == 2 && arg.dtype == DType::Float;
    stream.mode = arg.data == nullptr ? Mode::Number : Mode::Elements;
  }
  return stream;
}

template <class M>
Stream<M> make_row_stream(const Problem& problem, int slot, int width) {
  Stream<M> stream = make_stream<M>(problem, slot);
  if (stream.mode == Mode::Elements) {
    const Arg& arg = problem.args[slot];
    stream.step = uint64_t(arg.strides[0]);
    stream.mode = width == 1                                  ? Mode::Elements
                  : arg.strides[0] == 0                       ? Mode::Same
                  : has_aligned_rows(arg, problem.shape) ? Mode::Vector
                                                              : Mode::Elements;
  }
  return stream;
}

inline int64_t stride_of(const Problem& problem, int slot, int d) {
  return is_tensor(problem, slot) ? problem.args[slot].strides[d] : 0;
}

// Vectors per block: `unroll` for each thread, fewer where that would leave a large device idle.
inline int64_t choose_tile(int64_t count, int unroll) {
  return kThreads * std::clamp<int64_t>(count / (kThreads * (kTargetBlocks / 2)), 1, unroll);
}

// Path::Vectors, or Path::Elements with width 1.
template <class M, class I>
MapParams<M, I> make_map(const Problem& problem, int width, int unroll) {
  const Shape& shape = problem.shape;
  MapParams<M, I> params;
  params.count = I(shape.numel / width);
  params.tile = I(choose_tile(shape.numel / width, unroll));
  params.nest.ndim = shape.ndim;
  for (int d = 0; d < shape.ndim; ++d) {
    params.nest.sizes[d] = Divisor<I>(d == 0 ? shape.sizes[0] / width : shape.sizes[d]);
    for (int slot = 0; slot < kSlots; ++slot) {
      params.nest.strides[slot][d] = I(stride_of(problem, slot, d) * (d == 0 ? width : 1));
    }
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    params.streams[slot] = make_row_stream<M>(problem, slot, width);
  }
  return params;
}

template <class M>
MapParams<M, uint32_t> make_ragged(const Problem& problem, int width, int unroll) {
  const Shape& shape = problem.shape;
  const Arg& lead = problem.args[anchor(problem)];
  const auto position = [](const Arg& arg) { return int64_t(reinterpret_cast<uintptr_t>(arg.data)) / item_size(arg); };
  MapParams<M, uint32_t> params;
  params.numel = uint32_t(shape.numel);
  params.head = uint32_t(position(lead) % width);
  params.row = Divisor<uint32_t>(shape.sizes[0]);
  params.count = uint32_t(ceil_divide(shape.numel + params.head, width));
  params.tile = uint32_t(choose_tile(params.count, unroll));
  params.nest.ndim = shape.ndim - 1;
  for (int d = 1; d < shape.ndim; ++d) {
    params.nest.sizes[d - 1] = Divisor<uint32_t>(shape.sizes[d]);
    for (int slot = 0; slot < kSlots; ++slot) {
      params.nest.strides[slot][d - 1] = uint32_t(stride_of(problem, slot, d));
    }
  }
  for (int slot = 0; slot < kSlots; ++slot) {
    Stream<M>& stream = params.streams[slot];
    stream = make_stream<M>(problem, slot);
    if (stream.mode == Mode::Elements) {
      const Arg& arg = problem.args[slot];
      const bool in_step = (position(arg) - int64_t(params.head)) % (16 / item_size(arg)) == 0;
      stream.step = uint64_t(arg.strides[0]);
      stream.mode = is_contiguous(arg, shape) && in_step ? Mode::Vector
                    : arg.strides[0] == 0                ? Mode::Same
                                                         : Mode::Elements;
    }
  }
  return params;
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
struct Reduction {
  ReduceParams<M, I> params;
  FinishParams<M> finish;
  int64_t blocks = 0;
  int64_t workspace = 0; // bytes; with it, the partial sums are added up by a second launch
  int64_t workspace_at[2] = {}; // of each sum, -1 where it is final already
  int64_t finish_blocks = 0;
  bool fits = true; // the index type
};

// sums[i] is the reduced gradient of operand i, where wanted[i].
struct SumTargets {
  Arg args[2];
  bool wanted[2] = {};
};

inline int64_t workspace_budget(const Problem& problem) {
  return std::max(kWorkspaceFloor, problem.shape.numel * dtype_size[int(problem.dtype)] / kWorkspaceShare);
}

template <class T, class I>
Reduction<Math<T>, I> make_reduction(const Problem& problem, const SumTargets& targets, int width, int unroll,
                                     int64_t index_limit, int64_t target_blocks) {
  using M = Math<T>;
  const Shape& shape = problem.shape;
  Reduction<M, I> result;
  ReduceParams<M, I>& params = result.params;

  const auto keeps = [&](int i, int d) { return shape.sizes[d] > 1 && targets.args[i].strides[d] != 0; };
  const auto wanted = [&](int i) { return targets.wanted[i]; };
  const bool by_column = (wanted(0) && keeps(0, 0)) || (wanted(1) && keeps(1, 0));

  int64_t outer_dims[kMaxDims], loop_dims[kMaxDims];
  int outer_ndim = 0, loop_ndim = 0;
  int64_t outer_count = 1, loop_count = 1;
  const int64_t row = shape.sizes[0] / width;
  for (int d = 0; d < shape.ndim; ++d) {
    if (d == 0 && by_column) {
      continue;
    }
    const int64_t size = d == 0 ? row : shape.sizes[d];
    if ((wanted(0) && keeps(0, d)) || (wanted(1) && keeps(1, d))) {
      outer_dims[outer_ndim++] = d;
      outer_count *= size;
    } else {
      loop_dims[loop_ndim++] = d;
      loop_count *= size;
    }
  }
  const int64_t columns = by_column ? row : 1;

  // A warp reads 32 neighbouring vectors where a row has as many. Lanes share the loop as far as each still has a few
  // rounds of loads to issue; what is left of the block goes to neighbouring positions of the outer dimensions.
  params.log_columns = by_column ? std::min<uint32_t>(ceil_log2(columns), 5) : 0;
  const uint32_t log_free = kLogThreads - params.log_columns;
  uint32_t log_lanes = floor_log2(std::max<int64_t>(loop_count / unroll, 1));
  if (!by_column) {
    // Short rows: a warp on each, so that a block covers neighbouring ones.
    const uint32_t log_row = std::max<uint32_t>(ceil_log2(row), 5);
    log_lanes = std::clamp(log_lanes, std::min<uint32_t>(ceil_log2(loop_count), 5), log_row);
  }
  params.log_lanes = std::min(log_lanes, log_free);
  const int64_t lanes = int64_t(1) << params.log_lanes;
  const int64_t groups = int64_t(1) << (log_free - params.log_lanes);

  const int64_t column_blocks = ceil_divide(columns, int64_t(1) << params.log_columns);
  const int64_t outer_blocks = ceil_divide(outer_count, groups);

  // How many partial sums each chunk of the loop adds to each result, and the memory that takes. The larger sum decides:
  // two sums of one pattern are cut as each would be alone, so that asking for one does not change bits of the other.
  int64_t results[2] = {1, 1}, spread[2] = {1, 1}, bytes_per_chunk = 0;
  for (int i = 0; i < 2; ++i) {
    if (!wanted(i)) {
      continue;
    }
    for (int d = 0; d < shape.ndim; ++d) {
      results[i] *= keeps(i, d) ? shape.sizes[d] : 1;
    }
    for (int n = 0; n < outer_ndim; ++n) {
      spread[i] *= keeps(i, int(outer_dims[n])) ? 1 : shape.sizes[outer_dims[n]];
    }
    spread[i] *= by_column && !keeps(i, 0) ? column_blocks : 1;
    bytes_per_chunk = std::max(bytes_per_chunk, results[i] * spread[i] * int64_t(sizeof(M)));
  }
  int64_t chunks = std::max<int64_t>(target_blocks / (column_blocks * outer_blocks), 1);
  chunks = std::min(chunks, std::max<int64_t>(loop_count / (lanes * unroll * 2), 1));
  chunks = std::min(chunks, std::max<int64_t>(workspace_budget(problem) / bytes_per_chunk, 1));
  const int64_t chunk = ceil_divide(loop_count, chunks);
  chunks = ceil_divide(loop_count, chunk);

  result.blocks = column_blocks * outer_blocks * chunks;
  params.columns = I(columns);
  params.outer_count = I(outer_count);
  params.loop_count = I(loop_count);
  params.chunk = I(chunk);
  params.run = I(lanes * unroll * choose_run(ceil_divide(chunk, lanes * unroll), unroll));
  params.column_blocks = Divisor<uint32_t>(column_blocks);
  params.outer_blocks = Divisor<uint32_t>(outer_blocks);
  int64_t largest = std::max({loop_count + lanes * unroll, outer_count + groups, columns});

  for (int slot = 0; slot < kSlots; ++slot) {
    params.streams[slot] = make_row_stream<M>(problem, slot, width);
    params.column_strides[slot] = by_column ? I(stride_of(problem, slot, 0) * width) : 0;
  }
  params.outer.ndim = outer_ndim;
  for (int n = 0; n < outer_ndim; ++n) {
    const int d = int(outer_dims[n]);
    params.outer.sizes[n] = Divisor<I>(shape.sizes[d]);
    for (int slot = 0; slot < kSlots; ++slot) {
      params.outer.strides[slot][n] = I(stride_of(problem, slot, d));
    }
  }
  params.loop.ndim = loop_ndim;
  // What offsets in the loop reach: all of it, or one chunk where the loop is of one dimension.
  int64_t spans[kSlots] = {};
  for (int n = 0; n < loop_ndim; ++n) {
    const int d = int(loop_dims[n]);
    const int64_t size = d == 0 ? row : shape.sizes[d];
    params.loop.sizes[n] = Divisor<I>(size);
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t stride = stride_of(problem, slot, d) * (d == 0 ? width : 1);
      params.loop.strides[slot][n] = I(stride);
      spans[slot] += ((loop_ndim == 1 ? chunk : size) - 1) * stride;
    }
  }
  largest = std::max(largest, *std::max_element(spans, spans + kSlots));

  for (int i = 0; i < 2; ++i) {
    Sum& sum = params.sums[i];
    result.workspace_at[i] = -1;
    sum.wanted = wanted(i);
    if (!sum.wanted) {
      continue;
    }
    const Arg& target = targets.args[i];
    const Store store = target.dtype == problem.dtype ? Store::Narrow : Store::Float;
    sum.per_column = by_column && keeps(i, 0);
    const int64_t terms = spread[i] * chunks;
    if (terms == 1) {
      sum.data = target.data;
      sum.store = store;
      sum.column_stride = uint64_t(target.strides[0]);
      for (int n = 0; n < outer_ndim; ++n) {
        params.outer.strides[kSlots + i][n] = I(target.strides[outer_dims[n]]);
        largest = std::max(largest, target.strides[outer_dims[n]]);
      }
      continue;
    }
    // Partial sums lie in rows of all results; a row for each chunk, column block and position in the outer dimensions
    // that this sum runs over.
    const int64_t row_blocks = sum.per_column ? 1 : column_blocks;
    sum.store = Store::Accumulator;
    sum.column_stride = 1;
    sum.column_block_stride = uint64_t(sum.per_column ? 0 : results[i]);
    sum.chunk_stride = uint64_t(row_blocks * results[i]);
    int64_t place = sum.per_column ? shape.sizes[0] : 1;
    int64_t term = chunks * row_blocks * results[i];
    for (int n = 0; n < outer_ndim; ++n) {
      const int d = int(outer_dims[n]);
      int64_t& stride = keeps(i, d) ? place : term;
      params.outer.strides[kSlots + i][n] = I(stride);
      largest = std::max(largest, stride);
      stride *= shape.sizes[d];
    }
    result.workspace_at[i] = result.workspace;
    result.workspace += ceil_divide(terms * results[i] * int64_t(sizeof(M)), 16) * 16;

    FinishSum<M>& finish = result.finish.sums[i];
    finish.data = target.data;
    finish.store = store;
    finish.count = uint64_t(results[i]);
    finish.terms = uint32_t(terms);
    // The sums wait for the last of them: lanes for as many as one round of loads covers, down to the results of a
    // sector of 32 bytes.
    finish.log_lanes =
        std::min<uint32_t>(floor_log2(std::max<int64_t>(terms / kFinishUnroll, 1)),
                           kLogThreads - std::min(ceil_log2(results[i]), floor_log2(32 / int64_t(sizeof(M)))));
    finish.run = uint32_t(choose_run(ceil_divide(terms, int64_t(kFinishUnroll) << finish.log_lanes), 1));
    finish.nest.ndim = 0;
    for (int d = 0; d < shape.ndim; ++d) {
      if (keeps(i, d)) {
        finish.nest.sizes[finish.nest.ndim] = Divisor<uint64_t>(shape.sizes[d]);
        finish.nest.strides[0][finish.nest.ndim++] = uint64_t(target.strides[d]);
      }
    }
    const int64_t finish_blocks = ceil_divide(results[i], kThreads >> finish.log_lanes);
    result.finish_blocks += finish_blocks;
    if (i == 0) {
      result.finish.first_blocks = uint32_t(finish_blocks);
    }
  }
  result.fits = largest < index_limit;
  return result;
}

} // namespace safe_inplace::tiles
