// Guard as one who watches: operators that write, saves, and what backward asks for.
#pragma once

#include "guard/observer.h"
#include "guard/running.h"
#include "guard/writes.h"

namespace safe_inplace::guard {

class Guard final : public Observer {
 public:
  void around(Call& call, c10::function_ref<void()> run) override {
    if (call.facts.writes) {
      judge_and_run(call.facts, call.arguments, run);
    } else {
      const RunningScope scope(call.facts.name);
      run();
    }
  }
  void saves(SavedValue& value) override;
  at::Tensor asked_for(SavedValue& value, const at::Tensor& given) override;
};

Guard& guard();

// The tensor that was saved itself, where `given`, which backward was handed, is that still; undefined where it is not.
at::Tensor original_of(const SavedValue& value, const at::Tensor& given);

} // namespace safe_inplace::guard
