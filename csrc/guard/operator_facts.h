// What an operator does to the memory of its arguments, learned from its schema.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/core/dispatch/Dispatcher.h>

namespace safe_inplace::guard {

struct OperatorFacts {
  const c10::OperatorName* name; // kept for ever: an operator that is gone is still named
  std::vector<size_t> written; // positions of the arguments whose memory is written
  std::vector<size_t> filled; // written as one more result: where it is saved, backward wants it as it is after the operator
  std::vector<size_t> relaid; // whose version rises though no byte of them changes: t_, resize_, set_
  std::vector<size_t> unannotated; // written by the kernels, though the schema does not say so
  std::vector<size_t> unread; // saved for a second derivative that does not read it: batch norm's statistics, in its backward
  std::optional<size_t> only_if; // ... the last two when this boolean argument is true
  bool writes = false; // any of these

  explicit OperatorFacts(const c10::OperatorHandle& op);

 private:
  void read_schema(const c10::FunctionSchema& schema, bool relays);
};

const c10::OperatorName* kept_for_ever(const c10::OperatorName& name);

// The reference holds until Python runs: an operator may leave then, and the table is made anew.
const std::shared_ptr<const OperatorFacts>& facts_of(const c10::OperatorHandle& op);

// Once: from here on facts are forgotten with their operator.
void listen_for_operators_that_leave();

} // namespace safe_inplace::guard
