#include "rows.h"

namespace safe_inplace {
namespace rows_for_default {
#include "rows_impl.h"
} // namespace rows_for_default

constexpr RowTable table_default = rows_for_default::make_table();
extern const RowTable rows_default;
const RowTable rows_default = table_default;
} // namespace safe_inplace
