// Which arguments an operator writes: what its schema says, and what it does not say.
#include "guard/operator_facts.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>

namespace safe_inplace::guard {

namespace {

// The collectives of torch.distributed write their first argument, and neither the schema nor the version says so. Left
// out are those that write on some ranks only, and the all-gathers that bring a parameter's own bytes back (FSDP).
bool collective_that_writes(std::string_view name) {
  constexpr std::string_view space = "c10d::";
  if (!name.starts_with(space)) {
    return false;
  }
  constexpr std::array<std::string_view, 13> writers = {"allreduce_",
                                                        "allreduce_coalesced_",
                                                        "allgather_",
                                                        "allgather_coalesced_",
                                                        "reduce_scatter_",
                                                        "_reduce_scatter_base_",
                                                        "reduce_scatter_tensor_coalesced_",
                                                        "alltoall_",
                                                        "alltoall_base_",
                                                        "gather_",
                                                        "scatter_",
                                                        "recv_",
                                                        "recv_any_source_"};
  return std::find(writers.begin(), writers.end(), name.substr(space.size())) != writers.end();
}

// An in-place operator writes what it returns, or returns nothing, and its formula is told in terms of the old value. A
// written argument that no result stands for is a result itself: rrelu saves the noise that it is about to draw.
bool one_more_result(const c10::FunctionSchema& schema, const c10::Argument& argument) {
  const auto& mine = argument.alias_info()->beforeSets();
  return !schema.returns().empty() && std::none_of(schema.returns().begin(), schema.returns().end(), [&](const auto& result) {
    return result.alias_info() != nullptr && result.alias_info()->beforeSets() == mine;
  });
}

bool keeps_the_bytes(std::string_view name) {
  constexpr std::array<std::string_view, 9> keepers = {"aten::resize_",        "aten::resize_as_",        "aten::_resize_output_",
                                                       "aten::sparse_resize_", "aten::resize_as_sparse_", "aten::_coalesced_",
                                                       "aten::record_stream",  "aten::detach_",           "aten::set_"};
  return std::find(keepers.begin(), keepers.end(), name) != keepers.end();
}

// A handle is an address, and that of an operator which is gone may be another one's tomorrow.
std::atomic<uint64_t> operators_gone{0};

struct DeregistrationListener final : c10::OpRegistrationListener {
  void onOperatorRegistered(const c10::OperatorHandle&) override {}
  void onOperatorDeregistered(const c10::OperatorHandle&) override { operators_gone.fetch_add(1, std::memory_order_relaxed); }
};

} // namespace

const c10::OperatorName* kept_for_ever(const c10::OperatorName& name) {
  static auto* mutex = new std::mutex();
  static auto* names = new std::unordered_set<c10::OperatorName>();
  const std::lock_guard<std::mutex> lock(*mutex);
  return &*names->insert(name).first;
}

OperatorFacts::OperatorFacts(const c10::OperatorHandle& op) : name(kept_for_ever(op.operator_name())) {
  const auto& name = this->name->name;
  // A composite operator of torch's writes through others, which are seen in their turn, or not at all: dropout_ in eval
  // mode. What a composite of somebody else's does inside is not known: its schema is taken at its word.
  if (name.starts_with("aten::") && op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
    return;
  }
  if (collective_that_writes(name)) {
    written.push_back(0);
  } else {
    read_schema(op.schema(), op.hasTag(at::Tag::inplace_view) || keeps_the_bytes(name));
  }
  writes = !written.empty() || !filled.empty() || !relaid.empty() || !unannotated.empty() || !unread.empty();
}

void OperatorFacts::read_schema(const c10::FunctionSchema& schema, bool relays) {
  const auto& name = schema.name();
  const bool batch_norm = name.find("batch_norm") != std::string::npos && name.find("no_training") == std::string::npos;
  const bool backward = name.find("backward") != std::string::npos;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto& argument = schema.arguments()[i];
    if (batch_norm && (argument.name() == "running_mean" || argument.name() == "running_var")) {
      (backward ? unread : unannotated).push_back(i);
    } else if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) {
      (relays ? relaid : one_more_result(schema, argument) ? filled : written).push_back(i);
    }
    const bool trains = argument.name() == "training" || argument.name() == "train" || (backward && argument.name() == "update");
    if (batch_norm && trains) {
      only_if = i;
    }
  }
}

const std::shared_ptr<const OperatorFacts>& facts_of(const c10::OperatorHandle& op) {
  thread_local std::unordered_map<c10::OperatorHandle, std::shared_ptr<const OperatorFacts>> known;
  thread_local uint64_t gone = 0;
  if (const auto now = operators_gone.load(std::memory_order_relaxed); gone != now) {
    known.clear();
    gone = now;
  }
  const auto found = known.find(op);
  return found != known.end() ? found->second : known.emplace(op, std::make_shared<const OperatorFacts>(op)).first->second;
}

void listen_for_operators_that_leave() {
  static const auto* listener = new c10::RegistrationHandleRAII(
      c10::Dispatcher::singleton().addRegistrationListener(std::make_unique<DeregistrationListener>()));
  static_cast<void>(listener);
}

} // namespace safe_inplace::guard
