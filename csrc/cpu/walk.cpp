#include "walk.h"

#include <ATen/Version.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>

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

// To the arithmetic dtype, as a product with one.
void widen_row(DType dtype, const char* from, int64_t n, char* to) {
  if (dtype == opmath_dtype(dtype)) {
    std::memcpy(to, from, n * dtype_size[int(dtype)]);
    return;
  }
  alignas(16) char one[16];
  const double number[2] = {1, 0};
  store_number(dtype, number, one);
  row_table().backward[int(dtype)][kNoFactor][kStoreMath]({from, 0, nullptr, 0, to, 0, one, 1, n});
}

void load_opmath(DType dtype, const char* data, void* out) {
  with_dtype(dtype, [&]<class T>(T) { *static_cast<OpMath<T>*>(out) = widen(*reinterpret_cast<const T*>(data)); });
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
