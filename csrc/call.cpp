#include "call.h"

#include <array>

#include "backend.h"
#include "dispatch.h"

namespace safe_inplace {

bool has_kernel(const at::Tensor& tensor) {
  // Not the set difference, which never removes a backend's bit.
  return (tensor.key_set().raw_repr() & ~kernel_keys.raw_repr()) == 0;
}

bool has_kernel(const Call& call) {
  return !any_tensor(call, [](const at::Tensor& tensor) { return !has_kernel(tensor); });
}

bool share_storage(const at::Tensor& a, const at::Tensor& b) {
  return a.is_same(b) || (a.has_storage() && b.has_storage() && a.is_alias_of(b));
}

namespace {

// In the order of DType.
constexpr at::ScalarType scalar_types[] = {at::kHalf,   at::kBFloat16,     at::kFloat,
                                           at::kDouble, at::kComplexFloat, at::kComplexDouble};
constexpr int8_t kNone = -1;

constexpr auto dtypes = [] {
  std::array<int8_t, size_t(at::ScalarType::NumOptions)> table = {};
  table.fill(kNone);
  int8_t dtype = 0;
  for (const at::ScalarType type : scalar_types) {
    table[size_t(type)] = dtype++;
  }
  return table;
}();

} // namespace

bool kernel_dtype(at::ScalarType type, DType& dtype) {
  const int8_t found = dtypes[size_t(type)];
  dtype = DType(found);
  return found != kNone;
}

at::ScalarType opmath_type(at::ScalarType type) {
  DType dtype;
  return kernel_dtype(type, dtype) ? scalar_types[size_t(opmath_dtype(dtype))] : type;
}

} // namespace safe_inplace
