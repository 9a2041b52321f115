#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=256")
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
#endif
