// A forward plan on the CPU: cuts it into rows for the loops of rows.h, copies what is not contiguous through a small buffer, and
// splits the work between threads.
#include <ATen/Parallel.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../dispatch.h"
#include "blocks.h"
#include "kernels.h"

namespace safe_inplace {
namespace {

// Elements that pass through a buffer at a time: three of them in complex128 still fit a 32 KiB first-level cache.
constexpr int64_t kBlock = 512;
// A row shorter than this is not worth a call of its own.
constexpr int64_t kShortRow = 48;

bool varies_only_along_rows(const Shape& shape, const Arg& arg) {
  return std::all_of(arg.strides + 1, arg.strides + shape.ndim, [](int64_t stride) { return stride == 0; });
}

bool is_constant(const Shape& shape, const Arg& arg) {
  return arg.strides[0] == 0 && varies_only_along_rows(shape, arg);
}

// n elements, starting at index and running over row ends, as those of the dtype; `buffer` holds them, and what is widened behind them.
void read_elements(const Shape& shape, const Arg& arg, DType dtype, const Index& index, char* buffer, int64_t n) {
  if (arg.dtype == dtype) {
    return copy_elements<true>(shape, arg, index, n, buffer);
  }
  char* const narrow = buffer + n * dtype_size[int(dtype)];
  copy_elements<true>(shape, arg, index, n, narrow);
  widen_row(arg.dtype, narrow, n, buffer);
}

// How one thread walks its part of a forward call.
struct Walk {
  // Many short rows are taken as one long row, what is not contiguous through a buffer.
  bool short_rows = false;
  // Rows taken as one where they follow each other in memory, and operands that are the same for each are repeated in
  // the buffer. Going back to the start of a short vector for every row derails the prefetching of the input: 3.35 ms
  // instead of 2.76 for 64 MiB of half in rows of 512 (one Zen 4 core).
  int64_t stack = 1;
  bool transposed = false; // an operand, or what is written

  // Elements that pass through a buffer at a time.
  int64_t block() const { return transposed ? kTransposedBlock : kBlock; }
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
  DType loaded = DType::Float; // of what is copied
  int64_t bytes = 0; // of the buffer
  char* buffer = nullptr; // of this thread
  const char* held = nullptr; // the row that the buffer holds, for Periodic and Repeated
  alignas(16) char constant[16];

  // Of an input that is not the result the loops take elements only.
  void prepare_input(const ForwardPlan& plan, const Walk& walk) {
    arg = &plan.input;
    const Shape& shape = plan.shape;
    loaded = plan.dtype;
    const bool in_place = arg->dtype == plan.dtype && (walk.short_rows ? is_contiguous(*arg, shape) : arg->strides[0] == 1);
    source = in_place ? Memory : Copied;
    bytes = in_place ? 0 : copied_bytes(std::min(walk.block(), shape.numel));
  }

  void prepare(const ForwardPlan& plan, const Arg& operand, const Walk& walk) {
    arg = &operand;
    const Shape& shape = plan.shape;
    const DType math = opmath_dtype(plan.dtype);
    const bool narrower = operand.data != nullptr && is_narrower(operand.dtype, plan.dtype);
    loaded = narrower ? plan.dtype : operand.dtype;
    if (operand.data == nullptr) {
      store_number(plan.dtype, operand.number, constant);
      return;
    }
    if (is_constant(shape, operand)) {
      load_opmath(operand.dtype, static_cast<const char*>(operand.data), constant);
      return;
    }
    kind = loaded == plan.dtype ? kOwn : kOpMath;
    if (walk.short_rows) {
      source = is_contiguous(operand, shape) && !narrower ? Memory : varies_only_along_rows(shape, operand) ? Periodic : Copied;
    } else if (operand.strides[0] == 0) {
      source = OnePerRow;
      kind = kOne;
    } else if (operand.strides[0] != 1) {
      source = Copied;
    } else if (repeats_row(shape, operand) && (walk.stack > 1 || worth_widening(shape, operand))) {
      source = Repeated;
      kind = plan.dtype == math ? kOwn : kOpMath;
    } else {
      source = narrower ? Copied : Memory;
    }
    const int64_t block = std::min(walk.block(), shape.numel);
    bytes = limits_columns()                               ? copied_bytes(block)
            : source == OnePerRow && operand.dtype != math ? block * dtype_size[int(math)]
            : source == Repeated                           ? shape.sizes[0] * walk.stack * dtype_size[int(math)]
                                                           : 0;
  }

  int64_t copied_bytes(int64_t elements) const {
    return elements * (dtype_size[int(loaded)] + (loaded == arg->dtype ? 0 : dtype_size[int(arg->dtype)]));
  }

  // In 4 KiB: two operands of 8 KiB each would crowd the input out of the first-level cache.
  static int64_t capacity(DType dtype) { return 4096 / dtype_size[int(opmath_dtype(dtype))]; }

  // Widening for every row of the input would cost as much as the arithmetic.
  static bool worth_widening(const Shape& shape, const Arg& arg) {
    return arg.dtype != opmath_dtype(arg.dtype) && shape.sizes[1] >= 8 && shape.sizes[0] <= capacity(arg.dtype);
  }

  bool limits_columns() const { return source == Copied || source == Periodic; }

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
        if (!walk.short_rows) {
          return read_block(shape, *arg, loaded, index, rows, n, buffer, stride);
        }
        read_elements(shape, *arg, loaded, index, buffer, n);
        return buffer;
      case Periodic:
        if (index[0] != 0 || held == nullptr) {
          read_elements(shape, *arg, loaded, index, buffer, n);
          held = index[0] == 0 ? data : nullptr;
        }
        return buffer;
      case Repeated: {
        const int64_t math_size = dtype_size[int(opmath_dtype(arg->dtype))];
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

Walk choose_walk(const ForwardPlan& plan, bool transposed) {
  const Shape& shape = plan.shape;
  Walk walk;
  walk.transposed = transposed;
  if (shape.ndim == 1) {
    return walk;
  }
  const int64_t inner = shape.sizes[0];
  const auto follow_each_other = [&](const Arg& arg) { return arg.strides[0] == 1 && arg.strides[1] == inner; };
  const auto stands_stacked = [&](const Arg& arg) { return follow_each_other(arg) && !is_narrower(arg.dtype, plan.dtype); };
  bool stackable =
      stands_stacked(plan.written()) && stands_stacked(plan.input) && (plan.kept.data == nullptr || follow_each_other(plan.kept));
  for (const Arg& operand : plan.operands) {
    stackable = stackable && (operand.data == nullptr || is_constant(shape, operand) || stands_stacked(operand) ||
                              repeats_row(shape, operand));
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

// A plan's elements in blocks.
struct Blocks {
  Cut cut;
  Shape counts; // of blocks along each dimension

  Blocks(const Shape& shape, const Walk& walk) : counts(shape) {
    const int64_t height = shape.ndim > 1 ? shape.sizes[1] : 1;
    cut = cut_box(shape.sizes[0], height, walk.transposed ? transposed_limits(height) : CutLimits{kBlock, kBlock, kBlock});
    counts.numel = shape.numel / (shape.sizes[0] * height) * cut.column_blocks * cut.row_blocks;
    counts.sizes[0] = cut.column_blocks;
    counts.sizes[1] = cut.row_blocks;
  }

  // Where block `number` begins, and its size.
  Index at(int64_t number, const Shape& shape, ForwardBlock& block) const {
    Index index = index_of(counts, number);
    index[0] *= cut.columns;
    index[1] *= cut.rows;
    block.n = std::min(cut.columns, shape.sizes[0] - index[0]);
    block.rows = shape.ndim > 1 ? std::min(cut.rows, shape.sizes[1] - index[1]) : 1;
    return index;
  }
};

// A forward call: what is the same for all its threads.
struct ForwardPass {
  const ForwardPlan& plan;
  const Walk walk;
  const bool in_place = plan.result.data == nullptr;
  const bool copy_result = is_copied(plan.written());
  const bool copy_kept = plan.kept.data != nullptr && is_copied(plan.kept);
  const int64_t copied_bytes = Scratch::aligned(std::min(walk.block(), plan.shape.numel) * dtype_size[int(plan.dtype)]);
  std::optional<Blocks> blocks; // the units of the work; else elements are
  std::optional<ForwardOperand> input; // where it is not the result
  ForwardOperand operands[2];
  ForwardRows forward_rows;
  alignas(16) char parameter[16];

  ForwardPass(const ForwardPlan& forward_plan, bool transposed) : plan(forward_plan), walk(choose_walk(plan, transposed)) {
    bool limited = copy_result || copy_kept;
    for (int i = 0; i < 2; ++i) {
      operands[i].prepare(plan, plan.operands[i], walk);
      limited = limited || operands[i].limits_columns();
    }
    if (!in_place) {
      input.emplace().prepare_input(plan, walk);
      limited = limited || input->limits_columns();
    }
    if (limited && !walk.short_rows) {
      blocks.emplace(plan.shape, walk);
    }
    store_number(plan.dtype, plan.parameter, parameter);
    forward_rows = row_table().forward[plan.op][int(plan.dtype)][operands[0].kind][operands[1].kind];
    TORCH_INTERNAL_ASSERT_DEBUG_ONLY(forward_rows != nullptr);
  }

  bool is_copied(const Arg& arg) const { return walk.short_rows ? !is_contiguous(arg, plan.shape) : arg.strides[0] != 1; }

  int64_t units() const { return blocks ? blocks->counts.numel : plan.shape.numel; }
  int64_t grain() const { return blocks ? kGrain / (blocks->cut.columns * blocks->cut.rows) : kGrain; }

  // What a thread needs in buffers.
  int64_t scratch_bytes() const {
    return Scratch::aligned(operands[0].bytes) + Scratch::aligned(operands[1].bytes) +
           (input ? Scratch::aligned(input->bytes) : 0) + (copy_result ? copied_bytes : 0) + (copy_kept ? copied_bytes : 0);
  }

  template <bool to_buffer>
  void copy(const Arg& arg, const Index& index, const ForwardBlock& block, char* buffer) const {
    if (blocks) {
      copy_rows<to_buffer>(plan.shape, arg, index, block.rows, block.n, buffer);
    } else {
      copy_elements<to_buffer>(plan.shape, arg, index, block.n, buffer);
    }
  }

  Index rows_at(int64_t element, int64_t end, ForwardBlock& block) const;
  void run(int64_t begin, int64_t end, char* scratch) const;
};

// The rows that begin at an element, of those up to the end.
Index ForwardPass::rows_at(int64_t element, int64_t end, ForwardBlock& block) const {
  const Index index = index_of(plan.shape, element);
  const int64_t left = end - element;
  const int64_t inner = plan.shape.sizes[0];
  const int64_t to_row_end = inner - index[0];
  block.rows = 1;
  if (walk.short_rows) {
    // Whole rows, so that what is periodic always starts at the same phase.
    block.n = std::min(left, index[0] == 0 ? walk.block() / inner * inner : to_row_end);
  } else if (index[0] == 0 && left > inner && plan.shape.ndim > 1) {
    const int64_t rows = std::min(left / inner, plan.shape.sizes[1] - index[1]);
    block.n = inner * std::min(rows, walk.stack);
    block.rows = std::clamp<int64_t>(rows / walk.stack, 1, kBlock);
  } else {
    block.n = std::min(left, to_row_end);
  }
  return index;
}

// Over the units [begin, end) in the plan's order.
void ForwardPass::run(int64_t begin, int64_t end, char* scratch) const {
  const Shape& shape = plan.shape;
  const auto next_buffer = [&](int64_t bytes) {
    char* const buffer = scratch;
    scratch += Scratch::aligned(bytes);
    return buffer;
  };
  ForwardOperand own[2] = {operands[0], operands[1]};
  for (ForwardOperand& operand : own) {
    operand.buffer = next_buffer(operand.bytes);
  }
  std::optional<ForwardOperand> own_input = input;
  if (own_input) {
    own_input->buffer = next_buffer(own_input->bytes);
  }
  char* const result_buffer = next_buffer(copy_result ? copied_bytes : 0);
  char* const kept_buffer = scratch;
  const Arg& written = plan.written();

  ForwardBlock block;
  block.parameter = parameter;
  block.kept = nullptr;
  block.result_stride = shape.ndim > 1 ? written.strides[1] * walk.stack : 0;
  block.kept_stride = shape.ndim > 1 ? plan.kept.strides[1] * walk.stack : 0;

  for (int64_t at = begin; at < end; at += blocks ? 1 : block.rows * block.n) {
    const Index index = blocks ? blocks->at(at, shape, block) : rows_at(at, end, block);
    for (int i = 0; i < 2; ++i) {
      block.operands[i] = own[i].at(shape, index, walk, block.rows, block.n, block.operand_strides[i]);
    }
    block.result = address(written, offset_of(shape, written, index));
    if (copy_result) {
      block.result = result_buffer;
      block.result_stride = block.n;
    }
    if (own_input) {
      block.input = own_input->at(shape, index, walk, block.rows, block.n, block.input_stride);
    } else {
      block.input = block.result;
      block.input_stride = block.result_stride;
      if (copy_result) {
        copy<true>(written, index, block, result_buffer);
      }
    }
    if (copy_kept) {
      block.kept = kept_buffer;
      block.kept_stride = block.n;
    } else if (plan.kept.data != nullptr) {
      block.kept = address(plan.kept, offset_of(shape, plan.kept, index));
    }
    forward_rows(block);
    if (copy_result) {
      copy<false>(written, index, block, result_buffer);
    }
    if (copy_kept) {
      copy<false>(plan.kept, index, block, kept_buffer);
    }
  }
}

void run_forward(const ForwardPlan& plan, bool transposed) {
  if (plan.kept.data != nullptr) {
    prefer_large_pages(plan.kept, plan.shape.numel);
  }
  if (plan.result.data != nullptr) {
    prefer_large_pages(plan.result, plan.shape.numel);
  }
  const ForwardPass pass(plan, transposed);
  if (plan.shape.numel <= kGrain) {
    Scratch scratch(pass.scratch_bytes(), 1);
    return pass.run(0, pass.units(), scratch.part());
  }
  Scratch scratch(pass.scratch_bytes(), at::get_num_threads());
  at::parallel_for(0, pass.units(), pass.grain(), [&](int64_t begin, int64_t end) { pass.run(begin, end, scratch.part()); });
}

} // namespace

void forward_on_cpu(const ForwardPlan& plan) {
  const int dim = plan.shape.ndim > 1 ? transposed_dim(plan) : 0;
  if (dim > 1) {
    return run_forward(with_rows_along(dim, plan), true);
  }
  run_forward(plan, dim != 0);
}

} // namespace safe_inplace
