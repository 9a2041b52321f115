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

template <class Op, Form form, class... Args, size_t... I>
Call make_call(const Tensor& input, std::index_sequence<I...>, const Args&... args) {
  Call call{op_index<Op>, form, &input, {}, 1};
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

// What an overload is called, and its schema.
template <class Op, int numbers, Form form>
struct OverloadNames {
  static constexpr const char* op = Op::names[int(form)];

  static std::string overload() {
    if (numbers == 0) {
      return "";
    }
    const std::string first = (numbers & 1) != 0 ? "Scalar" : "Tensor";
    return Op::operands == 1 ? first : first + ((numbers & 2) != 0 ? "_Scalar" : "_Tensor");
  }

  static std::string full() { return overload().empty() ? op : std::string(op) + "." + overload(); }

  static std::string schema() {
    std::string text = full() + (form == Form::InPlace ? "(Tensor(a!) input" : "(Tensor input");
    for (int i = 0; i < Op::operands; ++i) {
      text += (numbers >> i & 1) != 0 ? ", Scalar " : ", Tensor ";
      text += Op::operand_names[i];
    }
    if (Op::parameter != nullptr) {
      text += std::string(", *, Scalar ") + Op::parameter + "=1";
    }
    return text + (form == Form::InPlace ? ") -> ()" : ") -> Tensor");
  }
};

template <class Op, int numbers, Form form_, class List>
struct Overload;

template <class Op, int numbers, Form form_, class... Args>
struct Overload<Op, numbers, form_, TypeList<Args...>> {
  static constexpr int numbers_mask = numbers;
  static constexpr Form form = form_;
  static constexpr bool writes = form == Form::InPlace;
  using Names = OverloadNames<Op, numbers, form>;
  using Input = std::conditional_t<writes, Tensor&, const Tensor&>;
  using Result = std::conditional_t<writes, void, Tensor>;
  using Signature = Result(Input, Args...);
  using Indices = std::index_sequence_for<Args...>;

  static const c10::TypedOperatorHandle<Signature>& handle() {
    static const auto found =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow((std::string("safe_inplace::") + Names::op).c_str(), Names::overload().c_str())
            .template typed<Signature>();
    return found;
  }

  template <size_t... I>
  static Result send(const Call& call, std::index_sequence<I...>) {
    return handle().call(const_cast<Tensor&>(*call.input), argument<I, Op, Args>(call)...);
  }
  template <size_t... I>
  static Result send_below(DispatchKeySet keys, const Call& call, std::index_sequence<I...>) {
    return handle().redispatch(keys, const_cast<Tensor&>(*call.input), argument<I, Op, Args>(call)...);
  }
  static Result dispatch(const Call& call) { return send(call, Indices{}); }
  static Result redispatch(DispatchKeySet keys, const Call& call) { return send_below(keys, call, Indices{}); }

  static Result autograd(DispatchKeySet keys, Input input, Args... args) {
    const Call call = make_call<Op, form>(input, Indices{}, args...);
    if constexpr (writes) {
      write_with_autograd(keys, call, redispatch);
    } else {
      return call_with_autograd(keys, call, redispatch);
    }
  }
  static void inplace_or_view(DispatchKeySet keys, Tensor& input, Args... args) {
    check_writable(input);
    {
      const at::AutoDispatchBelowADInplaceOrView guard;
      redispatch(keys & c10::after_ADInplaceOrView_keyset, make_call<Op, form>(input, Indices{}, args...));
    }
    torch::autograd::increment_version(input);
  }
  // Below autograd and the version counter.
  static Result kernel(Input input, Args... args) {
    const Call call = make_call<Op, form>(input, Indices{}, args...);
    if (!has_kernel(call)) {
      return fallback_of(call, /*dense=*/false);
    }
    Prepared prepared = prepare(call);
    if constexpr (writes) {
      run(prepared, call);
    } else {
      return run_out_of_place(prepared, call, /*taken=*/std::nullopt);
    }
  }
  static Result fallback(Input input, Args... args) {
    const Call call = make_call<Op, form>(input, Indices{}, args...);
    return fallback_of(call, has_kernel(call));
  }

 private:
  static Result fallback_of(const Call& call, [[maybe_unused]] bool dense) {
    if constexpr (writes) {
      write_by_fallback(call, dense);
    } else {
      return result_by_fallback(call);
    }
  }
};

template <class Op, int numbers, Form form>
using OverloadOf = Overload<Op, numbers, form, Arguments<Op, numbers>>;

template <Form form, class F, class Op, int... numbers>
void for_each_overload(const F& visit, std::integer_sequence<int, numbers...>) {
  (visit(OverloadOf<Op, numbers, form>()), ...);
}

template <Form form, class F, class... Ops>
void for_each_overload(const F& visit, OpList<Ops...>) {
  (for_each_overload<form, F, Ops>(visit, std::make_integer_sequence<int, 1 << Ops::operands>()), ...);
}

// Calls visit with the overload that fits the call's operands.
template <Form form, class Visit>
void with_overload(const Call& call, const Visit& visit) {
  with_op(call.op, [&]<class Op>(Op) {
    const int numbers =
        (call.operands[0].tensor == nullptr ? 1 : 0) | (Op::operands == 2 && call.operands[1].tensor == nullptr ? 2 : 0);
    for_each_overload<form>(
        [&](auto overload) {
          if (overload.numbers_mask == numbers) {
            visit(overload);
          }
        },
        OpList<Op>{});
  });
}

TORCH_LIBRARY(safe_inplace, m) {
  const auto define = [&m](auto overload) {
    m.def(torch::schema(decltype(overload)::Names::schema().c_str()), {at::Tag::pt2_compliant_tag});
  };
  for_each_overload<Form::InPlace>(define, AllOps{});
  for_each_overload<Form::OutOfPlace>(define, AllOps{});
}

#define SI_IMPLEMENT(FORM, KEY, FUNCTION)                                    \
  TORCH_LIBRARY_IMPL(safe_inplace, KEY, m) {                                 \
    for_each_overload<Form::FORM>(                                           \
        [&m](auto overload) {                                                \
          using Chosen = decltype(overload);                                 \
          m.impl(Chosen::Names::full().c_str(), TORCH_FN(Chosen::FUNCTION)); \
        },                                                                   \
        AllOps{});                                                           \
  }

SI_IMPLEMENT(InPlace, Autograd, autograd)
SI_IMPLEMENT(OutOfPlace, Autograd, autograd)
SI_IMPLEMENT(InPlace, ADInplaceOrView, inplace_or_view)
// Every other backend, and the transforms that would otherwise have to guess what the op does.
SI_IMPLEMENT(InPlace, CompositeExplicitAutograd, fallback)
SI_IMPLEMENT(OutOfPlace, CompositeExplicitAutograd, fallback)
SI_IMPLEMENT(InPlace, FuncTorchBatched, fallback)
SI_IMPLEMENT(OutOfPlace, FuncTorchBatched, fallback)
SI_IMPLEMENT(InPlace, Functionalize, fallback)
// torch's check that a transform does not write to a tensor it captured reads the schema, and knows methods that return
// what they wrote.
SI_IMPLEMENT(InPlace, FuncTorchDynamicLayerFrontMode, fallback)

#undef SI_IMPLEMENT

// The backends that have registered, and those that will.
void implement_for(c10::DispatchKey key) {
  static auto* const libraries = new std::vector<std::unique_ptr<torch::Library>>();
  auto library = std::make_unique<torch::Library>(torch::Library::IMPL, "safe_inplace", key, __FILE__, __LINE__);
  const auto implement = [&](auto overload) {
    using Chosen = decltype(overload);
    library->impl(Chosen::Names::full().c_str(), TORCH_FN(Chosen::kernel));
  };
  for_each_overload<Form::InPlace>(implement, AllOps{});
  for_each_overload<Form::OutOfPlace>(implement, AllOps{});
  libraries->push_back(std::move(library));
}

const bool implemented = (for_each_backend(implement_for), true);

} // namespace

void dispatch_write(const Call& call) {
  with_overload<Form::InPlace>(call, [&](auto overload) { overload.dispatch(call); });
}

at::Tensor dispatch(const Call& call) {
  Tensor result;
  with_overload<Form::OutOfPlace>(call, [&](auto overload) { result = overload.dispatch(call); });
  return result;
}

} // namespace safe_inplace
