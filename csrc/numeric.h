// Element types and their arithmetic, the same for host and device. Every function is forced inline: the files of
// csrc/cpu are compiled once per instruction set, and an out-of-line copy made for AVX-512 must never be the one that
// the linker keeps for an older processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SI_INLINE __host__ __device__ __forceinline__
#else
#define SI_INLINE inline __attribute__((always_inline))
#endif
// rows_*.cpp set these beside their target pragma: the compiler's own macros do not follow a pragma in C++.
#if defined(SI_F16C)
#include <immintrin.h>
#endif

namespace safe_inplace {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T real, imag;
};

// The dtypes that have kernels, in the order that the dispatch tables use.
enum class DType : signed char { Half, BFloat16, Float, Double, ComplexFloat, ComplexDouble };
inline constexpr int64_t dtype_size[] = {2, 2, 4, 8, 8, 16};

template <class T>
struct Type;
template <>
struct Type<Half> {
  static constexpr DType dtype = DType::Half;
  using OpMath = float;
};
template <>
struct Type<BFloat16> {
  static constexpr DType dtype = DType::BFloat16;
  using OpMath = float;
};
template <>
struct Type<float> {
  static constexpr DType dtype = DType::Float;
  using OpMath = float;
};
template <>
struct Type<double> {
  static constexpr DType dtype = DType::Double;
  using OpMath = double;
};
template <>
struct Type<Complex<float>> {
  static constexpr DType dtype = DType::ComplexFloat;
  using OpMath = Complex<float>;
};
template <>
struct Type<Complex<double>> {
  static constexpr DType dtype = DType::ComplexDouble;
  using OpMath = Complex<double>;
};

// Arithmetic and accumulation are done in this type.
template <class T>
using OpMath = typename Type<T>::OpMath;

template <class T>
SI_INLINE T bit_cast_to(uint32_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

SI_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

SI_INLINE float widen(float x) {
  return x;
}
SI_INLINE double widen(double x) {
  return x;
}
template <class T>
SI_INLINE Complex<T> widen(Complex<T> x) {
  return x;
}

SI_INLINE float widen(BFloat16 x) {
  return bit_cast_to<float>(uint32_t(x.bits) << 16);
}

SI_INLINE float widen(Half x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#elif defined(SI_F16C)
  return _cvtsh_ss(x.bits);
#else
  // Normal numbers are rebiased, subnormal ones are so many times the smallest, which no mode of the processor flushes: in float32
  // all are normal. Infinities and NaN keep their payload.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const float subnormal = float(int32_t(x.bits & 0x7fffu)) * bit_cast_to<float>(0x33800000u);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t finite = magnitude < 0x00800000u ? bits_of(subnormal) : magnitude + 0x38000000u;
  return bit_cast_to<float>((magnitude >= 0x0f800000u ? special : finite) | sign);
#endif
}

template <class T>
struct Narrow {
  template <class M>
  SI_INLINE static T from(M x) {
    return x;
  }
};

// The bits of float32, rounded to nearest even in their upper half; not for NaN, which may become an infinity. For one
// number or a vector.
template <class Bits>
SI_INLINE Bits round_to_bfloat16(Bits bits) {
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

template <>
struct Narrow<BFloat16> {
  SI_INLINE static BFloat16 from(float x) {
#if defined(__CUDA_ARCH__)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
    return {uint16_t(x != x ? 0x7fc0u : round_to_bfloat16(bits_of(x)) >> 16)};
#endif
  }
};

template <>
struct Narrow<Half> {
  SI_INLINE static Half from(float x) {
#if defined(__CUDA_ARCH__)
    return {__half_as_ushort(__float2half_rn(x))};
#elif defined(SI_F16C)
    return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
    const uint32_t sign = (bits_of(x) >> 16) & 0x8000u;
    const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
      return {uint16_t(sign | 0x7e00u)};
    }
    if (magnitude >= 0x47800000u) {
      return {uint16_t(sign | 0x7c00u)};
    }
    if (magnitude < 0x38800000u) {
      // Subnormal in half: adding 0.5 lets the float adder round at the right bit.
      return {uint16_t(sign | (bits_of(bit_cast_to<float>(magnitude) + 0.5f) - 0x3f000000u))};
    }
    const uint32_t rebiased = magnitude - 0x38000000u;
    return {uint16_t(sign | ((rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13))};
#endif
  }
};

template <class T, class M>
SI_INLINE T narrow(M x) {
  return Narrow<T>::from(x);
}

template <class T>
SI_INLINE Complex<T> operator+(Complex<T> a, Complex<T> b) {
  return {a.real + b.real, a.imag + b.imag};
}

// a * b + c with one rounding where the processor has the instruction, as torch's own kernels do.
SI_INLINE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(SI_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
SI_INLINE double multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__) || defined(SI_FMA)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class T>
SI_INLINE Complex<T> operator*(Complex<T> a, Complex<T> b) {
#if defined(__CUDA_ARCH__)
  // nvcc fuses one product of each sum. Which one shows in the last bit, so it is said: the one it fuses in torch's kernels.
  return {multiply_add(a.real, b.real, -(a.imag * b.imag)), multiply_add(a.real, b.imag, a.imag * b.real)};
#else
  return {a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real};
#endif
}

template <class T>
SI_INLINE Complex<T> multiply_add(Complex<T> a, Complex<T> b, Complex<T> c) {
  return a * b + c;
}

// The two forms in which an op's parameter comes in.
template <class T>
SI_INLINE T add_scaled(T input, T other, T scale) {
  return multiply_add(scale, other, input);
}
template <class T>
SI_INLINE T add_product(T input, T a, T b, T scale) {
  return multiply_add(scale * a, b, input);
}

SI_INLINE float conjugate(float x) {
  return x;
}
SI_INLINE double conjugate(double x) {
  return x;
}
template <class T>
SI_INLINE Complex<T> conjugate(Complex<T> x) {
  return {x.real, -x.imag};
}

// A number given as (real, imag) in double, as plans carry it.
template <class M>
struct Number {
  SI_INLINE static M from(const double* value) { return M(value[0]); }
};
template <class T>
struct Number<Complex<T>> {
  SI_INLINE static Complex<T> from(const double* value) { return {T(value[0]), T(value[1])}; }
};

} // namespace safe_inplace
