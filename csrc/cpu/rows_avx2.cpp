#if defined(__x86_64__)
// Before the instruction set is chosen: what these define inline may be merged with other files' copies.
#include <cstdint>
#include <cstring>
#include <immintrin.h>
#include <type_traits>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define SI_FMA
#define SI_F16C
#include "rows.h"

namespace safe_inplace {
namespace rows_for_avx2 {
#include "rows_impl.h"
} // namespace rows_for_avx2

constexpr RowTable table_avx2 = rows_for_avx2::make_table();
extern const RowTable rows_avx2;
const RowTable rows_avx2 = table_avx2;
} // namespace safe_inplace
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
