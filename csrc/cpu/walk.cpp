#include "walk.h"

#include <ATen/Version.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../dispatch.h"

namespace safe_inplace {

const RowTable& row_table() {
  static const RowTable& table = []() -> const RowTable& {
#if defined(__x86_64__)
    // ATEN_CPU_CAPABILITY holds for both.
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

void store_number(DType dtype, const double* number, void* out) {
  with_opmath(dtype, [&]<class M>(M) { *static_cast<M*>(out) = Number<M>::from(number); });
}

void load_opmath(DType dtype, const char* data, void* out) {
  with_dtype(dtype, [&]<class T>(T) { *static_cast<OpMath<T>*>(out) = widen(*reinterpret_cast<const T*>(data)); });
}

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

const void* one_per_row(const Arg& arg, const char* from, int64_t row_stride, int64_t rows, char* buffer, int64_t& stride) {
  const DType math = opmath_dtype(arg.dtype);
  if (arg.dtype == math) {
    stride = row_stride;
    return from;
  }
  stride = row_stride == 0 ? 0 : 1;
  const int64_t values = row_stride == 0 ? 1 : rows;
  for (int64_t row = 0; row < values; ++row) {
    load_opmath(arg.dtype, from + row * row_stride * dtype_size[int(arg.dtype)], buffer + row * dtype_size[int(math)]);
  }
  return buffer;
}

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

} // namespace safe_inplace
