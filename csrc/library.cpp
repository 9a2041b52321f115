#include "library.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/library.h>

#include <memory>
#include <string>
#include <vector>

#include "autograd.h"
#include "backend.h"
#include "checks.h"
#include "dispatch.h"
#include "fallback.h"
#include "prepare.h"

namespace safe_inplace {

namespace {

using at::Scalar;
using at::Tensor;
using c10::DispatchKeySet;

// An op has one overload for each choice of tensor or number for its operands: the bits of `numbers` say which
// operands are numbers.
template <class... Types>
struct TypeList {};

template <class... A, class... B>
TypeList<A..., B...> operator+(TypeList<A...>, TypeList<B...>);

template <bool present, class Type>
using Optional = std::conditional_t<present, TypeList<Type>, TypeList<>>;

template <int numbers, int i>
using OperandType = std::conditional_t<(numbers >> i & 1) != 0, const Scalar&, const Tensor&>;

template <class Op, int numbers>
using Arguments = decltype(TypeList<OperandType<numbers, 0>>() + Optional<Op::operands == 2, OperandType<numbers, 1>>() +
                           Optional<Op::parameter != nullptr, const Scalar&>());

template <class Op, class... Args, size_t... I>
Call make_call(const Tensor& input, std::index_sequence<I...>, const Args&... args) {
  Call call{op_index<Op>, &input, {}, 1};
  const auto place = [&call](size_t i, const auto& arg) {
    if (i < static_cast<size_t>(Op::operands)) {
      call.operands[i] = Operand(arg);
    } else if constexpr (std::is_same_v<std::decay_t<decltype(arg)>, Scalar>) {
      call.parameter = arg;
    }
  };
  (place(I, args), ...);
  return call;
}

template <size_t i, class Op, class Type>
decltype(auto) argument(const Call& call) {
  if constexpr (std::is_same_v<Type, const Tensor&>) {
    return static_cast<const Tensor&>(*call.operands[i].tensor);
  } else if constexpr (i < static_cast<size_t>(Op::operands)) {
    return static_cast<const Scalar&>(call.operands[i].number);
  } else {
    return static_cast<const Scalar&>(call.parameter);
  }
}

template <class Op, int numbers, class List>
struct Overload;

template <class Op, int numbers, class... Args>
struct Overload<Op, numbers, TypeList<Args...>> {
  static constexpr int numbers_mask = numbers;
  using Signature = void(Tensor&, Args...);
  using Indices = std::index_sequence_for<Args...>;

  static std::string overload_name() {
    if (numbers == 0) {
      return "";
    }
    const std::string first = (numbers & 1) != 0 ? "Scalar" : "Tensor";
    return Op::operands == 1 ? first : first + ((numbers & 2) != 0 ? "_Scalar" : "_Tensor");
  }

  static std::string full_name() { return overload_name().empty() ? Op::name : std::string(Op::name) + "." + overload_name(); }

  static std::string schema() {
    std::string text = full_name() + "(Tensor(a!) input";
    for (int i = 0; i < Op::operands; ++i) {
      text += (numbers >> i & 1) != 0 ? ", Scalar " : ", Tensor ";
      text += Op::operand_names[i];
    }
    if (Op::parameter != nullptr) {
      text += std::string(", *, Scalar ") + Op::parameter + "=1";
    }
    return text + ") -> ()";
  }

  static const c10::TypedOperatorHandle<Signature>& handle() {
    static const auto found = c10::Dispatcher::singleton()
                                  .findSchemaOrThrow((std::string("safe_inplace::") + Op::name).c_str(), overload_name().c_str())
                                  .template typed<Signature>();
    return found;
  }

  template <size_t... I>
  static void send(const Call& call, std::index_sequence<I...>) {
    handle().call(const_cast<Tensor&>(*call.input), argument<I, Op, Args>(call)...);
  }
  template <size_t... I>
  static void send_below(DispatchKeySet keys, const Call& call, std::index_sequence<I...>) {
    handle().redispatch(keys, const_cast<Tensor&>(*call.input), argument<I, Op, Args>(call)...);
  }
  static void dispatch(const Call& call) { send(call, Indices{}); }
  static void redispatch(DispatchKeySet keys, const Call& call) { send_below(keys, call, Indices{}); }

  static void autograd(DispatchKeySet keys, Tensor& input, Args... args) {
    call_with_autograd(keys, make_call<Op>(input, Indices{}, args...), redispatch);
  }
  static void inplace_or_view(DispatchKeySet keys, Tensor& input, Args... args) {
    check_writable(input);
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      redispatch(keys & c10::after_ADInplaceOrView_keyset, make_call<Op>(input, Indices{}, args...));
    }
    torch::autograd::increment_version(input);
  }
  // Below autograd and the version counter.
  static void kernel(Tensor& input, Args... args) {
    const Call call = make_call<Op>(input, Indices{}, args...);
    if (has_kernel(call)) {
      Prepared prepared = prepare(call);
      run(prepared, call);
    } else {
      write_by_fallback(call, /*dense=*/false);
    }
  }
  static void fallback(Tensor& input, Args... args) {
    const Call call = make_call<Op>(input, Indices{}, args...);
    write_by_fallback(call, has_kernel(call));
  }
};

template <class Op, int numbers>
using OverloadOf = Overload<Op, numbers, Arguments<Op, numbers>>;

template <class F, class Op, int... numbers>
void for_each_overload(const F& visit, std::integer_sequence<int, numbers...>) {
  (visit(OverloadOf<Op, numbers>()), ...);
}

template <class F, class... Ops>
void for_each_overload(const F& visit, OpList<Ops...>) {
  (for_each_overload<F, Ops>(visit, std::make_integer_sequence<int, 1 << Ops::operands>()), ...);
}

template <class Op>
void dispatch_op(const Call& call) {
  const int numbers =
      (call.operands[0].tensor == nullptr ? 1 : 0) | (Op::operands == 2 && call.operands[1].tensor == nullptr ? 2 : 0);
  for_each_overload(
      [&](auto overload) {
        if (overload.numbers_mask == numbers) {
          overload.dispatch(call);
        }
      },
      OpList<Op>{});
}

TORCH_LIBRARY(safe_inplace, m) {
  for_each_overload([&m](auto overload) { m.def(torch::schema(overload.schema().c_str()), {at::Tag::pt2_compliant_tag}); },
                    AllOps{});
}

#define SI_IMPLEMENT(KEY, FUNCTION)                                                                                          \
  TORCH_LIBRARY_IMPL(safe_inplace, KEY, m) {                                                                                 \
    for_each_overload([&m](auto overload) { m.impl(overload.full_name().c_str(), TORCH_FN(decltype(overload)::FUNCTION)); }, \
                      AllOps{});                                                                                             \
  }

SI_IMPLEMENT(Autograd, autograd)
SI_IMPLEMENT(ADInplaceOrView, inplace_or_view)
// Every other backend, and the transforms that would otherwise have to guess what the op does.
SI_IMPLEMENT(CompositeExplicitAutograd, fallback)
SI_IMPLEMENT(FuncTorchBatched, fallback)
SI_IMPLEMENT(Functionalize, fallback)
// torch's check that a transform does not write to a tensor it captured reads the schema, and knows methods that return
// what they wrote.
SI_IMPLEMENT(FuncTorchDynamicLayerFrontMode, fallback)

#undef SI_IMPLEMENT

// The backends that have registered, and those that will.
void implement_for(c10::DispatchKey key) {
  static auto* const libraries = new std::vector<std::unique_ptr<torch::Library>>();
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "safe_inplace", key, __FILE__, __LINE__);
  for_each_overload([&](auto overload) { library->impl(overload.full_name().c_str(), TORCH_FN(decltype(overload)::kernel)); },
                    AllOps{});
  libraries->push_back(std::move(library));
}

const bool implemented = (for_each_backend(implement_for), true);

} // namespace

void dispatch(const Call& call) {
  with_op(call.op, [&]<class Op>(Op) { dispatch_op<Op>(call); });
}

} // namespace safe_inplace
