#include "numbers.h"

#include <ATen/core/TensorBody.h>

#include <cmath>
#include <limits>

#include "call.h"

namespace safe_inplace {

bool equals(const at::Scalar& number, int value) {
  return !number.isSymbolic() && number.equal(value);
}

bool take_number(const at::Scalar& number, at::ScalarType input_type, double* out) {
  // A symbolic number belongs to a tracer; a wide integer would be rounded twice on its way through double.
  if (number.isSymbolic() || number.type() == at::kUInt64) {
    return false;
  }
  if (number.isBoolean()) {
    out[0] = number.toBool() ? 1 : 0;
    out[1] = 0;
    return true;
  }
  if (number.isComplex()) {
    const auto value = number.toComplexDouble();
    out[0] = value.real();
    out[1] = value.imag();
    return at::isComplexType(input_type);
  }
  if (number.isIntegral(/*includeBool=*/false)) {
    constexpr int64_t kExact = int64_t(1) << 53;
    const int64_t value = number.toLong();
    out[0] = static_cast<double>(value);
    out[1] = 0;
    return value >= -kExact && value <= kExact;
  }
  out[0] = number.toDouble();
  out[1] = 0;
  return true;
}

bool take_parameter(const at::Scalar& number, at::ScalarType input_type, double* out) {
  if (number.isBoolean() || !take_number(number, input_type, out)) {
    return false;
  }
  if (at::toRealValueType(opmath_type(input_type)) == at::kFloat) {
    constexpr double kMost = std::numeric_limits<float>::max();
    for (int part = 0; part < 2; ++part) {
      if (std::isfinite(out[part]) && std::abs(out[part]) > kMost) {
        return false;
      }
    }
  }
  return true;
}

bool take_scalar_tensor(const at::Tensor& tensor, at::ScalarType input_type, double* out) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      out[0] = *tensor.const_data_ptr<double>();
      return true;
    case at::kFloat:
      out[0] = *tensor.const_data_ptr<float>();
      return true;
    case at::kHalf:
      out[0] = static_cast<float>(*tensor.const_data_ptr<at::Half>());
      return true;
    case at::kBFloat16:
      out[0] = static_cast<float>(*tensor.const_data_ptr<at::BFloat16>());
      return true;
    case at::kLong:
      return take_number(*tensor.const_data_ptr<int64_t>(), input_type, out);
    default:
      return false;
  }
}

void round_number(DType dtype, double* number) {
  const auto value = static_cast<float>(number[0]);
  if (dtype == DType::Half) {
    number[0] = widen(narrow<Half>(value));
  } else if (dtype == DType::BFloat16) {
    number[0] = widen(narrow<BFloat16>(value));
  }
}

} // namespace safe_inplace
