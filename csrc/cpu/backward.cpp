// A backward plan on the CPU: one pass over the gradient stores element-wise gradients and adds up those of broadcast operands.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "../dispatch.h"
#include "gradient.h"
#include "kernels.h"
#include "split.h"
#include "walk.h"

namespace safe_inplace {
namespace {

// The iteration space of one chunk of the backward pass.
struct Box {
  Index low = {};
  Index high = {};
};

double conjugate_sign(DType dtype) {
  return dtype == DType::ComplexFloat || dtype == DType::ComplexDouble ? -1.0 : 1.0;
}

// A backward call: what is the same for all its threads.
struct BackwardPass {
  const BackwardPlan& plan;
  const DType math = opmath_dtype(plan.dtype);
  const int64_t math_size = dtype_size[int(math)];
  const Split split = choose_split(plan);
  const Cut cut;
  Gradient gradients[3];
  int count = 0;
  std::unique_ptr<char[]> sums;

  BackwardPass(const BackwardPlan& backward_plan, bool transposed)
      : plan(backward_plan), cut(choose_cut(plan.shape, split, transposed)) {
    for (int i = 0; i < 3; ++i) {
      if (plan.wanted[i]) {
        add_gradient(i);
      }
    }
    std::stable_sort(gradients, gradients + count, [](const Gradient& a, const Gradient& b) { return a.turn < b.turn; });
    allocate_sums();
  }

  void add_gradient(int position) {
    const Derivative& derivative = infos[plan.op].derivatives[position];
    Gradient& gradient = gradients[count++];
    gradient.position = position;
    gradient.out = &plan.grads[position];
    gradient.reduced = plan.reduced[position];
    gradient.turn = gradient.out->data == plan.grad.data ? 2 : is_a_factor(gradient.out->data) ? 1 : 0;
    double number[2] = {1, 0};
    if (derivative.times_parameter) {
      number[0] = plan.parameter[0];
      number[1] = conjugate_sign(plan.dtype) * plan.parameter[1];
    }
    if (derivative.factor != Factor::One) {
      gradient.factor = &plan.factors[int(derivative.factor)];
      const DType dtype = gradient.factor->dtype;
      gradient.common_factor = gradient.reduced && has_common_factor(plan.shape, *gradient.factor, *gradient.out);
      gradient.factor_kind = gradient.common_factor                                  ? kNoFactor
                             : gradient.factor->data == nullptr                      ? kFactorOne
                             : dtype == plan.dtype || is_narrower(dtype, plan.dtype) ? kFactorOwn
                                                                                     : kFactorMath;
    }
    store_number(plan.dtype, number, gradient.multiplier);
    if (!gradient.reduced) {
      gradient.narrowed = is_narrower(gradient.out->dtype, plan.dtype);
      gradient.target = gradient.out->dtype == plan.dtype || gradient.narrowed ? kStoreOwn : kStoreMath;
      gradient.copied = gradient.narrowed || gradient.out->strides[0] != 1;
      if (gradient.turn == 0) {
        prefer_large_pages(*gradient.out, plan.shape.numel);
      }
    }
  }

  bool is_a_factor(const void* data) const {
    return std::any_of(std::begin(plan.factors), std::end(plan.factors), [&](const Arg& factor) { return factor.data == data; });
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
    const int64_t additions = !repeats_row(shape, *gradient.out) ? 1
                              : cut.rows > 64                    ? cut.rows / 64 + 1
                                                                 : cut.rows / 4 + cut.rows % 4;
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
        const bool copied = factor.strides[0] > 1 || is_narrower(factor.dtype, plan.dtype);
        const int64_t bytes = widened  ? Scratch::aligned(cut.rows * math_size)
                              : copied ? Scratch::aligned(block_bytes(factor, plan.dtype, elements))
                                       : 0;
        sizes.factor = std::max(sizes.factor, bytes);
      }
      if (gradient.reduced && gradient.out->strides[0] > 1) {
        sizes.out = std::max(sizes.out, Scratch::aligned(elements * math_size));
      }
      if (gradient.copied) {
        sizes.out = std::max(sizes.out, Scratch::aligned(block_bytes(*gradient.out, plan.dtype, elements)));
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
        with_opmath(plan.dtype, [&](auto tag) { finish<decltype(tag)>(gradients[i]); });
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

  void run_block(int64_t chunk, const Index& index, const Index& number, int64_t rows, int64_t n, const Buffers& buffers) const {
    const Shape& shape = plan.shape;
    alignas(16) char constant[16];
    BackwardBlock block;
    block.rows = rows;
    block.n = n;
    block.grad = read_block(shape, plan.grad, plan.dtype, index, rows, n, buffers.grad, block.grad_stride);
    for (int i = 0; i < count; ++i) {
      const Gradient& gradient = gradients[i];
      block.multiplier = gradient.multiplier;
      block.factor = nullptr;
      block.factor_stride = 0;
      RowFactor kind = gradient.factor_kind;
      if (kind == kFactorOne) {
        store_number(plan.dtype, gradient.factor->number, constant);
        block.factor = constant;
      } else if (kind != kNoFactor && gradient.factor->strides[0] == 0) {
        const Arg& factor = *gradient.factor;
        const int64_t row_stride = shape.ndim > 1 ? factor.strides[1] : 0;
        const char* const from = address(factor, offset_of(shape, factor, index));
        block.factor = one_per_row(factor, from, row_stride, rows, buffers.factor, block.factor_stride);
        kind = kFactorOne;
      } else if (kind != kNoFactor) {
        block.factor = read_block(shape, *gradient.factor, plan.dtype, index, rows, n, buffers.factor, block.factor_stride);
      }
      if (gradient.reduced) {
        add_block(chunk, gradient, kind, index, block, buffers.out);
        move_on(gradient, number, block);
      } else {
        store_block(gradient, kind, index, block, buffers.out);
      }
    }
  }

  void add_block(int64_t chunk, const Gradient& gradient, RowFactor kind, const Index& index, BackwardBlock& block,
                 char* buffer) const {
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
      add_strided_columns(rows[kAddColumns], stride, block, buffer);
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
      with_opmath(plan.dtype, [&](auto tag) { move_up<decltype(tag)>(gradient, level, block); });
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

  // The sum's elements are not adjacent along the row: the block's own sums are made in the buffer first.
  void add_strided_columns(BackwardRows add_columns, int64_t stride, BackwardBlock block, char* buffer) const {
    const Steps steps = {stride, block.target_stride};
    char* const target = static_cast<char*>(block.target);
    const int64_t rows = steps.row == 0 ? 1 : block.rows;
    std::memset(buffer, 0, rows * block.n * math_size);
    block.target = buffer;
    block.target_stride = steps.row == 0 ? 0 : block.n;
    add_columns(block);
    safe_inplace::add_block(math, target, steps, buffer, {1, block.n}, block.n, rows);
  }

  void store_block(const Gradient& gradient, RowFactor kind, const Index& index, BackwardBlock& block, char* buffer) const {
    const Arg& out = *gradient.out;
    const int64_t row_stride = plan.shape.ndim > 1 ? out.strides[1] : 0;
    char* const data = address(out, offset_of(plan.shape, out, index));
    block.target = gradient.copied ? buffer : data;
    block.target_stride = gradient.copied ? block.n : row_stride;
    row_table().backward[int(plan.dtype)][kind][gradient.target](block);
    if (gradient.copied) {
      write_block(plan.shape, out, plan.dtype, index, block.rows, block.n, buffer);
    }
  }

  template <class M>
  void finish(const Gradient& gradient) const {
    const int64_t numel = plan.numel[gradient.position];
    const int64_t partials = gradient.sums_per_chunk == 0 ? 1 : split.chunks;
    const M* const sums_of_chunks = reinterpret_cast<const M*>(gradient.sums);
    const auto factors =
        gradient.common_factor ? common_factors<M>(plan.shape, *gradient.factor, *gradient.out, numel) : std::unique_ptr<M[]>();
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
        if (factors) {
          sum = sum * conjugate(factors[i]);
        }
        store_sum(gradient.out->dtype, gradient.out->data, i, sum);
      }
    });
  }
};

} // namespace

void backward_on_cpu(const BackwardPlan& plan) {
  const int dim = plan.shape.ndim > 1 ? transposed_dim(plan) : 0;
  if (dim != 0) {
    return BackwardPass(with_rows_along(dim, plan), true).run();
  }
  BackwardPass(plan, false).run();
}

} // namespace safe_inplace
