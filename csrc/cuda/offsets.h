// From an index to the offsets of a position in several tensors: OffsetCalculator, and the FastDivisor that it divides by.
#pragma once

#include <algorithm>

#include "../plan.h"
#include "tuning.h"

namespace safe_inplace::cuda {

template <class I>
struct FastDivisor;

// Division by multiplication with the rounded-up reciprocal (Granlund and Montgomery, 1994), exact for n < 2^31.
template <>
struct FastDivisor<uint32_t> {
  uint32_t size = 1, magic = 1, shift = 0;

  FastDivisor() = default;
  // A size past 32 bits makes a plan that does not fit, and is not divided by.
  explicit FastDivisor(int64_t n) : size(uint32_t(std::min(n, int64_t(UINT32_MAX)))), shift(0) {
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
struct FastDivisor<uint64_t> {
  uint64_t size = 1;

  FastDivisor() = default;
  explicit FastDivisor(int64_t n) : size(uint64_t(n)) {}
  SI_INLINE uint64_t divide(uint64_t n) const { return n / size; }
};

// A nest of dimensions, innermost first, with the strides of N tensors in it.
template <class I, int N>
struct OffsetCalculator {
  int ndim = 0;
  FastDivisor<I> sizes[kMaxDims];
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

} // namespace safe_inplace::cuda
