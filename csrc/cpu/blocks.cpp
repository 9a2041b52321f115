#include "blocks.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <type_traits>
#include <utility>

#include "../dispatch.h"

namespace safe_inplace {
namespace {

template <class Plan, class Visit>
void each_arg(Plan& plan, const Visit& visit) {
  if constexpr (std::is_same_v<std::remove_const_t<Plan>, ForwardPlan>) {
    for (auto* arg : {&plan.result, &plan.input, &plan.operands[0], &plan.operands[1], &plan.kept}) {
      visit(*arg);
    }
  } else {
    visit(plan.grad);
    for (int i = 0; i < 3; ++i) {
      visit(plan.factors[i]);
      visit(plan.grads[i]);
    }
  }
}

// Along which dimension elements lie closest, if closer than along dimension 0, or else, along dimension 1, are the same.
int closest_dim(const Shape& shape, const Arg& arg) {
  int closest = 0;
  for (int dim = 1; dim < shape.ndim; ++dim) {
    if (arg.strides[dim] != 0 && arg.strides[dim] < arg.strides[closest]) {
      closest = dim;
    }
  }
  return closest == 0 && arg.strides[1] == 0 ? 1 : closest;
}

template <class Plan>
int transposed_dim_of(const Plan& plan) {
  int dim = 0;
  each_arg(plan, [&](const Arg& arg) {
    if (dim == 0 && arg.data != nullptr && arg.strides[0] > 1) {
      dim = closest_dim(plan.shape, arg);
    }
  });
  return dim;
}

template <class Plan>
void swap_dims(Plan& plan, int a, int b) {
  std::swap(plan.shape.sizes[a], plan.shape.sizes[b]);
  each_arg(plan, [&](Arg& arg) { std::swap(arg.strides[a], arg.strides[b]); });
}

template <class T>
constexpr int kTile = 16 / sizeof(T);

// to[i][j] = from[j][i]; the steps are those from row to row of each.
template <class T>
inline void transpose_tile(T* to, int64_t to_step, const T* from, int64_t from_step) {
  constexpr int n = kTile<T>;
#if defined(__SSE2__)
  __m128i rows[n], turned[n];
  for (int i = 0; i < n; ++i) {
    rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_step));
  }
  for (int stage = 1; stage < n; stage *= 2) {
    for (int i = 0; i < n / 2; ++i) {
      const __m128i a = rows[i], b = rows[i + n / 2];
      turned[2 * i] = n == 8 ? _mm_unpacklo_epi16(a, b) : n == 4 ? _mm_unpacklo_epi32(a, b) : _mm_unpacklo_epi64(a, b);
      turned[2 * i + 1] = n == 8 ? _mm_unpackhi_epi16(a, b) : n == 4 ? _mm_unpackhi_epi32(a, b) : _mm_unpackhi_epi64(a, b);
    }
    for (int i = 0; i < n; ++i) {
      rows[i] = turned[i];
    }
  }
  for (int i = 0; i < n; ++i) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * to_step), rows[i]);
  }
#else
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) {
      to[i * to_step + j] = from[j * from_step + i];
    }
  }
#endif
}

// to[i][j] = from[j][i] for width x height elements of `from`, of which what follows along its rows is asked for.
template <class T>
void transpose(T* to, int64_t to_step, const T* from, int64_t from_step, int64_t width, int64_t height) {
  constexpr int n = kTile<T>;
  const int64_t tiled_width = width / n * n, tiled_height = height / n * n;
  for (int64_t row = 0; row < tiled_height && tiled_width > 0; row += n) {
    for (int i = 0; i < n; ++i) {
      const char* const next = reinterpret_cast<const char*>(from + (row + i) * from_step + width);
      for (int64_t byte = 0; byte < width * int64_t(sizeof(T)); byte += 64) {
        __builtin_prefetch(next + byte);
      }
    }
    for (int64_t column = 0; column < tiled_width; column += n) {
      transpose_tile(to + column * to_step + row, to_step, from + row * from_step + column, from_step);
    }
  }
  for (int64_t column = 0; column < width; ++column) {
    for (int64_t row = column < tiled_width ? tiled_height : 0; row < height; ++row) {
      to[column * to_step + row] = from[row * from_step + column];
    }
  }
}

// The cases that occur, each a loop of its own for the compiler.
template <class Word>
void copy_row(Word* to, int64_t to_step, const Word* from, int64_t from_step, int64_t n) {
  if (to_step == 1 && from_step == 0) {
    std::fill_n(to, n, *from);
  } else if (to_step == 1) {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = from[i * from_step];
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      to[i * to_step] = from[i * from_step];
    }
  }
}

template <class Word>
void copy_words(char* to_bytes, Steps to_steps, const char* from_bytes, Steps from_steps, int64_t columns, int64_t rows) {
  auto* const to = reinterpret_cast<Word*>(to_bytes);
  const auto* const from = reinterpret_cast<const Word*>(from_bytes);
  if (rows > 1 && from_steps.row == 1 && to_steps.column == 1) {
    return transpose(to, to_steps.row, from, from_steps.column, rows, columns);
  }
  if (rows > 1 && from_steps.column == 1 && to_steps.row == 1) {
    return transpose(to, to_steps.column, from, from_steps.row, columns, rows);
  }
  for (int64_t row = 0; row < rows; ++row) {
    copy_row(to + row * to_steps.row, to_steps.column, from + row * from_steps.row, from_steps.column, columns);
  }
}

} // namespace

Cut cut_box(int64_t width, int64_t height, const CutLimits& limits) {
  constexpr int64_t kUnit = 64; // even parts of whole cache lines
  Cut cut;
  cut.columns = width;
  if (width > limits.columns) {
    const int64_t parts = (width + limits.columns - 1) / limits.columns;
    cut.columns = (width + parts * kUnit - 1) / (parts * kUnit) * kUnit;
  }
  cut.rows = std::min({height, limits.rows, std::max<int64_t>(1, limits.elements / cut.columns)});
  cut.column_blocks = (width + cut.columns - 1) / cut.columns;
  cut.row_blocks = (height + cut.rows - 1) / cut.rows;
  return cut;
}

int transposed_dim(const ForwardPlan& plan) {
  return transposed_dim_of(plan);
}

int transposed_dim(const BackwardPlan& plan) {
  return transposed_dim_of(plan);
}

ForwardPlan with_rows_along(int dim, const ForwardPlan& plan) {
  ForwardPlan turned = plan;
  swap_dims(turned, 1, dim);
  return turned;
}

BackwardPlan with_rows_along(int dim, const BackwardPlan& plan) {
  BackwardPlan turned = plan;
  swap_dims(turned, 1, dim);
  // The colours of an image: rows so short that the loops would do little else than begin and end.
  constexpr int64_t kColours = 4;
  if (turned.shape.sizes[0] <= kColours && turned.shape.sizes[0] < turned.shape.sizes[1]) {
    swap_dims(turned, 0, 1);
  }
  return turned;
}

void copy_block(DType dtype, char* to, Steps to_steps, const char* from, Steps from_steps, int64_t columns, int64_t rows) {
  switch (dtype_size[int(dtype)]) {
    case 2:
      return copy_words<uint16_t>(to, to_steps, from, from_steps, columns, rows);
    case 4:
      return copy_words<uint32_t>(to, to_steps, from, from_steps, columns, rows);
    case 8:
      return copy_words<uint64_t>(to, to_steps, from, from_steps, columns, rows);
    default:
      return copy_words<std::array<uint64_t, 2>>(to, to_steps, from, from_steps, columns, rows);
  }
}

void add_block(DType math, char* to_bytes, Steps to_steps, const char* from_bytes, Steps from_steps, int64_t columns,
               int64_t rows) {
  with_opmath(math, [&]<class M>(M) {
    M* const to = reinterpret_cast<M*>(to_bytes);
    const M* const from = reinterpret_cast<const M*>(from_bytes);
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t row = 0; row < rows; ++row) {
        M& sum = to[row * to_steps.row + column * to_steps.column];
        sum = sum + from[row * from_steps.row + column * from_steps.column];
      }
    }
  });
}

const char* read_block(const Shape& shape, const Arg& arg, DType dtype, const Index& index, int64_t rows, int64_t n, char* buffer,
                       int64_t& stride) {
  const char* const data = address(arg, offset_of(shape, arg, index));
  const Steps steps = steps_of(shape, arg);
  const bool narrower = is_narrower(arg.dtype, dtype);
  const bool adjacent = steps.column == 1 || n == 1;
  if (adjacent && !narrower) {
    stride = steps.row;
    return data;
  }
  stride = steps.row == 0 ? 0 : n;
  rows = steps.row == 0 ? 1 : rows;
  if (!narrower) {
    copy_block(arg.dtype, buffer, {1, n}, data, steps, n, rows);
    return buffer;
  }
  const int64_t size = dtype_size[int(arg.dtype)];
  const int64_t wide = dtype_size[int(dtype)];
  if (!adjacent) {
    char* const staged = buffer + rows * n * wide;
    copy_block(arg.dtype, staged, {1, n}, data, steps, n, rows);
    widen_row(arg.dtype, staged, rows * n, buffer);
    return buffer;
  }
  for (int64_t row = 0; row < rows; ++row) {
    widen_row(arg.dtype, data + row * steps.row * size, n, buffer + row * n * wide);
  }
  return buffer;
}

void write_block(const Shape& shape, const Arg& arg, DType dtype, const Index& index, int64_t rows, int64_t n, char* buffer) {
  char* const data = address(arg, offset_of(shape, arg, index));
  const Steps steps = steps_of(shape, arg);
  if (!is_narrower(arg.dtype, dtype)) {
    return copy_block(arg.dtype, data, steps, buffer, {1, n}, n, rows);
  }
  const NarrowRow narrow_row = row_table().narrow[int(arg.dtype)];
  const int64_t size = dtype_size[int(arg.dtype)];
  const int64_t wide = dtype_size[int(dtype)];
  if (steps.column != 1) {
    char* const staged = buffer + rows * n * wide;
    narrow_row(buffer, staged, rows * n);
    return copy_block(arg.dtype, data, steps, staged, {1, n}, n, rows);
  }
  for (int64_t row = 0; row < rows; ++row) {
    narrow_row(buffer + row * n * wide, data + row * steps.row * size, n);
  }
}

int64_t block_bytes(const Arg& arg, DType dtype, int64_t elements) {
  const int64_t size = dtype_size[int(arg.dtype)];
  return elements * (is_narrower(arg.dtype, dtype) ? dtype_size[int(dtype)] + size : size);
}

} // namespace safe_inplace
