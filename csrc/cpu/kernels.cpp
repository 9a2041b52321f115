// Walks a plan on the CPU: cuts it into rows for the loops of rows.h, copies what is not contiguous through a small
// buffer, splits the work between threads, and lays out the sums of broadcast gradients.
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../device.h"
#include "rows.h"

namespace safe_inplace {
namespace {

const RowTable& row_table() {
  static const RowTable& table = []() -> const RowTable& {
#if defined(__x86_64__)
    // ATen's own choice, so that both round alike and ATEN_CPU_CAPABILITY holds for both.
    const auto capability = at::get_cpu_capability();
    if (capability == "AVX512") {
      return rows_avx512;
    }
    if (capability == "AVX2") {
      return rows_avx2;
    }
#endif
    return rows_default;
  }();
  return table;
}

// Elements that pass through a buffer at a time: three of them in complex128 still fit a 32 KiB first-level cache.
constexpr int64_t kBlock = 512;
// A row shorter than this is not worth a call of its own.
constexpr int64_t kShortRow = 48;
constexpr int64_t kGrain = 32768;

// Buffers for the threads of one call. Not on their stacks: a thread may have 64 KiB for everything. And taken before the
// first byte is written, so that where there is no memory nothing is half done.
class Scratch {
 public:
  Scratch(int64_t bytes, int64_t threads) : bytes_(aligned(bytes)) {
    if (bytes_ * threads <= int64_t(sizeof own_)) {
      first_ = own_;
    } else {
      memory_.reset(new char[bytes_ * threads + kLine]);
      first_ = reinterpret_cast<char*>(aligned(reinterpret_cast<intptr_t>(memory_.get())));
    }
  }

  // A part that is nobody else's: parallel_for calls its function at most once for each thread.
  char* part() {
    return first_ + bytes_ * parts_.fetch_add(1, std::memory_order_relaxed);
  }

  static int64_t aligned(int64_t bytes) {
    return (bytes + kLine - 1) / kLine * kLine;
  }

 private:
  static constexpr int64_t kLine = 64;
  int64_t bytes_;
  char* first_;
  std::unique_ptr<char[]> memory_;
  std::atomic<int64_t> parts_{0};
  alignas(kLine) char own_[4096]; // enough for most small calls
};

DType math_dtype(DType dtype) {
  return dtype == DType::Half || dtype == DType::BFloat16 ? DType::Float : dtype;
}

void store_number(DType math, const double* number, void* out) {
  switch (math) {
    case DType::Float:
      *static_cast<float*>(out) = Number<float>::from(number);
      break;
    case DType::Double:
      *static_cast<double*>(out) = Number<double>::from(number);
      break;
    case DType::ComplexFloat:
      *static_cast<Complex<float>*>(out) = Number<Complex<float>>::from(number);
      break;
    default:
      *static_cast<Complex<double>*>(out) = Number<Complex<double>>::from(number);
  }
}

// One element, in its arithmetic dtype.
void load_math(DType dtype, const char* data, void* out) {
  switch (dtype) {
    case DType::Half:
      *static_cast<float*>(out) = widen(*reinterpret_cast<const Half*>(data));
      break;
    case DType::BFloat16:
      *static_cast<float*>(out) = widen(*reinterpret_cast<const BFloat16*>(data));
      break;
    default:
      std::memcpy(out, data, dtype_size[int(dtype)]);
  }
}

template <class Word>
void copy_strided(char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
  auto* out = reinterpret_cast<Word*>(to);
  const auto* in = reinterpret_cast<const Word*>(from);
  for (int64_t i = 0; i < n; ++i) {
    out[i * to_stride] = in[i * from_stride];
  }
}

void copy_strided(DType dtype, char* to, int64_t to_stride, const char* from, int64_t from_stride, int64_t n) {
  switch (dtype_size[int(dtype)]) {
    case 2:
      return copy_strided<uint16_t>(to, to_stride, from, from_stride, n);
    case 4:
      return copy_strided<uint32_t>(to, to_stride, from, from_stride, n);
    case 8:
      return copy_strided<uint64_t>(to, to_stride, from, from_stride, n);
    default:
      return copy_strided<std::array<uint64_t, 2>>(to, to_stride, from, from_stride, n);
  }
}

using Index = std::array<int64_t, kMaxDims>;

Index index_of(const Shape& shape, int64_t linear) {
  Index index = {};
  for (int dim = 0; dim < shape.ndim; ++dim) {
    index[dim] = linear % shape.sizes[dim];
    linear /= shape.sizes[dim];
  }
  return index;
}

// Moves to the next row: everything but dimension 0.
void next_row(const Shape& shape, Index& index) {
  index[0] = 0;
  for (int dim = 1; dim < shape.ndim; ++dim) {
    if (++index[dim] < shape.sizes[dim]) {
      return;
    }
    index[dim] = 0;
  }
}

int64_t offset_of(const Shape& shape, const Arg& arg, const Index& index) {
  int64_t offset = 0;
  for (int dim = 0; dim < shape.ndim; ++dim) {
    offset += index[dim] * arg.strides[dim];
  }
  return offset;
}

char* address(const Arg& arg, int64_t offset) {
  return static_cast<char*>(arg.data) + offset * dtype_size[int(arg.dtype)];
}

// Copies n elements, starting at index and running over row ends, between memory laid out as arg says and a
// contiguous buffer.
template <bool to_buffer>
void copy_elements(const Shape& shape, const Arg& arg, Index index, char* buffer, int64_t n) {
  const int64_t size = dtype_size[int(arg.dtype)];
  while (n > 0) {
    const int64_t run = std::min(n, shape.sizes[0] - index[0]);
    char* const data = address(arg, offset_of(shape, arg, index));
    if constexpr (to_buffer) {
      copy_strided(arg.dtype, buffer, 1, data, arg.strides[0], run);
    } else {
      copy_strided(arg.dtype, data, arg.strides[0], buffer, 1, run);
    }
    buffer += run * size;
    n -= run;
    next_row(shape, index);
  }
}

bool is_linear(const Shape& shape, const Arg& arg) {
  int64_t expected = 1;
  for (int dim = 0; dim < shape.ndim; ++dim) {
    if (arg.strides[dim] != expected) {
      return false;
    }
    expected *= shape.sizes[dim];
  }
  return true;
}

bool varies_only_along_rows(const Shape& shape, const Arg& arg) {
  return std::all_of(arg.strides + 1, arg.strides + shape.ndim, [](int64_t stride) { return stride == 0; });
}

bool is_constant(const Shape& shape, const Arg& arg) {
  return arg.strides[0] == 0 && varies_only_along_rows(shape, arg);
}

// What does not vary along a row: its values for some rows, in the arithmetic dtype.
const void* one_per_row(const Arg& arg, const char* from, int64_t row_stride, int64_t rows, char* buffer,
                        int64_t& stride) {
  const DType math = math_dtype(arg.dtype);
  if (arg.dtype == math) {
    stride = row_stride;
    return from;
  }
  stride = row_stride == 0 ? 0 : 1;
  const int64_t values = row_stride == 0 ? 1 : rows;
  for (int64_t row = 0; row < values; ++row) {
    load_math(arg.dtype, from + row * row_stride * dtype_size[int(arg.dtype)], buffer + row * dtype_size[int(math)]);
  }
  return buffer;
}

// To the arithmetic dtype, as a product with one.
void widen_row(DType dtype, const char* from, int64_t n, char* to) {
  if (dtype == math_dtype(dtype)) {
    std::memcpy(to, from, n * dtype_size[int(dtype)]);
    return;
  }
  alignas(16) char one[16];
  const double number[2] = {1, 0};
  store_number(math_dtype(dtype), number, one);
  row_table().backward[int(dtype)][kNoFactor][kStoreMath]({from, 0, nullptr, 0, to, 0, one, 1, n});
}

// How one thread walks its part of a forward call.
struct Walk {
  // Many short rows are taken as one long row, what is not linear through a buffer.
  bool short_rows = false;
  // Rows taken as one where they follow each other in memory, and operands that are the same for each are repeated in
  // the buffer. Going back to the start of a short vector for every row derails the prefetching of the input: 3.35 ms
  // instead of 2.76 for 64 MiB of half in rows of 512 (one Zen 4 core).
  int64_t stack = 1;
};

// An operand of the forward loops for one thread: what the loops will be handed, and the buffer behind it.
struct ForwardOperand {
  enum Source {
    Memory, // the operand itself
    Constant, // one value
    OnePerRow, // one value for each row, in the buffer if they have to be widened
    Copied, // the elements that the loop is to see, in the buffer
    Periodic, // the same, but the buffer, once filled from the start of a row, stays valid
    Repeated, // a row, in the arithmetic dtype, in the buffer as often as rows are stacked
  };
  const Arg* arg;
  RowOperand kind = kOne;
  Source source = Constant;
  int64_t bytes = 0; // of the buffer
  char* buffer = nullptr; // of this thread
  const char* held = nullptr; // the row that the buffer holds, for Periodic and Repeated
  alignas(16) char constant[16];

  void prepare(const ForwardPlan& plan, const Arg& operand, const Walk& walk) {
    arg = &operand;
    const Shape& shape = plan.shape;
    const DType math = math_dtype(plan.dtype);
    if (operand.data == nullptr) {
      store_number(math, operand.number, constant);
      return;
    }
    if (is_constant(shape, operand)) {
      load_math(operand.dtype, static_cast<const char*>(operand.data), constant);
      return;
    }
    kind = operand.dtype == plan.dtype ? kOwn : kMath;
    if (walk.short_rows) {
      source = is_linear(shape, operand)             ? Memory
          : varies_only_along_rows(shape, operand) ? Periodic
                                                     : Copied;
    } else if (operand.strides[0] == 0) {
      source = OnePerRow;
      kind = kOne;
    } else if (operand.strides[0] != 1) {
      source = Copied;
    } else if (repeats(shape, operand) && (walk.stack > 1 || worth_widening(shape, operand))) {
      source = Repeated;
      kind = operand.dtype == plan.dtype && operand.dtype == math ? kOwn : kMath;
    } else {
      source = Memory;
    }
    const int64_t block = std::min(kBlock, shape.numel);
    bytes = limits_columns()                           ? block * dtype_size[int(operand.dtype)]
        : source == OnePerRow && operand.dtype != math ? block * dtype_size[int(math)]
        : source == Repeated ? shape.sizes[0] * walk.stack * dtype_size[int(math)]
                             : 0;
  }

  // In 4 KiB: two operands of 8 KiB each would crowd the input out of the first-level cache.
  static int64_t capacity(DType dtype) {
    return 4096 / dtype_size[int(math_dtype(dtype))];
  }

  static bool repeats(const Shape& shape, const Arg& arg) {
    return shape.ndim > 1 && arg.strides[0] == 1 && arg.strides[1] == 0;
  }

  // Widening for every row of the input would cost as much as the arithmetic.
  static bool worth_widening(const Shape& shape, const Arg& arg) {
    return arg.dtype != math_dtype(arg.dtype) && shape.sizes[1] >= 8 && shape.sizes[0] <= capacity(arg.dtype);
  }

  bool limits_columns() const {
    return source == Copied || source == Periodic;
  }

  // The operand for rows of n elements from index on, and the stride from row to row. A row may run over the ends of
  // the shape's rows.
  const void* at(const Shape& shape, const Index& index, const Walk& walk, int64_t rows, int64_t n, int64_t& stride) {
    stride = 0;
    if (source == Constant) {
      return constant;
    }
    const char* const data = address(*arg, offset_of(shape, *arg, index));
    const int64_t row_stride = shape.ndim > 1 ? arg->strides[1] : 0;
    switch (source) {
      case OnePerRow:
        return one_per_row(*arg, data, row_stride, rows, buffer, stride);
      case Copied:
        copy_elements<true>(shape, *arg, index, buffer, n);
        return buffer;
      case Periodic:
        if (index[0] != 0 || held == nullptr) {
          copy_elements<true>(shape, *arg, index, buffer, n);
          held = index[0] == 0 ? data : nullptr;
        }
        return buffer;
      case Repeated: {
        const int64_t math_size = dtype_size[int(math_dtype(arg->dtype))];
        const char* const row = data - index[0] * dtype_size[int(arg->dtype)];
        if (held != row) {
          const int64_t row_bytes = shape.sizes[0] * math_size;
          widen_row(arg->dtype, row, shape.sizes[0], buffer);
          for (int64_t copy = 1; copy < walk.stack; ++copy) {
            std::memcpy(buffer + copy * row_bytes, buffer, row_bytes);
          }
          held = row;
        }
        return buffer + index[0] * math_size;
      }
      default:
        stride = row_stride * walk.stack;
        return data;
    }
  }
};

Walk choose_walk(const ForwardPlan& plan) {
  const Shape& shape = plan.shape;
  Walk walk;
  if (shape.ndim == 1) {
    return walk;
  }
  const int64_t inner = shape.sizes[0];
  const auto follow_each_other = [&](const Arg& arg) { return arg.strides[0] == 1 && arg.strides[1] == inner; };
  bool stackable = follow_each_other(plan.input) && (plan.kept.data == nullptr || follow_each_other(plan.kept));
  for (const Arg& operand : plan.operands) {
    stackable = stackable &&
        (operand.data == nullptr || is_constant(shape, operand) || follow_each_other(operand) ||
         ForwardOperand::repeats(shape, operand));
  }
  if (stackable) {
    // Few rows are not worth the filling of the buffer.
    const int64_t worthwhile = shape.sizes[1] / 4;
    walk.stack = std::max<int64_t>(1, std::min(worthwhile, ForwardOperand::capacity(plan.dtype) / inner));
  }
  walk.short_rows = inner * walk.stack < kShortRow;
  if (walk.short_rows) {
    walk.stack = 1;
  }
  return walk;
}

// A forward call: what is the same for all its threads.
struct ForwardPass {
  const ForwardPlan& plan;
  const Walk walk = choose_walk(plan);
  const bool copy_input = is_copied(plan.input);
  const bool copy_kept = plan.kept.data != nullptr && is_copied(plan.kept);
  const int64_t copied_bytes = Scratch::aligned(std::min(kBlock, plan.shape.numel) * dtype_size[int(plan.dtype)]);
  bool limited = copy_input || copy_kept;
  ForwardOperand operands[2];
  ForwardRows forward_rows;
  alignas(16) char parameter[16];

  explicit ForwardPass(const ForwardPlan& forward_plan) : plan(forward_plan) {
    for (int i = 0; i < 2; ++i) {
      operands[i].prepare(plan, plan.operands[i], walk);
      limited = limited || operands[i].limits_columns();
    }
    store_number(math_dtype(plan.dtype), plan.parameter, parameter);
    forward_rows = row_table().forward[plan.op][int(plan.dtype)][operands[0].kind][operands[1].kind];
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(forward_rows != nullptr);
  }

  bool is_copied(const Arg& arg) const {
    return walk.short_rows ? !is_linear(plan.shape, arg) : arg.strides[0] != 1;
  }

  // What a thread needs in buffers.
  int64_t scratch_bytes() const {
    return Scratch::aligned(operands[0].bytes) + Scratch::aligned(operands[1].bytes) +
        (copy_input ? copied_bytes : 0) + (copy_kept ? copied_bytes : 0);
  }

  void run(int64_t begin, int64_t end, char* scratch) const;
};

// Over the elements [begin, end) in the plan's order.
void ForwardPass::run(int64_t begin, int64_t end, char* scratch) const {
  const Shape& shape = plan.shape;
  const int64_t inner = shape.sizes[0];
  const auto next_buffer = [&](int64_t bytes) {
    char* const buffer = scratch;
    scratch += Scratch::aligned(bytes);
    return buffer;
  };
  ForwardOperand own[2] = {operands[0], operands[1]};
  for (ForwardOperand& operand : own) {
    operand.buffer = next_buffer(operand.bytes);
  }
  char* const input_buffer = next_buffer(copy_input ? copied_bytes : 0);
  char* const kept_buffer = scratch;

  ForwardBlock block;
  block.parameter = parameter;
  block.kept = nullptr;
  block.input_stride = shape.ndim > 1 ? plan.input.strides[1] * walk.stack : 0;
  block.kept_stride = shape.ndim > 1 ? plan.kept.strides[1] * walk.stack : 0;

  for (int64_t at = begin; at < end; at += block.rows * block.n) {
    const Index index = index_of(shape, at);
    const int64_t left = end - at;
    const int64_t to_row_end = inner - index[0];
    block.rows = 1;
    if (walk.short_rows) {
      // Whole rows, so that what is periodic always starts at the same phase.
      block.n = std::min(left, index[0] == 0 ? kBlock / inner * inner : to_row_end);
    } else if (limited) {
      block.n = std::min({left, to_row_end, kBlock});
    } else if (index[0] == 0 && left > inner && shape.ndim > 1) {
      const int64_t rows = std::min(left / inner, shape.sizes[1] - index[1]);
      block.n = inner * std::min(rows, walk.stack);
      block.rows = std::clamp<int64_t>(rows / walk.stack, 1, kBlock);
    } else {
      block.n = std::min(left, to_row_end);
    }
    for (int i = 0; i < 2; ++i) {
      block.operands[i] = own[i].at(shape, index, walk, block.rows, block.n, block.operand_strides[i]);
    }
    block.input = address(plan.input, offset_of(shape, plan.input, index));
    if (copy_input) {
      copy_elements<true>(shape, plan.input, index, input_buffer, block.n);
      block.input = input_buffer;
    }
    if (plan.kept.data != nullptr) {
      block.kept = copy_kept ? kept_buffer : address(plan.kept, offset_of(shape, plan.kept, index));
    }
    forward_rows(block);
    if (copy_input) {
      copy_elements<false>(shape, plan.input, index, input_buffer, block.n);
    }
    if (copy_kept) {
      copy_elements<false>(shape, plan.kept, index, kept_buffer, block.n);
    }
  }
}

// Memory fresh from the system costs a page fault at the first touch of every page: for pages of 4 KiB several times
// what the kernel itself takes. Up to 32 MiB malloc may serve a block from its heap, whose pages are often there already,
// and which it trims: large pages made 16 MiB three times slower there. Beyond, it maps each block anew.
void prefer_large_pages(const Arg& fresh, int64_t elements) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kAlwaysMapped = 32 << 20;
  constexpr uintptr_t kPage = 4096;
  const int64_t bytes = elements * dtype_size[int(fresh.dtype)];
  if (bytes > kAlwaysMapped) {
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(fresh.data) + kPage - 1) & ~(kPage - 1);
    const uintptr_t end = (reinterpret_cast<uintptr_t>(fresh.data) + bytes) & ~(kPage - 1);
    // A system that refuses gives small pages, as without the advice.
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

void forward(const ForwardPlan& plan) {
  if (plan.kept.data != nullptr) {
    prefer_large_pages(plan.kept, plan.shape.numel);
  }
  const ForwardPass pass(plan);
  if (plan.shape.numel <= kGrain) {
    Scratch scratch(pass.scratch_bytes(), 1);
    return pass.run(0, plan.shape.numel, scratch.part());
  }
  Scratch scratch(pass.scratch_bytes(), at::get_num_threads());
  at::parallel_for(0, plan.shape.numel, kGrain,
                   [&](int64_t begin, int64_t end) { pass.run(begin, end, scratch.part()); });
}

// The iteration space of one chunk of the backward pass.
struct Box {
  Index low = {};
  Index high = {};
};

// How the backward pass is cut into chunks. It depends on the plan alone, never on the number of threads, so that a
// sum is the same bits whoever computes it.
struct Split {
  int dim = 0;
  int64_t chunks = 1;
  int64_t step = 1; // indices of `dim` in a chunk
};

int64_t partial_elements(const BackwardPlan& plan, const Split& split) {
  int64_t elements = 0;
  for (int i = 0; i < 3; ++i) {
    if (plan.wanted[i] && plan.reduced[i] && plan.grads[i].strides[split.dim] == 0 && split.chunks > 1) {
      elements += split.chunks * plan.numel[i];
    }
  }
  return elements;
}

Split split_by(const BackwardPlan& plan, int dim, int64_t wanted) {
  const int64_t size = plan.shape.sizes[dim];
  // A chunk of the innermost dimension keeps whole cache lines.
  const int64_t unit = dim == 0 ? 64 : 1;
  const int64_t units = (size + unit - 1) / unit;
  const int64_t step = (units + std::min(units, wanted) - 1) / std::min(units, wanted) * unit;
  return {dim, (size + step - 1) / step, step};
}

Split choose_split(const BackwardPlan& plan) {
  constexpr int64_t kMaxChunks = 64;
  const int64_t wanted = std::clamp<int64_t>(plan.shape.numel / kGrain, 1, kMaxChunks);
  const int64_t enough = std::min<int64_t>(wanted, 8);
  Split best = split_by(plan, plan.shape.ndim - 1, wanted);
  const auto poor = [&](const Split& split) {
    return split.chunks < enough || partial_elements(plan, split) > plan.shape.numel / 16;
  };
  for (int dim = plan.shape.ndim - 2; dim >= 0 && poor(best); --dim) {
    const Split other = split_by(plan, dim, wanted);
    const bool smaller = partial_elements(plan, other) < partial_elements(plan, best);
    if (!poor(other) || (other.chunks >= enough && (smaller || best.chunks < enough))) {
      best = other;
    }
  }
  // Few, large outer dimensions over a long row: one chunk rather than partial sums as large as the input.
  if (partial_elements(plan, best) > plan.shape.numel / 2) {
    return {0, 1, plan.shape.sizes[0]};
  }
  return best;
}

// Rows and columns that a block of the backward pass covers at most.
constexpr int64_t kBlockColumns = 2048;
constexpr int64_t kBlockRows = 1024;
constexpr int64_t kBlockElements = 4096;

// How a chunk is cut into blocks: as the largest chunk asks for, so that all are cut alike.
struct Cut {
  int64_t columns = 1; // of a block
  int64_t rows = 1;
  int64_t column_blocks = 1; // side by side in a chunk
  int64_t row_blocks = 1;
};

Cut choose_cut(const Shape& shape, const Split& split) {
  const auto extent = [&](int dim) {
    return dim >= shape.ndim ? 1 : split.dim == dim ? std::min(split.step, shape.sizes[dim]) : shape.sizes[dim];
  };
  const int64_t width = extent(0), height = extent(1);
  Cut cut;
  cut.columns = width;
  if (width > kBlockColumns) {
    // Even parts of whole cache lines.
    const int64_t parts = (width + kBlockColumns - 1) / kBlockColumns;
    cut.columns = (width + parts * 64 - 1) / (parts * 64) * 64;
  }
  cut.rows = std::min({height, kBlockRows, std::max<int64_t>(1, kBlockElements / cut.columns)});
  cut.column_blocks = (width + cut.columns - 1) / cut.columns;
  cut.row_blocks = (height + cut.rows - 1) / cut.rows;
  return cut;
}

// Sums are added up in levels, each in chains of about this many terms. A running sum of n equal terms may be off by n/2
// units in the last place, for its roundings all go one way; this way the error grows with the logarithm of n. The
// longest chains: in a block, 32 (a row in vector registers, or 16 groups of four rows, or 32 sums of 32 rows); of blocks,
// 16 at each level, and three levels for 2^26 elements; of chunks, 8 and 8.
constexpr int64_t kChain = 16;
constexpr int64_t kFinishChain = 8;

// One gradient of the backward pass.
struct Gradient {
  int position = 0; // of the operand: input, first, second
  const Arg* out = nullptr;
  const Arg* factor = nullptr; // null: nothing to multiply by but the number
  RowFactor factor_kind = kNoFactor;
  bool reduced = false;
  int turn = 0; // what is written over the kept value follows its readers, what is written over the gradient is last
  bool copied = false; // stored through a buffer
  RowTarget target = kStoreOwn;
  char* sums = nullptr; // partial sums of all chunks, in the arithmetic dtype, one level after the other
  int64_t sums_per_chunk = 0; // elements; 0: the chunks own disjoint parts
  int levels = 1;
  int64_t run = 1; // visits to an element's first level until that is moved on
  // The dot product with a block's numbers along each dimension counts the visits to the block's elements before it.
  Index visits = {};
  alignas(16) char multiplier[16];
};

double conjugate_sign(DType dtype) {
  return dtype == DType::ComplexFloat || dtype == DType::ComplexDouble ? -1.0 : 1.0;
}

// Where the `rows` rows of n elements at index stand, contiguous along the row (through the buffer if they are not),
// and the stride from row to row.
const char* read_block(const Shape& shape, const Arg& arg, const Index& index, int64_t rows, int64_t n, char* buffer,
                       int64_t& stride) {
  const char* const data = address(arg, offset_of(shape, arg, index));
  const int64_t row_stride = shape.ndim > 1 ? arg.strides[1] : 0;
  if (arg.strides[0] == 1 || n == 1) {
    stride = row_stride;
    return data;
  }
  const int64_t size = dtype_size[int(arg.dtype)];
  for (int64_t row = 0; row < rows; ++row) {
    copy_strided(arg.dtype, buffer + row * n * size, 1, data + row * row_stride * size, arg.strides[0], n);
  }
  stride = n;
  return buffer;
}

// Calls function with a value of the arithmetic dtype.
template <class Function>
void with_math(DType math, Function&& function) {
  switch (math) {
    case DType::Float:
      return function(float{});
    case DType::Double:
      return function(double{});
    case DType::ComplexFloat:
      return function(Complex<float>{});
    default:
      return function(Complex<double>{});
  }
}

struct Backward {
  const BackwardPlan& plan;
  const DType math = math_dtype(plan.dtype);
  const int64_t math_size = dtype_size[int(math)];
  const Split split = choose_split(plan);
  const Cut cut = choose_cut(plan.shape, split);
  Gradient gradients[3];
  int count = 0;
  std::unique_ptr<char[]> sums;

  explicit Backward(const BackwardPlan& backward_plan) : plan(backward_plan) {
    for (int i = 0; i < 3; ++i) {
      if (plan.wanted[i]) {
        add_gradient(i);
      }
    }
    std::stable_sort(gradients, gradients + count,
                     [](const Gradient& a, const Gradient& b) { return a.turn < b.turn; });
    allocate_sums();
  }

  void add_gradient(int position) {
    const Partial& partial = infos[plan.op].partials[position];
    Gradient& gradient = gradients[count++];
    gradient.position = position;
    gradient.out = &plan.grads[position];
    gradient.reduced = plan.reduced[position];
    gradient.turn = gradient.out->data == plan.grad.data               ? 2
        : gradient.out->data == plan.factors[int(Factor::Kept)].data ? 1
                                                                     : 0;
    double number[2] = {1, 0};
    if (partial.times_parameter) {
      number[0] = plan.parameter[0];
      number[1] = conjugate_sign(plan.dtype) * plan.parameter[1];
    }
    if (partial.factor != Factor::One) {
      gradient.factor = &plan.factors[int(partial.factor)];
      gradient.factor_kind = gradient.factor->data == nullptr ? kFactorOne
          : gradient.factor->dtype == plan.dtype             ? kFactorOwn
                                                             : kFactorMath;
    }
    store_number(math, number, gradient.multiplier);
    if (!gradient.reduced) {
      gradient.target = gradient.out->dtype == plan.dtype ? kStoreOwn : kStoreMath;
      gradient.copied = gradient.out->strides[0] != 1;
      if (gradient.turn == 0) {
        prefer_large_pages(*gradient.out, plan.shape.numel);
      }
    }
  }

  // How many levels the sums take, and how the visits to an element are counted.
  void choose_levels(Gradient& gradient) const {
    const Shape& shape = plan.shape;
    const auto& strides = gradient.out->strides;
    int64_t visits = 1;
    const auto visited_along = [&](int dim, int64_t blocks) {
      if (strides[dim] == 0) {
        gradient.visits[dim] = visits;
        visits *= blocks;
      }
    };
    // From the innermost of run_chunk's loops to the outermost.
    if (shape.ndim > 1) {
      visited_along(1, cut.row_blocks);
    }
    visited_along(0, cut.column_blocks);
    for (int dim = 2; dim < shape.ndim; ++dim) {
      visited_along(dim, dim == split.dim ? split.step : shape.sizes[dim]);
    }
    // A block adds a row's or a column's sum at once, or by fours, or what it has summed up of 64 rows.
    const bool by_columns = strides[0] == 1 && shape.ndim > 1 && strides[1] == 0;
    const int64_t additions = !by_columns ? 1 : cut.rows > 64 ? cut.rows / 64 + 1 : cut.rows / 4 + cut.rows % 4;
    gradient.run = std::max<int64_t>(1, kChain / additions);
    gradient.levels = 1;
    int64_t left = visits > 2 * gradient.run ? visits / gradient.run : 0;
    for (; left > 0; left = left > kChain ? left / kChain : 0) {
      ++gradient.levels;
    }
  }

  void allocate_sums() {
    int64_t elements = 0;
    for (int i = 0; i < count; ++i) {
      Gradient& gradient = gradients[i];
      if (gradient.reduced) {
        choose_levels(gradient);
        const int64_t numel = plan.numel[gradient.position] * gradient.levels;
        const bool shared = gradient.out->strides[split.dim] == 0 && split.chunks > 1;
        gradient.sums_per_chunk = shared ? numel : 0;
        elements += shared ? numel * split.chunks : numel;
      }
    }
    if (elements == 0) {
      return;
    }
    sums.reset(new char[elements * math_size]());
    char* next = sums.get();
    for (int i = 0; i < count; ++i) {
      Gradient& gradient = gradients[i];
      if (gradient.reduced) {
        gradient.sums = next;
        const int64_t numel = plan.numel[gradient.position] * gradient.levels;
        next += (gradient.sums_per_chunk != 0 ? numel * split.chunks : numel) * math_size;
      }
    }
  }

  struct Buffers {
    char* grad;
    char* factor;
    char* out;
  };

  // What a block needs of each buffer: nothing where the kernels can work in the tensors themselves.
  struct BufferSizes {
    int64_t grad = 0, factor = 0, out = 0;

    int64_t total() const { return grad + factor + out; }
    Buffers within(char* scratch) const { return {scratch, scratch + grad, scratch + grad + factor}; }
  };

  BufferSizes buffer_sizes() const {
    const int64_t elements = cut.rows * cut.columns;
    const auto of_elements = [&](const Arg& arg) { return Scratch::aligned(elements * dtype_size[int(arg.dtype)]); };
    BufferSizes sizes;
    if (plan.grad.strides[0] != 1) {
      sizes.grad = of_elements(plan.grad);
    }
    for (int i = 0; i < count; ++i) {
      const Gradient& gradient = gradients[i];
      if (gradient.factor_kind == kFactorOwn || gradient.factor_kind == kFactorMath) {
        const Arg& factor = *gradient.factor;
        const bool widened = factor.strides[0] == 0 && factor.dtype != math;
        const int64_t bytes = widened ? Scratch::aligned(cut.rows * math_size)
            : factor.strides[0] > 1  ? of_elements(factor)
                                      : 0;
        sizes.factor = std::max(sizes.factor, bytes);
      }
      if (gradient.copied) {
        sizes.out = std::max(sizes.out, of_elements(*gradient.out));
      }
    }
    return sizes;
  }

  void run() {
    const BufferSizes sizes = buffer_sizes();
    const bool alone = split.chunks == 1 || plan.shape.numel < 2 * kGrain;
    Scratch scratch(sizes.total(), alone ? 1 : at::get_num_threads());
    at::parallel_for(0, split.chunks, alone ? split.chunks : 1, [&](int64_t begin, int64_t end) {
      const Buffers buffers = sizes.within(scratch.part());
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        run_chunk(chunk, buffers);
      }
    });
    for (int i = 0; i < count; ++i) {
      if (gradients[i].reduced) {
        with_math(math, [&](auto tag) { finish<decltype(tag)>(gradients[i]); });
      }
    }
  }

  void run_chunk(int64_t chunk, const Buffers& buffers) const {
    const Shape& shape = plan.shape;
    Box box;
    for (int dim = 0; dim < shape.ndim; ++dim) {
      box.high[dim] = shape.sizes[dim];
    }
    box.low[split.dim] = chunk * split.step;
    box.high[split.dim] = std::min(shape.sizes[split.dim], box.low[split.dim] + split.step);
    const int64_t height = shape.ndim > 1 ? box.high[1] - box.low[1] : 1;

    Index index = box.low;
    Index number = {}; // of the block, along each dimension
    while (true) {
      number[0] = 0;
      for (int64_t column = box.low[0]; column < box.high[0]; column += cut.columns, ++number[0]) {
        const int64_t n = std::min(cut.columns, box.high[0] - column);
        number[1] = 0;
        for (int64_t row = 0; row < height; row += cut.rows, ++number[1]) {
          index[0] = column;
          if (shape.ndim > 1) {
            index[1] = box.low[1] + row;
          }
          run_block(chunk, index, number, std::min(cut.rows, height - row), n, buffers);
        }
      }
      int dim = 2;
      for (; dim < shape.ndim; ++dim) {
        ++number[dim];
        if (++index[dim] < box.high[dim]) {
          break;
        }
        index[dim] = box.low[dim];
        number[dim] = 0;
      }
      if (dim >= shape.ndim) {
        return;
      }
    }
  }

  void run_block(int64_t chunk, const Index& index, const Index& number, int64_t rows, int64_t n,
                 const Buffers& buffers) const {
    const Shape& shape = plan.shape;
    alignas(16) char constant[16];
    BackwardBlock block;
    block.rows = rows;
    block.n = n;
    block.grad = read_block(shape, plan.grad, index, rows, n, buffers.grad, block.grad_stride);
    for (int i = 0; i < count; ++i) {
      const Gradient& gradient = gradients[i];
      block.multiplier = gradient.multiplier;
      block.factor = nullptr;
      block.factor_stride = 0;
      RowFactor kind = gradient.factor_kind;
      if (kind == kFactorOne) {
        store_number(math, gradient.factor->number, constant);
        block.factor = constant;
      } else if (kind != kNoFactor && gradient.factor->strides[0] == 0) {
        const Arg& factor = *gradient.factor;
        const int64_t row_stride = shape.ndim > 1 ? factor.strides[1] : 0;
        const char* const from = address(factor, offset_of(shape, factor, index));
        block.factor = one_per_row(factor, from, row_stride, rows, buffers.factor, block.factor_stride);
        kind = kFactorOne;
      } else if (kind != kNoFactor) {
        block.factor = read_block(shape, *gradient.factor, index, rows, n, buffers.factor, block.factor_stride);
      }
      if (gradient.reduced) {
        add_block(chunk, gradient, kind, index, block);
        move_on(gradient, number, block);
      } else {
        store_block(gradient, kind, index, block, buffers.out);
      }
    }
  }

  void add_block(int64_t chunk, const Gradient& gradient, RowFactor kind, const Index& index,
                 BackwardBlock& block) const {
    const int64_t stride = gradient.out->strides[0];
    const int64_t offset = chunk * gradient.sums_per_chunk + offset_of(plan.shape, *gradient.out, index);
    block.target = gradient.sums + offset * math_size;
    block.target_stride = plan.shape.ndim > 1 ? gradient.out->strides[1] : 0;
    const auto& rows = row_table().backward[int(plan.dtype)][kind];
    if (stride == 0 || block.n == 1) {
      rows[kAddSum](block);
    } else if (stride == 1) {
      rows[kAddColumns](block);
    } else {
      add_strided_columns(rows[kAddSum], gradient, kind, stride, block);
    }
  }

  // Where a level's chain is at its end, the block's sums in it are added to the next level and start anew.
  void move_on(const Gradient& gradient, const Index& number, const BackwardBlock& block) const {
    if (gradient.levels == 1) {
      return;
    }
    int64_t visits = 1;
    for (int dim = 0; dim < plan.shape.ndim; ++dim) {
      visits += number[dim] * gradient.visits[dim];
    }
    int64_t chain = gradient.run;
    for (int level = 0; level + 1 < gradient.levels && visits % chain == 0; ++level) {
      with_math(math, [&](auto tag) { move_up<decltype(tag)>(gradient, level, block); });
      visits /= chain;
      chain = kChain;
    }
  }

  template <class M>
  void move_up(const Gradient& gradient, int level, const BackwardBlock& block) const {
    const int64_t numel = plan.numel[gradient.position];
    const int64_t stride = gradient.out->strides[0];
    const int64_t columns = stride == 0 ? 1 : block.n;
    const int64_t rows = block.target_stride == 0 ? 1 : block.rows;
    for (int64_t row = 0; row < rows; ++row) {
      M* const from = static_cast<M*>(block.target) + level * numel + row * block.target_stride;
      M* const to = from + numel;
      const auto move = [&](int64_t i) {
        to[i] = to[i] + from[i];
        from[i] = M{};
      };
      if (stride == 1) {
#pragma GCC ivdep
        for (int64_t column = 0; column < columns; ++column) {
          move(column);
        }
      } else {
        for (int64_t column = 0; column < columns; ++column) {
          move(column * stride);
        }
      }
    }
  }

  // The sum's elements are not adjacent along the row: one element at a time.
  void add_strided_columns(BackwardRows add_sum, const Gradient& gradient, RowFactor kind, int64_t stride,
                           BackwardBlock block) const {
    const int64_t n = block.n;
    const bool moves = kind == kFactorOwn || kind == kFactorMath;
    const int64_t factor_size = moves ? dtype_size[int(gradient.factor->dtype)] : 0;
    block.n = 1;
    for (int64_t column = 0; column < n; ++column) {
      add_sum(block);
      block.grad = static_cast<const char*>(block.grad) + dtype_size[int(plan.dtype)];
      block.factor = static_cast<const char*>(block.factor) + factor_size;
      block.target = static_cast<char*>(block.target) + stride * math_size;
    }
  }

  void store_block(const Gradient& gradient, RowFactor kind, const Index& index, BackwardBlock& block,
                   char* buffer) const {
    const Arg& out = *gradient.out;
    const int64_t row_stride = plan.shape.ndim > 1 ? out.strides[1] : 0;
    char* const data = address(out, offset_of(plan.shape, out, index));
    block.target = gradient.copied ? buffer : data;
    block.target_stride = gradient.copied ? block.n : row_stride;
    row_table().backward[int(plan.dtype)][kind][gradient.target](block);
    if (gradient.copied) {
      const int64_t size = dtype_size[int(out.dtype)];
      for (int64_t row = 0; row < block.rows; ++row) {
        copy_strided(out.dtype, data + row * row_stride * size, out.strides[0], buffer + row * block.n * size, 1,
                     block.n);
      }
    }
  }

  template <class M>
  void finish(const Gradient& gradient) const {
    const int64_t numel = plan.numel[gradient.position];
    const int64_t partials = gradient.sums_per_chunk == 0 ? 1 : split.chunks;
    const M* const sums_of_chunks = reinterpret_cast<const M*>(gradient.sums);
    at::parallel_for(0, numel, kGrain / (partials * gradient.levels) + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        M sum{};
        for (int64_t chunk = 0; chunk < partials;) {
          M part{};
          for (const int64_t stop = std::min(partials, chunk + kFinishChain); chunk < stop; ++chunk) {
            const M* const from = sums_of_chunks + chunk * gradient.sums_per_chunk + i;
            M levels = from[0];
            for (int level = 1; level < gradient.levels; ++level) {
              levels = levels + from[level * numel];
            }
            part = part + levels;
          }
          sum = sum + part;
        }
        store(gradient.out->dtype, gradient.out->data, i, sum);
      }
    });
  }

  template <class M>
  static void store(DType, void* out, int64_t i, M value) {
    static_cast<M*>(out)[i] = value;
  }
  static void store(DType dtype, void* out, int64_t i, float value) {
    if (dtype == DType::Half) {
      static_cast<Half*>(out)[i] = narrow<Half>(value);
    } else if (dtype == DType::BFloat16) {
      static_cast<BFloat16*>(out)[i] = narrow<BFloat16>(value);
    } else {
      static_cast<float*>(out)[i] = value;
    }
  }
};

void backward(const BackwardPlan& plan) {
  Backward(plan).run();
}

const RegisterDevice register_cpu(c10::DeviceType::CPU, {forward, backward});

} // namespace
} // namespace safe_inplace
