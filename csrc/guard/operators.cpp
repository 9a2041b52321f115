// The operators that training steps are made of, each watched by a kernel of its own signature: the boxed kernel copies every
// argument, and takes the GIL for each tensor that has a Python object. They are also what a GPU's host spends its time on.
#include "guard/operators.h"

#include <array>
#include <memory>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <ATen/Operators.h>

#include "guard/arguments.h"
#include "guard/dispatch_key.h"
#include "guard/operator_facts.h"
#include "guard/running.h"
#include "guard/writes.h"

namespace safe_inplace::guard {
namespace {

// One operator, by a kernel that operators of the same signature share.
template <bool writes, class Signature>
class Watched;

template <bool writes, class Result, class... Arguments>
class Watched<writes, Result(Arguments...)> final : public c10::OperatorKernel {
 public:
  explicit Watched(const c10::OperatorHandle& op) : facts_(op), op_(op.typed<Result(Arguments...)>()) {
    TORCH_INTERNAL_ASSERT(writes || !facts_.writes, op.operator_name(), " writes");
  }

  Result operator()(c10::DispatchKeySet keys, Arguments... arguments) {
    const auto run = [&]() -> Result { return op_.redispatch(below(keys), std::forward<Arguments>(arguments)...); };
    if constexpr (!writes) {
      const RunningScope scope(facts_.name);
      return run();
    } else {
      const std::array<Argument, sizeof...(Arguments)> seen = {Argument(arguments)...};
      if constexpr (std::is_void_v<Result>) {
        judge_and_run(facts_, seen, run);
      } else if constexpr (std::is_reference_v<Result>) {
        std::remove_reference_t<Result>* result = nullptr;
        judge_and_run(facts_, seen, [&] { result = &run(); });
        return *result;
      } else {
        std::optional<Result> result;
        judge_and_run(facts_, seen, [&] { result.emplace(run()); });
        return *std::move(result);
      }
    }
  }

 private:
  OperatorFacts facts_;
  c10::TypedOperatorHandle<Result(Arguments...)> op_;
};

c10::OperatorHandle find(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
}

std::vector<c10::RegistrationHandleRAII>& registered() {
  static auto* handles = new std::vector<c10::RegistrationHandleRAII>(); // for as long as the process lives
  return *handles;
}

void add(const c10::OperatorHandle& op, c10::KernelFunction kernel) {
  registered().push_back(c10::Dispatcher::singleton().registerImpl(op.operator_name(), kKey, std::move(kernel), std::nullopt,
                                                                   nullptr, "safe_inplace.guard"));
}

template <bool writes, class Signature>
[[gnu::noinline]] void watch(const char* name, const char* overload) {
  using Kernel = Watched<writes, Signature>;
  const auto op = find(name, overload);
  add(op, c10::KernelFunction::makeFromUnboxedFunctor<false, Kernel>(std::make_unique<Kernel>(op)));
}

template <class Op>
constexpr bool writes = std::string_view(Op::schema_str).find('!') != std::string_view::npos ||
                        std::string_view(Op::name).find("batch_norm") != std::string_view::npos; // its running statistics

namespace op = at::_ops;

template <class... Ops>
void watch_each() {
  (watch<writes<Ops>, typename Ops::schema>(Ops::name, Ops::overload_name), ...);
}

} // namespace

void see_common_operators_unboxed() {
  watch_each<op::_local_scalar_dense, op::_reshape_alias, op::_nnpack_available, op::_to_copy, op::_unsafe_view, op::alias,
             op::as_strided, op::as_strided_, op::cat, op::chunk, op::clone, op::contiguous, op::copy_, op::detach,
             op::empty_like, op::empty_memory_format, op::empty_strided, op::expand, op::fill__Scalar, op::flatten_using_ints,
             op::item, op::ones_like, op::permute, op::reshape, op::resize_, op::resolve_conj, op::select_int, op::slice_Tensor,
             op::split_Tensor, op::squeeze_dim, op::stack, op::t, op::to_device, op::to_dtype, op::to_dtype_layout,
             op::transpose_int, op::unsafe_chunk, op::unsqueeze, op::view, op::zero_, op::zeros, op::zeros_like>();
  watch_each<op::add_Tensor, op::add__Tensor, op::addcdiv_, op::addcmul_, op::baddbmm, op::addmm, op::bmm, op::clamp_min,
             op::clamp_min_, op::div_Scalar, op::div_Tensor, op::div__Scalar, op::div__Tensor, op::exp, op::lerp__Scalar,
             op::lerp__Tensor, op::masked_fill_Scalar, op::matmul, op::mean, op::mean_dim, op::mm, op::mul_Scalar, op::mul_Tensor,
             op::mul__Scalar, op::mul__Tensor, op::neg, op::pow_Tensor_Scalar, op::rsqrt, op::sqrt, op::sub_Tensor,
             op::sub__Tensor, op::sum, op::sum_dim_IntList, op::where_self>();
  watch_each<op::_batch_norm_impl_index, op::adaptive_avg_pool2d, op::_convolution, op::_log_softmax,
             op::_log_softmax_backward_data, op::_softmax, op::_softmax_backward_data, op::batch_norm, op::conv2d,
             op::convolution, op::convolution_backward, op::cross_entropy_loss, op::cudnn_batch_norm,
             op::cudnn_batch_norm_backward, op::cudnn_convolution, op::dropout, op::embedding, op::embedding_dense_backward,
             op::gelu, op::gelu_backward, op::layer_norm, op::linear, op::log_softmax_int, op::max_pool2d,
             op::max_pool2d_with_indices, op::max_pool2d_with_indices_backward, op::mkldnn_convolution, op::native_batch_norm,
             op::native_batch_norm_backward, op::native_dropout, op::native_dropout_backward, op::native_layer_norm,
             op::native_layer_norm_backward, op::nll_loss_backward, op::nll_loss_forward, op::nll_loss_nd, op::relu, op::relu_,
             op::scaled_dot_product_attention, op::sigmoid, op::sigmoid_backward, op::silu, op::silu_backward, op::softmax_int,
             op::tanh, op::tanh_backward, op::threshold_backward>();
  watch_each<op::_foreach_add__List, op::_foreach_add__Scalar, op::_foreach_addcdiv__Scalar, op::_foreach_addcdiv__ScalarList,
             op::_foreach_addcmul__Scalar, op::_foreach_div__Scalar, op::_foreach_div__ScalarList, op::_foreach_lerp__Scalar,
             op::_foreach_mul__Scalar, op::_foreach_norm_Scalar, op::_foreach_sqrt, op::_fused_adamw_>();
}

} // namespace safe_inplace::guard
