// The op table: what each op computes, what its gradients are made of, and which value it has to keep. Kernels of both
// devices, autograd, schemas and tests are derived from it. Knows no ATen: it is compiled for the host, for the
// device and for several instruction sets.
#pragma once

#include "numeric.h"

namespace safe_inplace {

// The number a gradient is multiplied by, besides the parameter: nothing, an operand, or the value that the forward
// kernel wrote aside ("kept") because the op overwrites it.
enum class Factor : signed char { One = -1, First = 0, Second = 1, Kept = 2 };

// d result / d operand, for the operands in the order input, first, second.
struct Derivative {
  Factor factor = Factor::One;
  bool times_parameter = false;

  constexpr bool operator==(const Derivative& other) const {
    return factor == other.factor && times_parameter == other.times_parameter;
  }
};

enum class Kept : signed char { Nothing, Input, InputPlusFirst };

// Which of torch's in-place methods computes the whole op, where no kernel of ours takes a call.
enum class TorchMethod : signed char { None, ForAnyOperands, ForTensors };

// Calls whose bits only torch's own kernel gives: that kernel writes, or its method does all, its own node included.
enum class LeftToTorch : signed char { Nothing, Write, Everything };

// What decides it.
struct CallFacts {
  bool on_cpu;
  bool is_complex; // the input
  bool unit_parameter; // 1 or -1
  bool complex_number; // the first operand is a complex number, not a tensor
};

// Every op comes in two forms: its result is written over the input, or to a tensor of its own. Indexes `names` and `nodes`.
enum class Form : signed char { InPlace, OutOfPlace };

// What most ops share.
struct OpDefaults {
  static constexpr const char* parameter = nullptr;
  static constexpr Kept kept = Kept::Nothing;
  static constexpr TorchMethod torch_method = TorchMethod::None;
  // On a CPU torch rounds a number to the input's dtype before it computes with it.
  static constexpr bool rounds_numbers = false;
  static constexpr LeftToTorch (*left_to_torch)(const CallFacts&) = nullptr; // nothing ever is
};

struct Add : OpDefaults {
  static constexpr const char* names[2] = {"add_", "add"};
  static constexpr const char* nodes[2] = {"AddInplaceBackward", "AddBackward"};
  static constexpr int operands = 1;
  static constexpr const char* operand_names[2] = {"other", nullptr};
  static constexpr const char* parameter = "alpha";
  static constexpr Derivative derivatives[3] = {{}, {Factor::One, true}, {}};
  static constexpr TorchMethod torch_method = TorchMethod::ForAnyOperands;
  static constexpr bool rounds_numbers = true;

  // torch's CPU kernel rounds a product and a sum once in the body of a row and twice at its end, or the other way round. Its
  // node would hand on gradients whose memory others see.
  static constexpr LeftToTorch left_to_torch(const CallFacts& call) {
    return call.on_cpu && !call.unit_parameter ? LeftToTorch::Write : LeftToTorch::Nothing;
  }

  template <class T>
  SI_INLINE static T result(T input, T other, T, T alpha) {
    return add_scaled(input, other, alpha);
  }
};

struct Mul : OpDefaults {
  static constexpr const char* names[2] = {"mul_", "mul"};
  static constexpr const char* nodes[2] = {"MulInplaceBackward", "MulBackward"};
  static constexpr int operands = 1;
  static constexpr const char* operand_names[2] = {"other", nullptr};
  static constexpr Kept kept = Kept::Input;
  static constexpr Derivative derivatives[3] = {{Factor::First}, {Factor::Kept}, {}};
  static constexpr TorchMethod torch_method = TorchMethod::ForAnyOperands;

  // A complex product on a CPU rounds by position as well. On a GPU torch's product with a complex number is number * input: of
  // the two products in an imaginary part the compiler fuses the first with the sum, so that the order shows in the last bit.
  static constexpr LeftToTorch left_to_torch(const CallFacts& call) {
    return call.is_complex && (call.on_cpu || call.complex_number) ? LeftToTorch::Everything : LeftToTorch::Nothing;
  }

  template <class T>
  SI_INLINE static T result(T input, T other, T, T) {
    return input * other;
  }
};

struct AddMul : OpDefaults {
  static constexpr const char* names[2] = {"add_mul_", "add_mul"};
  static constexpr const char* nodes[2] = {"AddMulInplaceBackward", "AddMulBackward"};
  static constexpr int operands = 2;
  static constexpr const char* operand_names[2] = {"other", "scale"};
  static constexpr Kept kept = Kept::InputPlusFirst;
  static constexpr Derivative derivatives[3] = {{Factor::Second}, {Factor::Second}, {Factor::Kept}};

  template <class T>
  SI_INLINE static T result(T input, T other, T scale, T) {
    return (input + other) * scale;
  }
};

struct MulAdd : OpDefaults {
  static constexpr const char* names[2] = {"mul_add_", "mul_add"};
  static constexpr const char* nodes[2] = {"MulAddInplaceBackward", "MulAddBackward"};
  static constexpr int operands = 2;
  static constexpr const char* operand_names[2] = {"scale", "shift"};
  static constexpr Kept kept = Kept::Input;
  static constexpr Derivative derivatives[3] = {{Factor::First}, {Factor::Kept}, {Factor::One}};

  template <class T>
  SI_INLINE static T result(T input, T scale, T shift, T) {
    return multiply_add(input, scale, shift);
  }
};

struct Addcmul : OpDefaults {
  static constexpr const char* names[2] = {"addcmul_", "addcmul"};
  static constexpr const char* nodes[2] = {"AddcmulInplaceBackward", "AddcmulBackward"};
  static constexpr int operands = 2;
  static constexpr const char* operand_names[2] = {"tensor1", "tensor2"};
  static constexpr const char* parameter = "value";
  static constexpr Derivative derivatives[3] = {{}, {Factor::Second, true}, {Factor::First, true}};
  static constexpr TorchMethod torch_method = TorchMethod::ForTensors;

  template <class T>
  SI_INLINE static T result(T input, T tensor1, T tensor2, T value) {
    return add_product(input, tensor1, tensor2, value);
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
  const char* names[2];
  const char* nodes[2];
  int operands;
  const char* operand_names[2];
  const char* parameter;
  Kept kept;
  Derivative derivatives[3];
  TorchMethod torch_method;
  bool rounds_numbers;
  LeftToTorch (*left_to_torch)(const CallFacts&);
};

template <class Op>
constexpr OpInfo make_info() {
  return {{Op::names[0], Op::names[1]},
          {Op::nodes[0], Op::nodes[1]},
          Op::operands,
          {Op::operand_names[0], Op::operand_names[1]},
          Op::parameter,
          Op::kept,
          {Op::derivatives[0], Op::derivatives[1], Op::derivatives[2]},
          Op::torch_method,
          Op::rounds_numbers,
          Op::left_to_torch};
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
  const bool found = ((std::is_same_v<Op, Ops> ? true : (++at, false)) || ...);
  return found ? at : -1;
}

template <class Op>
inline constexpr int op_index = index_in<Op>(AllOps{});

// Calls visit with the op of that index. For the host and for devices.
template <class Visit, class... Ops>
SI_INLINE void with_op(int op, const Visit& visit, OpList<Ops...>) {
  ((op_index<Ops> == op ? visit(Ops{}) : void()), ...);
}

} // namespace safe_inplace
