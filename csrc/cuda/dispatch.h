// From a plan to launches: the choice among the kernels, for any launcher: the device's, and the simulator's. A launcher has
//   elementwise<Kernel>(params, blocks, Trace), reduce<Kernel>(params, blocks, Trace),
//   workspace(bytes): memory that lives as long as the value it returns, with .data(),
//   index_limit(), small_limit(), target_blocks(preferred).
#pragma once

#include <type_traits>

#include "elementwise_kernels.h"
#include "functors.h"
#include "plan_elementwise.h"
#include "plan_reduction.h"
#include "reduction_kernels.h"

namespace safe_inplace::cuda {

// Operands that do not fit a 16-bit dtype: floats, and numbers, which are used in the precision of the arithmetic.
inline bool any_wide(const Problem& problem) {
  for (int slot : {First, Second}) {
    if (problem.present[slot] && (!is_tensor(problem, slot) || problem.args[slot].dtype != problem.dtype)) {
      return true;
    }
  }
  return false;
}

// Beside float.
inline bool any_narrow(const Problem& problem) {
  for (int slot = 0; slot < kSlots; ++slot) {
    if (is_tensor(problem, slot) && problem.args[slot].dtype != problem.dtype) {
      return true;
    }
  }
  return false;
}

template <class T>
struct Tag {
  using type = T;
};

// Calls visit with a functor, and whether it is Mixed: an instance for each op, but where 16 bits stand beside float, where one
// serves all ops.
template <template <class> class Functor, class T, class Visit>
void with_functor(const Problem& problem, int op, const Visit& visit) {
  if constexpr (std::is_same_v<T, float>) {
    if (any_narrow(problem)) {
      return visit(Tag<AnyOp<Functor>>{}, std::true_type{});
    }
  } else if constexpr (kMayMix<T>) {
    if (any_wide(problem)) {
      return with_op(op, [&](auto tag) { visit(Tag<Functor<decltype(tag)>>{}, std::true_type{}); }, AllOps{});
    }
  }
  with_op(op, [&](auto tag) { visit(Tag<Functor<decltype(tag)>>{}, std::false_type{}); }, AllOps{});
}

template <class Kernel, class Launcher>
void launch_elementwise(typename Kernel::Params params, int op, typename Kernel::M parameter, const Trace& trace,
                        Launcher& launcher) {
  params.op = op;
  params.parameter = parameter;
  launcher.template elementwise<Kernel>(params, ceil_divide(int64_t(params.count), int64_t(params.tile)), trace);
}

template <template <class> class Functor, class T, class Launcher>
void dispatch_elementwise(const Problem& problem, int op, OpMath<T> parameter, Launcher& launcher) {
  using M = OpMath<T>;
  constexpr int V = kVector<T>;
  const int64_t limit = launcher.index_limit();
  // The last block counts past the end.
  const int64_t slack = kThreads * 4;
  const Path path = choose_path(problem, V, limit);
  const bool narrow_index = strides_fit(problem, path == Path::Vectors ? V : 1, limit) &&
                            problem.shape.numel / (path == Path::Elements ? 1 : V) + slack < limit;
  if (!narrow_index) {
    using Kernel = Elementwise<AnyOp<Functor>, T, kMayMix<T>, 1, uint64_t>;
    return launch_elementwise<Kernel>(plan_elementwise<M, uint64_t>(problem, 1, Kernel::U), op, parameter, {"elementwise", 1, 64},
                                      launcher);
  }
  if constexpr (V > 1) {
    if (path == Path::Vectors) {
      return with_functor<Functor, T>(problem, op, [&](auto functor, auto mixed) {
        using F = typename decltype(functor)::type;
        if (auto params = plan_small<M>(problem, V, launcher.small_limit())) {
          using Kernel = Small<F, T, decltype(mixed)::value>;
          params->op = op;
          params->parameter = parameter;
          return launcher.template elementwise<Kernel>(*params, ceil_divide(params->count, kThreads), {"small", V, 32});
        }
        using Kernel = Elementwise<F, T, decltype(mixed)::value, V, uint32_t>;
        launch_elementwise<Kernel>(plan_elementwise<M, uint32_t>(problem, V, Kernel::U), op, parameter, {"elementwise", V, 32},
                                   launcher);
      });
    }
    if (path == Path::Unaligned) {
      using Kernel = Unaligned<AnyOp<Functor>, T>;
      return launch_elementwise<Kernel>(plan_unaligned<M>(problem, V, Kernel::U), op, parameter, {"unaligned", V, 32}, launcher);
    }
  }
  using Kernel = Elementwise<AnyOp<Functor>, T, kMayMix<T>, 1, uint32_t>;
  launch_elementwise<Kernel>(plan_elementwise<M, uint32_t>(problem, 1, Kernel::U), op, parameter, {"elementwise", 1, 32},
                             launcher);
}

template <class T, class Launcher>
void dispatch_forward(const ForwardPlan& plan, Launcher& launcher) {
  Problem problem;
  problem.dtype = plan.dtype;
  problem.shape = plan.shape;
  const auto put = [&](Slot slot, const Arg& arg) {
    problem.args[slot] = arg;
    problem.present[slot] = true;
  };
  put(Main, plan.input);
  put(Out0, plan.written());
  put(First, plan.operands[0]);
  if (infos[plan.op].operands == 2) {
    put(Second, plan.operands[1]);
  }
  if (plan.kept.data != nullptr) {
    put(Out1, plan.kept);
  }
  dispatch_elementwise<ForwardFunctor, T>(problem, plan.op, Number<OpMath<T>>::from(plan.parameter), launcher);
}

enum class Outcome { Done, TooMuchMemory, IndexTooNarrow };

template <class Kernel, class I, class Launcher>
Outcome launch_reduction(const Problem& problem, const SumTargets& targets, typename Kernel::M parameter, int width,
                         Launcher& launcher) {
  using T = typename Kernel::Element;
  const int64_t limit = launcher.index_limit();
  auto plan =
      plan_reduction<T, I>(problem, targets, width, Kernel::U, launcher.target_blocks(preferred_blocks(problem, targets.op)));
  if (sizeof(I) == 4 && !(plan.largest < limit && strides_fit(problem, width, limit))) {
    return Outcome::IndexTooNarrow;
  }
  if (targets.wanted[0] && targets.wanted[1] && plan.workspace > workspace_budget(problem)) {
    return Outcome::TooMuchMemory;
  }
  plan.params.op = targets.op;
  plan.params.parameter = parameter;
  auto workspace = launcher.workspace(plan.workspace);
  for (int i = 0; i < 2; ++i) {
    if (plan.workspace_at[i] >= 0) {
      plan.params.sums[i].data = static_cast<char*>(workspace.data()) + plan.workspace_at[i];
      plan.partials.sums[i].partials = static_cast<const typename Kernel::M*>(plan.params.sums[i].data);
    }
  }
  launcher.template reduce<Kernel>(plan.params, plan.blocks, Trace{"reduce", width, int(sizeof(I)) * 8, plan.workspace});
  if (plan.partials_blocks > 0) {
    launcher.template reduce<ReducePartials<T>>(plan.partials, plan.partials_blocks, Trace{"reduce_partials", 1, 64});
  }
  return Outcome::Done;
}

// One reading of the gradient; false where two sums would need too much memory for it.
template <class T, class Launcher>
bool dispatch_reduction(const Problem& problem, const SumTargets& targets, OpMath<T> parameter, Launcher& launcher) {
  constexpr int V = kVector<T>;
  Outcome outcome = Outcome::IndexTooNarrow;
  if constexpr (V > 1) {
    if (rows_take_vectors(problem, V)) {
      if (sums_plainly(problem, targets, V)) {
        using Kernel = Reduce<PlainSum, T, false, V, uint32_t>;
        outcome = launch_reduction<Kernel, uint32_t>(problem, targets, parameter, V, launcher);
      } else {
        with_functor<BackwardFunctor, T>(problem, targets.op, [&](auto functor, auto mixed) {
          using Kernel = Reduce<typename decltype(functor)::type, T, decltype(mixed)::value, V, uint32_t>;
          outcome = launch_reduction<Kernel, uint32_t>(problem, targets, parameter, V, launcher);
        });
      }
    }
  }
  if (outcome == Outcome::IndexTooNarrow && sums_plainly(problem, targets, 1)) {
    using Kernel = Reduce<PlainSum, T, false, 1, uint32_t>;
    outcome = launch_reduction<Kernel, uint32_t>(problem, targets, parameter, 1, launcher);
  } else if (outcome == Outcome::IndexTooNarrow) {
    using Kernel = Reduce<AnyOp<BackwardFunctor>, T, kMayMix<T>, 1, uint32_t>;
    outcome = launch_reduction<Kernel, uint32_t>(problem, targets, parameter, 1, launcher);
  }
  if (outcome == Outcome::IndexTooNarrow) {
    using Kernel = Reduce<AnyOp<BackwardFunctor>, T, kMayMix<T>, 1, uint64_t>;
    outcome = launch_reduction<Kernel, uint64_t>(problem, targets, parameter, 1, launcher);
  }
  return outcome == Outcome::Done;
}

// The launch that computes the gradients in `now`, and reads nothing that they do not need.
inline Problem backward_problem(const BackwardPlan& plan, const bool (&now)[3]) {
  Problem problem;
  problem.dtype = plan.dtype;
  problem.shape = plan.shape;
  problem.args[Main] = plan.grad;
  problem.present[Main] = true;
  for (int i = 0; i < 3; ++i) {
    if (!now[i]) {
      continue;
    }
    const Factor factor = infos[plan.op].derivatives[i].factor;
    if (factor != Factor::One) {
      const Slot slot = slot_of(factor);
      problem.args[slot] = plan.factors[int(factor)];
      problem.present[slot] = true;
    }
    if (!plan.reduced[i]) {
      problem.args[Out0 + i] = plan.grads[i];
      problem.present[Out0 + i] = true;
    }
  }
  return problem;
}

template <class T, class Launcher>
void dispatch_backward(const BackwardPlan& plan, Launcher& launcher) {
  const int outs = 1 + infos[plan.op].operands;
  const auto wanted = [&](int i) { return i < outs && plan.wanted[i]; };
  const OpMath<T> parameter = conjugate(Number<OpMath<T>>::from(plan.parameter));
  const bool all[3] = {wanted(0), wanted(1), wanted(2)};
  if (!all[0] && !all[1] && !all[2]) {
    return;
  }
  SumTargets targets;
  targets.op = plan.op;
  for (int i = 0; i < 2; ++i) {
    targets.args[i] = plan.grads[i + 1];
    targets.wanted[i] = all[i + 1] && plan.reduced[i + 1];
  }
  if (!targets.wanted[0] && !targets.wanted[1]) {
    return dispatch_elementwise<BackwardFunctor, T>(backward_problem(plan, all), plan.op, parameter, launcher);
  }
  if (dispatch_reduction<T>(backward_problem(plan, all), targets, parameter, launcher)) {
    return;
  }
  // Two patterns of reduction with little in common: the gradient is read twice. What may overwrite it comes last.
  SumTargets first = targets, second = targets;
  first.wanted[1] = false;
  second.wanted[0] = false;
  dispatch_reduction<T>(backward_problem(plan, {false, true, false}), first, parameter, launcher);
  dispatch_reduction<T>(backward_problem(plan, {all[0], false, true}), second, parameter, launcher);
}

} // namespace safe_inplace::cuda
