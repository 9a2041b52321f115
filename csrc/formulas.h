// The op table: what each op computes, what its gradients are made of, and which value it has to keep. Kernels of both
// devices, autograd, schemas, stubs and tests are derived from it. Knows no ATen: it is compiled for the host, for the
// device and for several instruction sets.
#pragma once

#include "numeric.h"

namespace safe_inplace {

// The number a gradient is multiplied by, besides the parameter: nothing, an operand, or the value that the forward
// kernel wrote aside ("kept") because the op overwrites it.
enum class Factor : signed char { One = -1, First = 0, Second = 1, Kept = 2 };

// d result / d operand, for the operands in the order input, first, second.
struct Partial {
  Factor factor = Factor::One;
  bool times_parameter = false;

  constexpr bool operator==(const Partial& other) const {
    return factor == other.factor && times_parameter == other.times_parameter;
  }
};

enum class Kept : signed char { Nothing, Input, InputPlusFirst };

struct Add {
  static constexpr const char* name = "add_";
  static constexpr const char* node = "AddInplaceBackward";
  static constexpr int operands = 1;
  static constexpr const char* operand_names[2] = {"other", nullptr};
  static constexpr const char* parameter = "alpha";
  static constexpr Kept kept = Kept::Nothing;
  static constexpr Partial partials[3] = {{}, {Factor::One, true}, {}};

  template <class T>
  SI_INLINE static T result(T input, T other, T, T alpha) {
    return multiply_add(alpha, other, input);
  }
};

struct Mul {
  static constexpr const char* name = "mul_";
  static constexpr const char* node = "MulInplaceBackward";
  static constexpr int operands = 1;
  static constexpr const char* operand_names[2] = {"other", nullptr};
  static constexpr const char* parameter = nullptr;
  static constexpr Kept kept = Kept::Input;
  static constexpr Partial partials[3] = {{Factor::First}, {Factor::Kept}, {}};

  template <class T>
  SI_INLINE static T result(T input, T other, T, T) {
    return input * other;
  }
};

struct AddMul {
  static constexpr const char* name = "add_mul_";
  static constexpr const char* node = "AddMulInplaceBackward";
  static constexpr int operands = 2;
  static constexpr const char* operand_names[2] = {"other", "scale"};
  static constexpr const char* parameter = nullptr;
  static constexpr Kept kept = Kept::InputPlusFirst;
  static constexpr Partial partials[3] = {{Factor::Second}, {Factor::Second}, {Factor::Kept}};

  template <class T>
  SI_INLINE static T result(T input, T other, T scale, T) {
    return (input + other) * scale;
  }
};

struct MulAdd {
  static constexpr const char* name = "mul_add_";
  static constexpr const char* node = "MulAddInplaceBackward";
  static constexpr int operands = 2;
  static constexpr const char* operand_names[2] = {"scale", "shift"};
  static constexpr const char* parameter = nullptr;
  static constexpr Kept kept = Kept::Input;
  static constexpr Partial partials[3] = {{Factor::First}, {Factor::Kept}, {Factor::One}};

  template <class T>
  SI_INLINE static T result(T input, T scale, T shift, T) {
    return multiply_add(input, scale, shift);
  }
};

struct Addcmul {
  static constexpr const char* name = "addcmul_";
  static constexpr const char* node = "AddcmulInplaceBackward";
  static constexpr int operands = 2;
  static constexpr const char* operand_names[2] = {"tensor1", "tensor2"};
  static constexpr const char* parameter = "value";
  static constexpr Kept kept = Kept::Nothing;
  static constexpr Partial partials[3] = {{}, {Factor::Second, true}, {Factor::First, true}};

  template <class T>
  SI_INLINE static T result(T input, T tensor1, T tensor2, T value) {
    return multiply_add(value * tensor1, tensor2, input);
  }
};

template <class... Ops>
struct OpList {
  static constexpr int size = sizeof...(Ops);
};
using AllOps = OpList<Add, Mul, AddMul, MulAdd, Addcmul>;

// The value written aside by the forward kernel.
template <class Op, class T>
SI_INLINE T kept_value(T input, T first) {
  if constexpr (Op::kept == Kept::InputPlusFirst) {
    return input + first;
  } else {
    return input;
  }
}

// The same table for code that chooses the op at run time.
struct OpInfo {
  const char* name;
  const char* node;
  int operands;
  const char* operand_names[2];
  const char* parameter;
  Kept kept;
  Partial partials[3];
};

template <class Op>
constexpr OpInfo make_info() {
  return {Op::name, Op::node, Op::operands, {Op::operand_names[0], Op::operand_names[1]}, Op::parameter, Op::kept,
          {Op::partials[0], Op::partials[1], Op::partials[2]}};
}

template <class List>
struct InfoTable;
template <class... Ops>
struct InfoTable<OpList<Ops...>> {
  static constexpr OpInfo rows[] = {make_info<Ops>()...};
};
inline constexpr const auto& infos = InfoTable<AllOps>::rows;

template <class Op, class... Ops>
constexpr int index_in(OpList<Ops...>) {
  int at = 0;
  const bool found = ((std_is_same<Op, Ops> ? true : (++at, false)) || ...);
  return found ? at : -1;
}

template <class Op>
inline constexpr int op_index = index_in<Op>(AllOps{});

} // namespace safe_inplace
