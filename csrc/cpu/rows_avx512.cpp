#if defined(__x86_64__)
// Before the instruction set is chosen: what these define inline may be merged with other files' copies.
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=256")
#endif
#define SI_FMA
#define SI_F16C
#define SI_AVX512
#include "rows.h"

namespace safe_inplace {
namespace rows_for_avx512 {
#include "rows_impl.h"
} // namespace rows_for_avx512

constexpr RowTable table_avx512 = rows_for_avx512::make_table();
extern const RowTable rows_avx512;
const RowTable rows_avx512 = table_avx512;
} // namespace safe_inplace
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
