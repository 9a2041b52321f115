// From a plan to launches, for any launcher: the device's, and the simulator's. A launcher has
//   map<Kernel>(params, blocks, Trace), reduce<Kernel>(params, blocks, Trace),
//   workspace(bytes): memory that lives as long as the value it returns, with .data(),
//   index_limit(), target_blocks().
#pragma once

#include <stdexcept>
#include <type_traits>

#include "kernels.h"

namespace safe_inplace::tiles {

// What was chosen for a launch.
struct Trace {
  const char* kernel;
  int vector;
  int index_bits;
  int64_t workspace = 0;
};

// Operands that do not fit a 16-bit dtype: floats, and numbers, which are used in the precision of the arithmetic.
inline bool any_wide(const Problem& problem) {
  for (int slot : {First, Second}) {
    if (problem.present[slot] && (!is_tensor(problem, slot) || problem.args[slot].dtype != problem.dtype)) {
      return true;
    }
  }
  return false;
}

// Calls function(std::bool_constant<Mixed>) with Mixed true where an operand is wide.
template <class T, class Function>
void with_mixed(const Problem& problem, Function&& function) {
  if constexpr (kMayMix<T>) {
    if (any_wide(problem)) {
      return function(std::true_type{});
    }
  }
  function(std::false_type{});
}

template <class Kernel, class I, class Launcher>
void launch_map(const Problem& problem, int op, Math<typename Kernel::Element> parameter, int width,
                Launcher& launcher) {
  auto params = make_map<typename Kernel::M, I>(problem, width, Kernel::U);
  params.op = op;
  params.parameter = parameter;
  launcher.template map<Kernel>(params, ceil_divide(int64_t(params.count), int64_t(params.tile)),
                                Trace{"map", width, int(sizeof(I)) * 8});
}

template <template <class> class Body, class T, class Launcher>
void run_map(const Problem& problem, int op, Math<T> parameter, Launcher& launcher) {
  constexpr int V = kVector<T>;
  const int64_t limit = launcher.index_limit();
  // The last block counts past the end.
  const int64_t slack = kThreads * 4;
  Path path = choose_path(problem, V, limit);
  bool narrow_index = strides_fit(problem, path == Path::Vectors ? V : 1, limit) &&
                      problem.shape.numel / (path == Path::Elements ? 1 : V) + slack < limit;
  if (!narrow_index) {
    using Kernel = Map<AnyOp<Body>, T, kMayMix<T>, 1, uint64_t>;
    return launch_map<Kernel, uint64_t>(problem, op, parameter, 1, launcher);
  }
  if constexpr (V > 1) {
    if (path == Path::Vectors) {
      return with_mixed<T>(problem, [&](auto mixed) {
        with_op(op, [&](auto tag) {
          using Kernel = Map<Body<decltype(tag)>, T, decltype(mixed)::value, V, uint32_t>;
          launch_map<Kernel, uint32_t>(problem, op, parameter, V, launcher);
        }, AllOps{});
      });
    }
    if (path == Path::Ragged) {
      using Kernel = Ragged<AnyOp<Body>, T>;
      auto params = make_ragged<Math<T>>(problem, V, Kernel::U);
      params.op = op;
      params.parameter = parameter;
      return launcher.template map<Kernel>(params, ceil_divide(int64_t(params.count), int64_t(params.tile)),
                                           Trace{"ragged", V, 32});
    }
  }
  using Kernel = Map<AnyOp<Body>, T, kMayMix<T>, 1, uint32_t>;
  launch_map<Kernel, uint32_t>(problem, op, parameter, 1, launcher);
}

template <class T, class Launcher>
void run_forward(const ForwardPlan& plan, Launcher& launcher) {
  int operands = 0;
  with_op(plan.op, [&](auto tag) { operands = decltype(tag)::operands; }, AllOps{});
  Problem problem;
  problem.dtype = plan.dtype;
  problem.shape = plan.shape;
  const auto put = [&](Slot slot, const Arg& arg) {
    problem.args[slot] = arg;
    problem.present[slot] = true;
  };
  put(Main, plan.input);
  put(Out0, plan.input);
  put(First, plan.operands[0]);
  if (operands == 2) {
    put(Second, plan.operands[1]);
  }
  if (plan.kept.data != nullptr) {
    put(Out1, plan.kept);
  }
  run_map<Forward, T>(problem, plan.op, Number<Math<T>>::from(plan.parameter), launcher);
}

enum class Outcome { Done, TooMuchMemory, IndexTooNarrow };

template <class Kernel, class I, class Launcher>
Outcome launch_reduction(const Problem& problem, const SumTargets& targets, int op, typename Kernel::M parameter,
                         int width, Launcher& launcher) {
  using T = typename Kernel::Element;
  auto plan = make_reduction<T, I>(problem, targets, width, Kernel::U, launcher.index_limit(),
                                   launcher.target_blocks());
  if (sizeof(I) == 4 && !(plan.fits && strides_fit(problem, width, launcher.index_limit()))) {
    return Outcome::IndexTooNarrow;
  }
  if (targets.wanted[0] && targets.wanted[1] && plan.workspace > workspace_budget(problem)) {
    return Outcome::TooMuchMemory;
  }
  plan.params.op = op;
  plan.params.parameter = parameter;
  auto workspace = launcher.workspace(plan.workspace);
  for (int i = 0; i < 2; ++i) {
    if (plan.workspace_at[i] >= 0) {
      plan.params.sums[i].data = static_cast<char*>(workspace.data()) + plan.workspace_at[i];
      plan.finish.sums[i].partials = static_cast<const typename Kernel::M*>(plan.params.sums[i].data);
    }
  }
  launcher.template reduce<Kernel>(plan.params, plan.blocks,
                                   Trace{"reduce", width, int(sizeof(I)) * 8, plan.workspace});
  if (plan.finish_blocks > 0) {
    launcher.template reduce<Finish<T>>(plan.finish, plan.finish_blocks, Trace{"finish", 1, 64});
  }
  return Outcome::Done;
}

// One reading of the gradient; false where two sums would need too much memory for it.
template <class T, class Launcher>
bool run_reduction(const Problem& problem, const SumTargets& targets, int op, Math<T> parameter, Launcher& launcher) {
  constexpr int V = kVector<T>;
  Outcome outcome = Outcome::IndexTooNarrow;
  if constexpr (V > 1) {
    if (rows_take_vectors(problem, V)) {
      with_mixed<T>(problem, [&](auto mixed) {
        with_op(op, [&](auto tag) {
          using Kernel = Reduce<Backward<decltype(tag)>, T, decltype(mixed)::value, V, uint32_t>;
          outcome = launch_reduction<Kernel, uint32_t>(problem, targets, op, parameter, V, launcher);
        }, AllOps{});
      });
    }
  }
  if (outcome == Outcome::IndexTooNarrow) {
    using Kernel = Reduce<AnyOp<Backward>, T, kMayMix<T>, 1, uint32_t>;
    outcome = launch_reduction<Kernel, uint32_t>(problem, targets, op, parameter, 1, launcher);
  }
  if (outcome == Outcome::IndexTooNarrow) {
    using Kernel = Reduce<AnyOp<Backward>, T, kMayMix<T>, 1, uint64_t>;
    outcome = launch_reduction<Kernel, uint64_t>(problem, targets, op, parameter, 1, launcher);
  }
  return outcome == Outcome::Done;
}

template <class T, class Launcher>
void run_backward(const BackwardPlan& plan, Launcher& launcher) {
  Partial partials[3];
  int outs = 0;
  with_op(plan.op, [&](auto tag) {
    using Op = decltype(tag);
    outs = 1 + Op::operands;
    for (int i = 0; i < outs; ++i) {
      partials[i] = Op::partials[i];
    }
  }, AllOps{});
  const auto wanted = [&](int i) { return i < outs && plan.wanted[i]; };

  // The launch that computes the gradients in `now`, and reads nothing that they do not need.
  const auto make_problem = [&](const bool (&now)[3]) {
    Problem problem;
    problem.dtype = plan.dtype;
    problem.shape = plan.shape;
    problem.args[Main] = plan.grad;
    problem.present[Main] = true;
    for (int i = 0; i < outs; ++i) {
      if (now[i]) {
        const Factor factor = partials[i].factor;
        if (factor != Factor::One) {
          const Slot slot = factor == Factor::First ? First : factor == Factor::Second ? Second : Saved;
          problem.args[slot] = plan.factors[int(factor)];
          problem.present[slot] = true;
        }
        if (!plan.reduced[i]) {
          problem.args[Out0 + i] = plan.grads[i];
          problem.present[Out0 + i] = true;
        }
      }
    }
    return problem;
  };
  const Math<T> parameter = conjugate(Number<Math<T>>::from(plan.parameter));
  const bool all[3] = {wanted(0), wanted(1), wanted(2)};
  if (!all[0] && !all[1] && !all[2]) {
    return;
  }
  SumTargets targets;
  for (int i = 0; i < 2; ++i) {
    targets.args[i] = plan.grads[i + 1];
    targets.wanted[i] = all[i + 1] && plan.reduced[i + 1];
  }
  if (!targets.wanted[0] && !targets.wanted[1]) {
    return run_map<Backward, T>(make_problem(all), plan.op, parameter, launcher);
  }
  if (run_reduction<T>(make_problem(all), targets, plan.op, parameter, launcher)) {
    return;
  }
  // Two patterns of reduction with little in common: the gradient is read twice. What may overwrite it comes last.
  SumTargets first = targets, second = targets;
  first.wanted[1] = false;
  second.wanted[0] = false;
  run_reduction<T>(make_problem({false, true, false}), first, plan.op, parameter, launcher);
  run_reduction<T>(make_problem({all[0], false, true}), second, plan.op, parameter, launcher);
}

} // namespace safe_inplace::tiles
