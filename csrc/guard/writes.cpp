// Where a write meets a saved value. A hazard goes to the policy before the operator has done anything at all.
#include "guard/writes.h"

#include <algorithm>
#include <memory>
#include <utility>

#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>

#include "guard/fingerprints.h"
#include "guard/ledger.h"
#include "guard/policy.h"
#include "guard/running.h"

namespace safe_inplace::guard {

thread_local const Judging* Judging::current = nullptr;
constinit thread_local int entered = 0;

namespace {

// Torch hands a thread's state on to the threads that work for it. Those of a backward run the user's graph; those of a
// process group bring what a collective writes, which was judged where it was called, and may be saved ahead of its arrival.
bool lent_thread() {
  return entered == 0 && torch::autograd::get_current_graph_task_id() == -1;
}

// torch refuses to write to it, before anything is written: a leaf that requires grad, or a view of one, with grad mode on.
bool refused_by_torch(const at::Tensor& tensor) {
  const auto reached = tensor.key_set() - c10::impl::tls_local_dispatch_key_set().excluded_;
  return at::GradMode::is_enabled() && tensor.requires_grad() && reached.has_any(c10::autograd_dispatch_keyset) &&
         (tensor.is_leaf() || (tensor.is_view() && tensor._base().is_leaf()));
}

// A backward that runs for the last time may use the memory of its own saved values: nobody will ask for them again.
bool dies_with_this_node(const SavedValue* entry) {
  if (entry->unpacked_by == nullptr || torch::autograd::get_current_graph_task_keep_graph()) {
    return false;
  }
  const auto node = torch::autograd::get_current_node();
  return node.get() == entry->unpacked_by;
}

enum class Change { bytes, one_more_result, unannotated_bytes, layout, none };

// Nothing is saved, and what the operator does is not recorded either.
bool nothing_to_judge() {
  return !at::GradMode::is_enabled() && ledger().size.load(std::memory_order_relaxed) == 0;
}

// The writes of one operator: judged before it runs, and once more after it.
class Writes {
 public:
  explicit Writes(const c10::OperatorName* op) : op_(op) {}

  void judge(const OperatorFacts& facts, c10::ArrayRef<Argument> arguments) {
    const Judging judging(arguments, facts);
    const bool trains = !facts.only_if || arguments[*facts.only_if].is_true();
    look(facts.written, arguments, Change::bytes);
    look(facts.filled, arguments, Change::one_more_result);
    look(facts.relaid, arguments, Change::layout);
    if (trains) {
      look(facts.unannotated, arguments, Change::unannotated_bytes);
      look(facts.unread, arguments, Change::none);
    }
    judged_ = true;
  }

  void judge(const std::vector<at::Tensor>& written) {
    for (const auto& tensor : written) {
      look_at(tensor, Change::bytes);
    }
    judged_ = true;
  }

  Writing& writing() { return writing_; }

  Writes(const Writes&) = delete;
  Writes& operator=(const Writes&) = delete;

  ~Writes() {
    if (writing_.unfinished.empty() && noted_.empty()) {
      return;
    }
    pybind11::gil_scoped_acquire gil;
    if (judged_ && !refused_) {
      note_losses(); // it failed half way: nobody knows what it has written
    }
    noted_.clear();
    writing_.unfinished.clear();
  }

  // What missed every saved byte may have raised a saved value's version all the same: torch counts versions for all
  // views of one base together, and refuses such a graph in backward.
  void finish() {
    const bool saved_inside = !writing_.targets.empty() && saved_so_far.load(std::memory_order_relaxed) != saved_before_;
    if (!saved_inside && near_.empty() && writing_.unfinished.empty() && noted_.empty()) {
      return;
    }
    pybind11::gil_scoped_acquire gil;
    note_losses();
    std::shared_ptr<const Raise> raise;
    for (const auto& extent : near_) {
      after(extent, raise);
    }
    if (saved_inside) { // m[0].mul_(m[1])
      const Extent* last = nullptr;
      for (const auto& target : writing_.targets) {
        if (last == nullptr || last->storage != target.extent.storage) {
          after(target.extent, raise);
        }
        last = &target.extent;
      }
    }
    for (auto& object : writing_.unfinished) {
      auto* entry = saved(object.get());
      if (!entry->released) {
        entry->fingerprints = fingerprints_of(entry->value, Policy(entry->policy.get()));
      }
    }
  }

 private:
  void note_losses() {
    for (const auto& [object, note] : noted_) {
      note_loss(saved(object.get()), note.get());
    }
    noted_.clear();
  }

  void look(const std::vector<size_t>& positions, c10::ArrayRef<Argument> arguments, Change change) {
    for (const size_t position : positions) {
      each_tensor(arguments[position], [&](const at::Tensor& tensor) { look_at(tensor, change); });
    }
  }

  void look_at(const at::Tensor& tensor, Change change) {
    const bool saves = at::GradMode::is_enabled();
    Extents extents;
    if (plain(tensor)) {
      append_extents(extents, tensor);
    } else {
      // What the subclass's own dispatch does to its parts is out of sight: torch switches the keys off in there.
      pybind11::gil_scoped_acquire gil;
      const auto append = [&](const at::Tensor& part) { append_extents(extents, part); };
      each_plain(tensor, Policy::current(), append, Which::written);
    }
    if (saves && change == Change::bytes) {
      const auto& counter = tensor.unsafeGetTensorImpl()->version_counter();
      for (const auto& extent : extents) {
        writing_.targets.push_back({counter, extent, counter.enabled() ? counter.current_version() : 0});
      }
    } else if (saves && change == Change::one_more_result) {
      writing_.filled.insert(writing_.filled.end(), extents.begin(), extents.end());
    } else if (saves && change != Change::layout) {
      writing_.statistics.insert(writing_.statistics.end(), extents.begin(), extents.end());
    }
    if (change == Change::none) {
      return;
    }
    if (ledger().size.load(std::memory_order_relaxed) != 0 && ledger().has_near(extents)) {
      const bool refused = refused_by_torch(tensor);
      refused_ = refused_ || refused;
      pybind11::gil_scoped_acquire gil;
      compare(extents, change, !saves || refused || change == Change::unannotated_bytes);
    }
  }

  void compare(c10::ArrayRef<Extent> extents, Change change, bool update) {
    const auto policy = Policy::current();
    if (!policy || lent_thread()) {
      return;
    }
    std::vector<Object> hits;
    const auto consider = [&](SavedValue* entry, const Extent& written) {
      if (entry->released || dies_with_this_node(entry)) {
        return;
      }
      if (entry->versioned) {
        account(entry);
      }
      if (entry->away || change == Change::layout || entry->unread) {
        return;
      }
      const bool same_storage = entry->extents.size() == 1 && entry->extents[0].storage == written.storage;
      const bool hit = same_storage ? overlap(written, entry->extents[0]) : overlap_any(written, extents_now(entry));
      const auto is_it = [entry](const Object& one) { return saved(one.get()) == entry; };
      if (hit && std::none_of(hits.begin(), hits.end(), is_it)) {
        hits.push_back(share(entry->object));
      }
    };
    for (const auto& extent : extents) {
      bool any = false;
      ledger().each_near(extent, [&](c10::ArrayRef<SavedValue*> entries) {
        any = true;
        for (auto* entry : entries) {
          consider(entry, extent);
        }
      });
      if (any) {
        near_.push_back(extent);
      }
    }
    if (!hits.empty()) {
      const auto notes = policy.on_write(hits, *op_, *current_place(), update);
      each_note(hits, notes,
                [&](const Object& object, PyObject* note) { noted_.emplace_back(share(object.get()), share(note)); });
    }
  }

  // Before the write.
  static void account(SavedValue* entry) {
    const auto now = version_of(entry->value);
    if (now == entry->version) {
      // Where memory was given back, something was written there, and the version is as it was: the program says that the
      // value is back.
      entry->away = entry->away && !entry->refilled;
      entry->accounted = now;
      entry->unaccounted = false;
      entry->beside.reset();
    } else if (now != entry->accounted) {
      entry->unaccounted = true;
    }
  }

  static bool unseen_raise(const SavedValue* entry) {
    return entry->versioned && !entry->released && !entry->unaccounted && version_of(entry->value) != entry->accounted;
  }

  // After the write.
  void after(const Extent& written, std::shared_ptr<const Raise>& raise) {
    auto found = ledger().by_storage.find(written.storage);
    if (found == ledger().by_storage.end()) {
      return;
    }
    if (raise == nullptr && std::any_of(found->second.begin(), found->second.end(), unseen_raise)) {
      raise = std::make_shared<const Raise>(Raise{op_, current_place()});
      found = ledger().by_storage.find(written.storage); // Python may have run
      if (found == ledger().by_storage.end()) {
        return;
      }
    }
    const bool nested = inside_a_write();
    for (auto* entry : found->second) {
      if (entry->away && !nested) {
        const auto covered = [&](const Extent& extent) {
          return extent.storage == written.storage && written.blocks.empty() && written.begin <= extent.begin &&
                 extent.end <= written.end;
        };
        entry->refilled |= stale(entry) || std::all_of(entry->extents.begin(), entry->extents.end(), covered);
      }
      if (raise == nullptr || !unseen_raise(entry)) {
        continue;
      }
      if (entry->beside == nullptr) {
        entry->beside = raise;
      }
      if (!entry->away) {
        entry->accounted = version_of(entry->value);
      }
    }
  }

  bool inside_a_write() const {
    const auto* outer = running;
    while (outer != nullptr && outer->writing == nullptr) {
      outer = outer->outer;
    }
    return outer != nullptr;
  }

  const c10::OperatorName* op_;
  Writing writing_;
  const uint64_t saved_before_ = saved_so_far.load(std::memory_order_relaxed);
  std::vector<Extent> near_; // what it writes in storages that hold saved values
  std::vector<std::pair<Object, Object>> noted_; // saved values that it overwrites with the policy's leave, and its notes
  bool judged_ = false;
  bool refused_ = false;
};

} // namespace

void judge_and_run(const OperatorFacts& facts, c10::ArrayRef<Argument> arguments, c10::function_ref<void()> run) {
  if (nothing_to_judge()) {
    const RunningScope scope(facts.name);
    run();
    return;
  }
  Writes writes(facts.name);
  writes.judge(facts, arguments);
  {
    const RunningScope scope(facts.name, &writes.writing());
    run();
  }
  writes.finish();
}

void judge_and_run(const c10::OperatorName* name, const std::vector<at::Tensor>& written, c10::function_ref<void()> run) {
  Writes writes(name);
  writes.judge(written);
  run();
  writes.finish();
}

} // namespace safe_inplace::guard
