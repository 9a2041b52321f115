// The innermost loops, compiled once per instruction set (rows_*.cpp) and chosen at run time. Free of ATen and of the
// standard library: any out-of-line function shared with other files could be the copy made for a newer processor.
#pragma once

#include "../formulas.h"

namespace safe_inplace {

// How a row function sees an operand: one contiguous element per element of the row, in the row's own dtype or in its
// arithmetic dtype, or one value for the whole row.
enum RowOperand { kOwn = 0, kOpMath = 1, kOne = 2 };

// result[i] = op(input[i], first[i], second[i], parameter), kept[i] = the value backward needs (kept may be null), for a
// block of rows; strides from row to row in elements. The result may be the memory of the input or of an operand.
struct ForwardBlock {
  void* result;
  int64_t result_stride;
  const void* input;
  int64_t input_stride;
  const void* operands[2];
  int64_t operand_strides[2];
  void* kept;
  int64_t kept_stride;
  const void* parameter;
  int64_t rows;
  int64_t n;
};
using ForwardRows = void (*)(const ForwardBlock&);

// What becomes of grad * conj(factor) * multiplier: stored, or added into an accumulator of the arithmetic dtype whose
// stride along the row is 1 (columns) or 0 (sum).
enum RowTarget { kStoreOwn = 0, kStoreMath = 1, kAddColumns = 2, kAddSum = 3 };
enum RowFactor { kFactorOwn = kOwn, kFactorMath = kOpMath, kFactorOne = kOne, kNoFactor = 3 };

// A block that adds up columns over more than 64 rows has at most this many of them.
constexpr int kMostNarrow = 64;

// A block of rows; strides from row to row in elements. `multiplier` points to a value of the arithmetic dtype.
struct BackwardBlock {
  const void* grad;
  int64_t grad_stride;
  const void* factor;
  int64_t factor_stride;
  void* target;
  int64_t target_stride;
  const void* multiplier;
  int64_t rows;
  int64_t n;
};
using BackwardRows = void (*)(const BackwardBlock&);

constexpr int kDTypes = 6;

// Rounds n values of the arithmetic dtype.
using NarrowRow = void (*)(const void* from, void* to, int64_t n);

struct RowTable {
  ForwardRows forward[AllOps::size][kDTypes][3][3];
  BackwardRows backward[kDTypes][4][4];
  NarrowRow narrow[kDTypes]; // of half and bfloat16
};

extern const RowTable rows_default;
#if defined(__x86_64__)
extern const RowTable rows_avx2;
extern const RowTable rows_avx512;
#endif

} // namespace safe_inplace
