// One gradient of a backward pass, and how its sum is kept exact.
#pragma once

#include <algorithm>
#include <memory>
#include <type_traits>

#include "../dispatch.h"
#include "walk.h"

namespace safe_inplace {

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
  bool common_factor = false; // it multiplies the sums
  int turn = 0; // what is written over the kept value follows its readers, what is written over the gradient is last
  bool copied = false; // stored through a buffer
  bool narrowed = false; // and rounded on the way out
  RowTarget target = kStoreOwn;
  char* sums = nullptr; // partial sums of all chunks, in the arithmetic dtype, one level after the other
  int64_t sums_per_chunk = 0; // elements; 0: the chunks own disjoint parts
  int levels = 1;
  int64_t run = 1; // visits to an element's first level until that is moved on
  // The dot product with a block's numbers along each dimension counts the visits to the block's elements before it.
  Index visits = {};
  alignas(16) char multiplier[16];
};

// Whether all terms of each sum have the same factor.
inline bool has_common_factor(const Shape& shape, const Arg& factor, const Arg& out) {
  for (int dim = 0; dim < shape.ndim; ++dim) {
    if (out.strides[dim] == 0 && shape.sizes[dim] > 1 && factor.strides[dim] != 0) {
      return false;
    }
  }
  return true;
}

// That factor, for each element of the gradient.
template <class M>
std::unique_ptr<M[]> common_factors(const Shape& shape, const Arg& factor, const Arg& out, int64_t numel) {
  std::unique_ptr<M[]> factors(new M[numel]);
  if (factor.data == nullptr) {
    std::fill_n(factors.get(), numel, Number<M>::from(factor.number));
    return factors;
  }
  Shape kept = shape;
  for (int dim = 0; dim < shape.ndim; ++dim) {
    kept.sizes[dim] = out.strides[dim] == 0 ? 1 : shape.sizes[dim];
  }
  with_dtype(factor.dtype, [&]<class T>(T) {
    if constexpr (std::is_same_v<OpMath<T>, M>) {
      const T* const values = static_cast<const T*>(factor.data);
      Index index = {};
      for (int64_t left = numel; left > 0; left -= kept.sizes[0]) {
        M* const to = factors.get() + offset_of(kept, out, index);
        const T* const from = values + offset_of(kept, factor, index);
        for (int64_t i = 0; i < kept.sizes[0]; ++i) {
          to[i * out.strides[0]] = widen(from[i * factor.strides[0]]);
        }
        next_row(kept, index, 1);
      }
    }
  });
  return factors;
}

// A sum as the element i of a gradient.
template <class M>
void store_sum(DType, void* out, int64_t i, M value) {
  static_cast<M*>(out)[i] = value;
}

inline void store_sum(DType dtype, void* out, int64_t i, float value) {
  if (dtype == DType::Half) {
    static_cast<Half*>(out)[i] = narrow<Half>(value);
  } else if (dtype == DType::BFloat16) {
    static_cast<BFloat16*>(out)[i] = narrow<BFloat16>(value);
  } else {
    static_cast<float*>(out)[i] = value;
  }
}

} // namespace safe_inplace
