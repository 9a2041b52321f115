// The layout of a frame, whose variables Python 3.11 has no function for.
#include <Python.h>
#if PY_VERSION_HEX < 0x030C0000
#define Py_BUILD_CORE
extern "C" {
#include <internal/pycore_frame.h>
}
#undef Py_BUILD_CORE
#endif

#include "guard.h"
#include "guard/watch.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include <pthread.h>

#include <ATen/Functions.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/SequenceNumber.h>
#include <ATen/SparseCsrTensorUtils.h>
#include <ATen/native/SparseTensorUtils.h>
#include <ATen/NestedTensorImpl.h>
#include <ATen/SequenceNumber.h>
#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/SmallVector.h>
#include <c10/util/flat_hash_map.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include "digest.h"
#include "extent.h"

namespace safe_inplace {
namespace {

// Torch hands it on to the threads of a backward, in a copy for each node: a short name is copied without an allocation.
const std::string& policy_key() {
  static const auto* key = new std::string("safe_inplace");
  return *key;
}

struct Decref {
  void operator()(PyObject* object) const {
    Py_XDECREF(object);
  }
};
using Object = std::unique_ptr<PyObject, Decref>;

Object share(PyObject* object) {
  Py_XINCREF(object);
  return Object(object);
}

// Keeps the Python exception inside the C++ one: on its way to the interpreter it may pass code without the GIL.
[[noreturn]] void rethrow_python() {
  python_error error;
  error.persist();
  throw error;
}

bool truth(PyObject* object) {
  const int answer = PyObject_IsTrue(object);
  if (answer < 0) {
    rethrow_python();
  }
  return answer == 1;
}

Object checked(PyObject* owned) {
  if (owned == nullptr) {
    rethrow_python();
  }
  return Object(owned);
}

// ---- what an operator writes

const c10::OperatorName* kept_for_ever(const c10::OperatorName& name) {
  static auto* mutex = new std::mutex();
  static auto* names = new std::unordered_set<c10::OperatorName>();
  const std::lock_guard<std::mutex> lock(*mutex);
  return &*names->insert(name).first;
}

// The collectives of torch.distributed write their first argument, and neither the schema nor the version says so. Left
// out are those that write on some ranks only, and the all-gathers that bring a parameter's own bytes back (FSDP).
bool collective_that_writes(std::string_view name) {
  constexpr std::string_view space = "c10d::";
  if (!name.starts_with(space)) {
    return false;
  }
  constexpr std::array<std::string_view, 13> writers = {
      "allreduce_", "allreduce_coalesced_", "allgather_", "allgather_coalesced_", "reduce_scatter_",
      "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "alltoall_", "alltoall_base_", "gather_", "scatter_",
      "recv_", "recv_any_source_"};
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

} // namespace

OperatorFacts::OperatorFacts(const c10::OperatorHandle& op) : name(kept_for_ever(op.operator_name())), writes(false) {
  const auto& schema = op.schema();
  const auto& name = this->name->name;
  // A composite operator of torch's writes through others, which are seen in their turn, or not at all: dropout_ in eval
  // mode. What a composite of somebody else's does inside is not known: its schema is taken at its word.
  if (name.starts_with("aten::") && op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd)) {
    return;
  }
  if (collective_that_writes(name)) {
    written.push_back(0);
    writes = true;
    return;
  }
  constexpr std::array<std::string_view, 9> keep_the_bytes = {
      "aten::resize_", "aten::resize_as_", "aten::_resize_output_", "aten::sparse_resize_", "aten::resize_as_sparse_",
      "aten::_coalesced_", "aten::record_stream", "aten::detach_", "aten::set_"};
  const bool relays = op.hasTag(at::Tag::inplace_view) ||
      std::find(keep_the_bytes.begin(), keep_the_bytes.end(), name) != keep_the_bytes.end();
  const bool batch_norm =
      name.find("batch_norm") != std::string::npos && name.find("no_training") == std::string::npos;
  const bool backward = name.find("backward") != std::string::npos;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto& argument = schema.arguments()[i];
    if (batch_norm && (argument.name() == "running_mean" || argument.name() == "running_var")) {
      (backward ? unread : unannotated).push_back(i);
    } else if (argument.alias_info() != nullptr && argument.alias_info()->isWrite()) {
      (relays ? relaid : one_more_result(schema, argument) ? filled : written).push_back(i);
    }
    const bool trains = argument.name() == "training" || argument.name() == "train" ||
        (backward && argument.name() == "update");
    if (batch_norm && trains) {
      only_if = i;
    }
  }
  writes = !written.empty() || !filled.empty() || !relaid.empty() || !unannotated.empty() || !unread.empty();
}

namespace {

// A handle is an address, and that of an operator which is gone may be another one's tomorrow.
std::atomic<uint64_t> operators_gone{0};

struct Departures final : c10::OpRegistrationListener {
  void onOperatorRegistered(const c10::OperatorHandle&) override {}
  void onOperatorDeregistered(const c10::OperatorHandle&) override {
    operators_gone.fetch_add(1, std::memory_order_relaxed);
  }
};

// The reference holds until Python runs: an operator may leave then, and the table is made anew.
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

// ---- where in the user's code

// The frame's first variable, in a method its `self`.
Object first_argument(PyFrameObject* frame) {
#if PY_VERSION_HEX >= 0x030C0000
  static PyObject* const name = PyUnicode_InternFromString("self");
  Object value(PyFrame_GetVar(frame, name));
  if (!value) {
    PyErr_Clear();
  }
  return value;
#else
  // Asking for the variables by the interface that Python 3.11 has would leave a copy of them in the frame.
  PyObject* value = frame->f_frame->localsplus[0];
  return share(value != nullptr && PyCell_Check(value) ? PyCell_GET(value) : value);
#endif
}

#if PY_VERSION_HEX >= 0x030C0000
constexpr auto request_code_extra = PyUnstable_Eval_RequestCodeExtraIndex;
constexpr auto get_code_extra = PyUnstable_Code_GetExtra;
constexpr auto set_code_extra = PyUnstable_Code_SetExtra;
#else
constexpr auto request_code_extra = _PyEval_RequestCodeExtraIndex;
constexpr auto get_code_extra = _PyCode_GetExtra;
constexpr auto set_code_extra = _PyCode_SetExtra;
#endif

// The code object and the instruction of the innermost frame of the user's code; where that lies in an installed package,
// also of the frame outside that led there; and the innermost module that is being called. Line, text and the module's path
// are looked up only when a report is printed.
struct Place {
  Object code;
  int instruction = -1;
  Object caller;
  int caller_instruction = -1;
  Object module; // a weak reference: the module may hold what holds this
};

using SharedPlace = std::shared_ptr<const Place>;

PyObject* whose_code = nullptr; // Python: code object -> 0 a library's, 1 an installed package's, 2 the user's own
PyObject* module_call = nullptr; // the code object of Module.__call__

// The answer is kept in the code object itself: as long as that lives, and no longer.
Py_ssize_t answer_slot = -1;

enum class Owner : uintptr_t { unknown = 0, library, package, user };

Owner owner_of(PyObject* code) {
  void* answer = nullptr;
  if (get_code_extra(code, answer_slot, &answer) != 0) {
    rethrow_python();
  }
  if (static_cast<Owner>(reinterpret_cast<uintptr_t>(answer)) == Owner::unknown) {
    const auto owner = checked(PyObject_CallOneArg(whose_code, code));
    const long number = PyLong_AsLong(owner.get());
    if (number == -1 && PyErr_Occurred()) {
      rethrow_python();
    }
    answer = reinterpret_cast<void*>(static_cast<uintptr_t>(number + 1));
    if (set_code_extra(code, answer_slot, answer) != 0) {
      rethrow_python();
    }
  }
  return static_cast<Owner>(reinterpret_cast<uintptr_t>(answer));
}

// The module that a frame of Module.__call__ calls.
Object module_of(PyFrameObject* frame) {
  const auto self = first_argument(frame);
  Object reference(self ? PyWeakref_NewRef(self.get(), nullptr) : nullptr);
  if (!reference) {
    PyErr_Clear(); // deleted, or not to be referred to: a report without a module
  }
  return reference;
}

Place find_place() {
  Place place;
  bool found = false;
  bool called = false; // from an installed package: its caller is wanted, too
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  while (frame != nullptr) {
    auto code = Object(reinterpret_cast<PyObject*>(PyFrame_GetCode(frame)));
    if (!place.module && code.get() == module_call) {
      place.module = module_of(frame);
    }
    const auto owner = found && !called ? Owner::unknown : owner_of(code.get()); // asked for where it matters
    if (!found) {
      place.instruction = PyFrame_GetLasti(frame);
      place.code = std::move(code);
      found = owner != Owner::library;
      called = owner == Owner::package;
    } else if (called && owner == Owner::user) {
      place.caller_instruction = PyFrame_GetLasti(frame);
      place.caller = std::move(code);
      called = false;
    }
    PyFrameObject* back = found && !called && place.module ? nullptr : PyFrame_GetBack(frame);
    Py_DECREF(frame);
    frame = back;
  }
  return place;
}

// ---- what is saved

using Extents = c10::SmallVector<Extent, 1>; // of a tensor: most have one

// An operator that raised the version of saved values whose bytes it left alone.
struct Raise {
  const c10::OperatorName* op;
  SharedPlace place;
};

struct SavedObject {
  PyObject_HEAD
  at::Tensor value; // shares memory and version counter with what was saved, and holds no graph
  // What torch alone would keep, and read in backward: its memory may have been exchanged (x.data = y). None for a result
  // of the node that saves it, of which torch keeps an alias as well.
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> original;
  bool had_node;
  Extents extents;
  std::vector<c10::Storage> storages; // of a subclass's parts, so that the extents name memory that is there
  std::vector<at::Tensor> fingerprints;
  uint32_t version;
  bool versioned;
  bool parameter; // a leaf that requires grad, an nn.Parameter that does not, or a view of one
  bool leaf; // it came to the graph from outside: a parameter, a buffer, an input
  bool result; // of the operator that saved it, not one of its arguments
  bool unread; // saved, but backward does not read it: running statistics of a batch norm that trains
  bool released; // the writer has been told, or the value is a private copy: later writes change nothing
  bool lost; // overwritten, which `note` tells: backward is refused when it asks for it
  const void* unpacked_by; // the node
  long unpacked;
  uint32_t accounted; // up to this version every raise was by an operator that was seen to miss it
  bool unaccounted; // ... and another one came since
  std::shared_ptr<const Raise> beside; // the first of those operators
  bool away; // its storage gave the memory back, and the value with it
  bool refilled; // ... and something has been written there since
  const c10::OperatorName* op;
  SharedPlace place;
  Object policy;
  Object note; // what became of it, for guard.py
};

PyTypeObject* saved_type = nullptr;
std::atomic<uint64_t> saved_so_far{0};

SavedObject* saved(PyObject* object) {
  return reinterpret_cast<SavedObject*>(object);
}

uint32_t version_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

// It has been written since, or something beside it in the same base has: what plain torch refuses.
bool stale(const SavedObject* entry) {
  return entry->versioned && version_of(entry->value) != entry->version;
}

// ... and every operator that did so was seen to leave its bytes alone: writes beside it, t_(), set_().
bool seen_beside(const SavedObject* entry) {
  return stale(entry) && entry->beside != nullptr && !entry->unaccounted && entry->accounted == version_of(entry->value);
}

// Memory that torch has not allocated (NumPy, DLPack, shared memory) may have other storages over it.
bool borrowed(const c10::StorageImpl* storage) {
  return storage->allocator() == nullptr;
}

int64_t bytes_of(const c10::StorageImpl* storage) {
  return storage->sym_nbytes().maybe_as_int().value_or(0);
}

// Every live saved value by the storage it lies in: an address is another's as soon as memory is given back. Changed with
// the GIL held and the mutex locked; read with either. The GIL is never taken with the mutex locked. A saved value holds
// its storage, so a key stays true while it is here.
struct Ledger {
  std::mutex mutex;
  ska::flat_hash_map<const c10::StorageImpl*, c10::SmallVector<SavedObject*, 3>> by_storage;
  std::multimap<const char*, const c10::StorageImpl*> borrowed_at;
  std::atomic<size_t> size{0};

  void add(SavedObject* entry) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& extent : entry->extents) {
      auto& entries = by_storage[extent.storage];
      if (entries.empty() && borrowed(extent.storage)) {
        borrowed_at.emplace(extent.base, extent.storage);
      }
      entries.push_back(entry);
      size.fetch_add(1, std::memory_order_relaxed);
    }
  }

  void remove(SavedObject* entry) {
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& extent : entry->extents) {
      const auto found = by_storage.find(extent.storage);
      if (found == by_storage.end()) {
        continue;
      }
      auto& entries = found->second;
      auto* place = std::find(entries.begin(), entries.end(), entry);
      if (place != entries.end()) {
        entries.erase(place);
        size.fetch_sub(1, std::memory_order_relaxed);
      }
      if (entries.empty()) {
        by_storage.erase(found);
        std::erase_if(borrowed_at, [&](const auto& item) { return item.second == extent.storage; });
      }
    }
  }

  // The saved values of the storages that may share a byte with `written`, whose own storage is alive.
  template <class F>
  void each_near(const Extent& written, const F& visit) const {
    if (const auto found = by_storage.find(written.storage); found != by_storage.end()) {
      visit(found->second);
    }
    if (written.base == nullptr) {
      return;
    }
    if (borrowed(written.storage)) {
      const auto* begin = written.base + written.begin;
      const auto* end = written.base + written.end;
      for (const auto& [storage, entries] : by_storage) {
        const auto* base = static_cast<const char*>(storage->data());
        if (storage != written.storage && base != nullptr && base < end && begin < base + bytes_of(storage)) {
          visit(entries);
        }
      }
    } else if (!borrowed_at.empty()) {
      const auto end = borrowed_at.lower_bound(written.base + std::max<int64_t>(bytes_of(written.storage), 1));
      for (auto item = borrowed_at.lower_bound(written.base); item != end; ++item) {
        if (const auto found = by_storage.find(item->second); found != by_storage.end()) {
          visit(found->second);
        }
      }
    }
  }

  bool has_near(c10::ArrayRef<Extent> extents) {
    const std::lock_guard<std::mutex> lock(mutex);
    bool any = false;
    for (const auto& extent : extents) {
      each_near(extent, [&](const auto&) { any = true; });
    }
    return any;
  }

  // A storage has another size now: values that reach past its end are gone.
  void resized(const c10::StorageImpl* storage) {
    const auto found = by_storage.find(storage);
    if (found == by_storage.end()) {
      return;
    }
    const int64_t bytes = bytes_of(storage);
    for (auto* entry : found->second) {
      for (const auto& extent : entry->extents) {
        if (extent.storage == storage && extent.end > bytes) {
          entry->away = true;
          entry->refilled = false;
        }
      }
    }
  }
};

Ledger& ledger() {
  static auto* instance = new Ledger(); // outlives the interpreter's last deallocations
  return *instance;
}

bool plain(const at::Tensor& tensor) {
  // Subclasses, functorch's wrappers and fakes stand for other tensors.
  constexpr auto stand_ins = c10::DispatchKeySet(
      {c10::DispatchKey::Python,
       c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchGradWrapper,
       c10::DispatchKey::Functionalize});
  return !tensor.key_set().has_any(stand_ins);
}

// The strided tensors that a tensor of any layout keeps its values in.
template <class F>
void each_part(const at::Tensor& tensor, const F& visit) {
  if (!tensor.defined()) {
    return;
  }
  if (tensor.is_sparse()) {
    const auto* impl = at::sparse::get_sparse_impl(tensor);
    visit(impl->indices());
    visit(impl->values());
  } else if (at::sparse_csr::is_sparse_compressed(tensor)) {
    auto* impl = at::sparse_csr::get_sparse_csr_impl(tensor);
    visit(impl->compressed_indices());
    visit(impl->plain_indices());
    visit(impl->values());
  } else if (tensor.key_set().has(c10::DispatchKey::NestedTensor)) {
    visit(at::native::get_nested_tensor_impl(tensor)->get_unsafe_storage_as_tensor());
  } else {
    visit(tensor);
  }
}

void append_extents(Extents& extents, const at::Tensor& tensor) {
  each_part(tensor, [&](const at::Tensor& part) {
    if (auto extent = extent_of(part)) {
      extents.push_back(std::move(*extent));
    }
  });
}

// Where it lies now.
Extents extents_now(const SavedObject* entry) {
  auto extents = entry->extents;
  for (auto& extent : extents) {
    extent.base = static_cast<const char*>(extent.storage->data());
  }
  return extents;
}

bool overlap_any(c10::ArrayRef<Extent> a, c10::ArrayRef<Extent> b) {
  return std::any_of(a.begin(), a.end(), [&](const Extent& x) {
    return std::any_of(b.begin(), b.end(), [&](const Extent& y) { return overlap(x, y); });
  });
}

// ---- the operator that is running

} // namespace

// What an operator that writes is about to do. Taken before it runs: a kernel that takes an argument by value moves it away.
struct Writing {
  struct Target {
    c10::VariableVersion counter;
    Extent extent;
    uint32_t version; // before the write
  };

  std::vector<Target> targets; // what it is about to overwrite
  std::vector<Extent> filled; // ... as one more result
  std::vector<Extent> statistics; // what it saves and its backward does not read
  std::vector<Object> unfinished; // saved values that it has yet to fill, and that are to be fingerprinted then
};

constinit thread_local Running* running = nullptr;

namespace {

// The place where the operator that runs innermost was called: looked up once for all that it saves.
struct LastPlace {
  const Running* within = nullptr;
  PyFrameObject* frame = nullptr; // compared, never used: while the operator runs, the frame that called it is there
  int instruction = -1;
  std::weak_ptr<const Place> place; // dies without the GIL
};

thread_local LastPlace last_place;

SharedPlace current_place() {
  if (running == nullptr) {
    return std::make_shared<const Place>(find_place());
  }
  PyFrameObject* frame = PyThreadState_GetFrame(PyThreadState_Get());
  const int instruction = frame != nullptr ? PyFrame_GetLasti(frame) : -1;
  Py_XDECREF(frame);
  auto& last = last_place;
  const bool same = running->placed && last.within == running && last.frame == frame && last.instruction == instruction;
  auto place = same ? last.place.lock() : nullptr;
  if (place == nullptr) {
    place = std::make_shared<const Place>(find_place());
    last = {running, frame, instruction, place};
    running->placed = true;
  }
  return place;
}

thread_local int entered = 0; // guards that this thread has entered and not left

// Torch hands a thread's state on to the threads that work for it. Those of a backward run the user's graph; those of a
// process group bring what a collective writes, which was judged where it was called, and may be saved ahead of its arrival.
bool lent_thread() {
  return entered == 0 && torch::autograd::get_current_graph_task_id() == -1;
}

template <class F>
void each_tensor(const c10::IValue& value, const F& visit) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) {
      visit(value.toTensor());
    }
  } else if (value.isTensorList()) {
    const auto list = value.toTensorVector();
    for (const at::Tensor& tensor : list) {
      visit(tensor);
    }
  } else if (value.isList()) {
    for (const c10::IValue& item : value.toListRef()) {
      each_tensor(item, visit);
    }
  }
}

template <class F>
void each_tensor(const Argument& argument, const F& visit) {
  if (const auto* value = argument.boxed) {
    each_tensor(*value, visit);
  }
  for (const at::Tensor& tensor : argument.tensors) {
    if (tensor.defined()) {
      visit(tensor);
    }
  }
}

PyObject* current_policy() { // borrowed, with the GIL
  if (!at::impl::ThreadLocalPythonObjects::contains(policy_key())) {
    return nullptr;
  }
  PyObject* policy = at::impl::ThreadLocalPythonObjects::get(policy_key())->ptr(getPyInterpreter());
  return policy != Py_None ? policy : nullptr;
}

Object operator_name(const c10::OperatorName& name) {
  const auto text = c10::toString(name);
  return checked(PyUnicode_FromStringAndSize(text.data(), static_cast<Py_ssize_t>(text.size())));
}

Object place_objects(const Place& place) {
  const auto object = [](const Object& o) { return o ? o.get() : Py_None; };
  return checked(Py_BuildValue(
      "(OiOOi)",
      object(place.code),
      place.instruction,
      object(place.module),
      object(place.caller),
      place.caller_instruction));
}

Object ask_policy(
    PyObject* policy,
    const char* method,
    const std::vector<Object>& entries,
    const c10::OperatorName& op,
    const Place& where,
    bool update = false) {
  const auto list = checked(PyList_New(static_cast<Py_ssize_t>(entries.size())));
  for (size_t i = 0; i < entries.size(); ++i) {
    PyList_SET_ITEM(list.get(), static_cast<Py_ssize_t>(i), share(entries[i].get()).release());
  }
  const auto name = operator_name(op);
  const auto place = place_objects(where);
  return checked(PyObject_CallMethod(
      policy, method, "OOOO", list.get(), name.get(), place.get(), update ? Py_True : Py_False));
}

// Its memory is about to be overwritten, or was: backward is refused when it asks for the value. The first write is the
// one that counts.
void note_loss(SavedObject* entry, PyObject* note) {
  if (!entry->lost) {
    entry->note = share(note);
    entry->lost = entry->released = true;
    entry->fingerprints.clear();
  }
}

// Calls visit(entry, note) for each entry that the policy answered with a note; it answers None where it made none.
template <class F>
void each_note(const std::vector<Object>& entries, const Object& notes, const F& visit) {
  if (notes.get() == Py_None) {
    return;
  }
  const auto sequence = checked(PySequence_Fast(notes.get(), "a note, or None, for each value that is overwritten"));
  TORCH_CHECK(PySequence_Fast_GET_SIZE(sequence.get()) == static_cast<Py_ssize_t>(entries.size()));
  for (size_t i = 0; i < entries.size(); ++i) {
    PyObject* note = PySequence_Fast_GET_ITEM(sequence.get(), static_cast<Py_ssize_t>(i));
    if (note != Py_None) {
      visit(entries[i], note);
    }
  }
}

// torch refuses to write to it, before anything is written: a leaf that requires grad, or a view of one, with grad mode on.
bool refused_by_torch(const at::Tensor& tensor) {
  const auto reached = tensor.key_set() - c10::impl::tls_local_dispatch_key_set().excluded_;
  return at::GradMode::is_enabled() && tensor.requires_grad() && reached.has_any(c10::autograd_dispatch_keyset) &&
      (tensor.is_leaf() || (tensor.is_view() && tensor._base().is_leaf()));
}

// A backward that runs for the last time may use the memory of its own saved values: nobody will ask for them again.
bool dies_with_this_node(const SavedObject* entry) {
  if (entry->unpacked_by == nullptr || torch::autograd::get_current_graph_task_keep_graph()) {
    return false;
  }
  const auto node = torch::autograd::get_current_node();
  return node.get() == entry->unpacked_by;
}

// The plain tensors that a tensor subclass is made of, as guard.py knows them.
template <class F>
void each_plain(const at::Tensor& tensor, PyObject* policy, const F& visit, const char* which = "_parts") {
  if (plain(tensor)) {
    visit(tensor);
  } else if (policy != nullptr) {
    const auto wrapped = checked(THPVariable_Wrap(tensor));
    const auto parts = checked(PyObject_CallMethod(policy, which, "O", wrapped.get()));
    const auto sequence = checked(PySequence_Fast(parts.get(), "the parts of a tensor subclass"));
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.get()); ++i) {
      visit(THPVariable_Unpack(PySequence_Fast_GET_ITEM(sequence.get(), i)));
    }
  }
}

// The arguments of the operator that is being judged, for guard.py to look at.
class Judging {
 public:
  Judging(const c10::ArrayRef<Argument>& arguments, const OperatorFacts& facts)
      : arguments(arguments), facts(facts), outer_(current) {
    current = this;
  }
  ~Judging() {
    current = outer_;
  }
  Judging(const Judging&) = delete;
  Judging& operator=(const Judging&) = delete;

  static thread_local const Judging* current;
  const c10::ArrayRef<Argument>& arguments;
  const OperatorFacts& facts;

 private:
  const Judging* outer_;
};

thread_local const Judging* Judging::current = nullptr;

enum class Change { bytes, one_more_result, unannotated_bytes, layout, none };

std::vector<at::Tensor> fingerprints_of(const at::Tensor& tensor, PyObject* policy);

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

  // What is no operator, and is about to write these.
  void judge(const std::vector<at::Tensor>& written) {
    for (const auto& tensor : written) {
      look_at(tensor, Change::bytes);
    }
    judged_ = true;
  }

  Writing& writing() {
    return writing_;
  }

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
        entry->fingerprints = fingerprints_of(entry->value, entry->policy.get());
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
      each_plain(tensor, current_policy(), append, "_written_parts");
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
    PyObject* policy = current_policy();
    if (policy == nullptr || lent_thread()) {
      return;
    }
    std::vector<Object> hits;
    const auto consider = [&](SavedObject* entry, const Extent& written) {
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
        hits.push_back(share(reinterpret_cast<PyObject*>(entry)));
      }
    };
    for (const auto& extent : extents) {
      bool any = false;
      ledger().each_near(extent, [&](c10::ArrayRef<SavedObject*> entries) {
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
      const auto notes = ask_policy(policy, "_on_write", hits, *op_, *current_place(), update);
      each_note(hits, notes, [&](const Object& object, PyObject* note) {
        noted_.emplace_back(share(object.get()), share(note));
      });
    }
  }

  // Before the write.
  static void account(SavedObject* entry) {
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

  static bool unseen_raise(const SavedObject* entry) {
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

void watch(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto& known = facts_of(op);
  if (!known->writes) {
    const RunningScope scope(known->name);
    op.redispatchBoxed(below(keys), stack);
    return;
  }
  const auto facts = known;
  c10::SmallVector<Argument, 16> arguments;
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    arguments.emplace_back(value);
  }
  watch_write(*facts, arguments, [&] { op.redispatchBoxed(below(keys), stack); });
}

} // namespace

void watch_write(const OperatorFacts& facts, c10::ArrayRef<Argument> arguments, c10::function_ref<void()> run) {
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

namespace {

// ---- saving

// Undefined for a part whose memory is not there.
std::vector<at::Tensor> fingerprints_of(const at::Tensor& tensor, PyObject* policy) {
  std::vector<at::Tensor> fingerprints;
  const auto fingerprint = [&](const at::Tensor& part) {
    if (part.layout() != at::kStrided || !part.has_storage() || part.is_meta()) {
      return;
    }
    if (!can_digest(part)) {
      checked(PyObject_CallMethod(policy, "_no_digest", "s", part.device().str().c_str()));
      return;
    }
    const auto extent = extent_of(part);
    const bool there = extent && extent->end <= bytes_of(part.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    fingerprints.push_back(there ? digest_on_device(part) : at::Tensor());
  };
  each_plain(tensor, policy, [&](const at::Tensor& one) { each_part(one, fingerprint); }, "_arrived_parts");
  return fingerprints;
}

bool verifies(PyObject* policy) {
  static PyObject* const name = PyUnicode_InternFromString("verify");
  return truth(checked(PyObject_GetAttr(policy, name)).get());
}

// An operator that is about to overwrite what its own autograd node saves: x.mul_(x).
const Running* about_to_overwrite(const SavedObject* entry) {
  for (const auto* op = running; op != nullptr; op = op->outer) {
    if (op->writing == nullptr) {
      continue;
    }
    for (const auto& [counter, extent, version] : op->writing->targets) {
      const bool still_before = !counter.enabled() || counter.current_version() == version;
      if (still_before && overlap_any(extent, entry->extents)) {
        return op;
      }
    }
  }
  return nullptr;
}

// One that has yet to fill what its own node saves: rrelu's noise.
Writing* about_to_fill(const SavedObject* entry) {
  for (const auto* op = running; op != nullptr; op = op->outer) {
    if (op->writing != nullptr && overlap_any(op->writing->filled, entry->extents)) {
      return op->writing;
    }
  }
  return nullptr;
}

bool saved_by_training_batch_norm(const SavedObject* entry) {
  for (const auto* op = running; op != nullptr; op = op->outer) {
    if (op->writing != nullptr && overlap_any(op->writing->statistics, entry->extents)) {
      return true;
    }
  }
  return false;
}

PyTypeObject* parameter_type = nullptr; // torch.nn.Parameter

// Where backward is differentiated in its turn, a view of a parameter that was saved comes back as a tensor that is no view:
// its history alone leads to the leaf.
bool lies_in_a_leaf(const at::TensorBase& tensor) {
  const auto* node = tensor.grad_fn().get();
  for (int hops = 0; node != nullptr && hops < 8; ++hops) {
    if (node->num_outputs() == 0) {
      const auto* leaf = dynamic_cast<const torch::autograd::AccumulateGrad*>(node);
      return leaf != nullptr && tensor.has_storage() && leaf->variable.has_storage() && tensor.is_alias_of(leaf->variable);
    }
    node = node->num_outputs() == 1 ? node->next_edge(0).function.get() : nullptr;
  }
  return false;
}

// A result of the node that saves it, which is the last one that this thread has made; what an operator was given is of an
// older one.
bool is_result(const at::Tensor& tensor) {
  const auto* meta = torch::autograd::impl::get_autograd_meta(tensor);
  return meta != nullptr && meta->grad_fn_ != nullptr && meta->grad_fn_->sequence_nr() + 1 >= at::sequence_number::peek();
}

bool has_node(const c10::TensorImpl* impl) {
  const auto* meta = static_cast<const torch::autograd::AutogradMeta*>(impl->autograd_meta());
  return meta != nullptr && meta->grad_fn_ != nullptr;
}

bool is_parameter(const at::Tensor& tensor, PyObject* object) {
  const bool view = tensor.is_view();
  const auto& base = view ? tensor._base() : tensor;
  if (!base.is_leaf()) {
    return lies_in_a_leaf(base);
  }
  if (base.requires_grad()) {
    return true;
  }
  const auto wrapped = view ? checked(THPVariable_Wrap(base)) : share(object);
  return PyType_IsSubtype(Py_TYPE(wrapped.get()), parameter_type) != 0;
}

// Without HANDLE_TH_ERRORS, here and in unpack: it would gather warnings, which whatever runs this does as well.
PyObject* pack(PyObject*, PyObject* argument) {
  try {
    TORCH_CHECK_TYPE(THPVariable_Check(argument), "guard_pack takes a tensor");
    const auto& tensor = THPVariable_Unpack(argument);
    PyObject* policy = current_policy();
    auto object = checked(saved_type->tp_alloc(saved_type, 0));
    auto* entry = saved(object.get());
    new (&entry->value) at::Tensor();
    new (&entry->original) decltype(entry->original)(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>());
    new (&entry->extents) Extents();
    new (&entry->storages) std::vector<c10::Storage>();
    new (&entry->fingerprints) std::vector<at::Tensor>();
    new (&entry->beside) std::shared_ptr<const Raise>();
    new (&entry->place) SharedPlace();
    new (&entry->policy) Object(share(policy));
    new (&entry->note) Object();
    const bool is_plain = plain(tensor);
    entry->value = is_plain ? tensor.tensor_data() : tensor.detach();
    each_plain(tensor, policy, [&](const at::Tensor& one) {
      append_extents(entry->extents, one);
      if (!is_plain) {
        each_part(one, [&](const at::Tensor& part) {
          if (part.has_storage()) {
            entry->storages.push_back(part.storage());
          }
        });
      }
    });
    entry->had_node = has_node(tensor.unsafeGetTensorImpl());
    entry->result = is_result(tensor);
    if (is_plain && !entry->result) {
      entry->original = decltype(entry->original)(tensor.getIntrusivePtr());
    }
    const auto& counter = tensor.unsafeGetTensorImpl()->version_counter();
    saved_so_far.fetch_add(1, std::memory_order_relaxed);
    entry->versioned = counter.enabled();
    entry->version = entry->versioned ? counter.current_version() : 0;
    entry->accounted = entry->version;
    entry->parameter = is_parameter(tensor, argument);
    entry->leaf = entry->parameter || tensor.is_leaf();
    if (running != nullptr) {
      entry->op = running->op;
      entry->unread = saved_by_training_batch_norm(entry);
    }
    entry->place = current_place();
    if (policy != nullptr) {
      if (const auto* op = about_to_overwrite(entry)) {
        std::vector<Object> hit;
        hit.push_back(share(object.get()));
        const auto notes = ask_policy(policy, "_on_write", hit, *op->op, *current_place());
        each_note(hit, notes, [&](const Object&, PyObject* note) { note_loss(entry, note); });
      }
      if (!entry->unread && !entry->released && verifies(policy)) {
        if (auto* op = about_to_fill(entry)) {
          op->unfinished.push_back(share(object.get()));
        } else {
          entry->fingerprints = fingerprints_of(entry->value, policy);
        }
      }
    }
    if (!entry->released && !entry->extents.empty()) {
      ledger().add(entry);
    }
    return object.release();
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// The tensor that torch alone would hand to backward lies in other memory now, or sees it otherwise.
bool exchanged(const SavedObject* entry, const c10::TensorImpl* original) {
  const auto* value = entry->value.unsafeGetTensorImpl();
  const auto strided = [](const c10::TensorImpl* impl) {
    return impl->has_storage() && !impl->key_set().has(c10::DispatchKey::NestedTensor);
  };
  return strided(value) && strided(original) &&
      (original->unsafe_storage().unsafeGetStorageImpl() != value->unsafe_storage().unsafeGetStorageImpl() ||
       original->dtype() != value->dtype() || original->storage_offset() != value->storage_offset() ||
       original->sizes() != value->sizes() || original->strides() != value->strides());
}

PyObject* unpack(PyObject*, PyObject* argument) {
  try {
    TORCH_CHECK_TYPE(Py_TYPE(argument) == saved_type, "guard_unpack takes what guard_pack returned");
    auto* entry = saved(argument);
    PyObject* policy = entry->policy.get();
    entry->unpacked_by = torch::autograd::get_current_node().get();
    if (const at::Tensor original(entry->original.lock()); original.defined() && !entry->lost) {
      TORCH_CHECK(
          !entry->had_node || has_node(original.unsafeGetTensorImpl()),
          "Trying to use a saved tensor that has been detached in-place, i.e. with .detach_(). This is not supported, please "
          "use out-of-place `.detach()` instead");
      if (!seen_beside(entry) && exchanged(entry, original.unsafeGetTensorImpl())) {
        const auto now = original.tensor_data();
        entry->unpacked += entry->unpacked_by != nullptr;
        if (policy == nullptr) {
          return THPVariable_Wrap(now);
        }
        const auto here = checked(THPVariable_Wrap(now));
        return checked(PyObject_CallMethod(policy, "_on_exchange", "OO", argument, here.get())).release();
      }
    }
    if (stale(entry) || entry->lost) {
      TORCH_CHECK(
          policy != nullptr,
          "one of the variables needed for gradient computation has been modified by an inplace operation: it is at "
          "version ", version_of(entry->value), "; expected version ", entry->version, " instead");
      if (seen_beside(entry) && !entry->note) {
        std::vector<Object> one;
        one.push_back(share(argument));
        ask_policy(policy, "_on_version", one, *entry->beside->op, *entry->beside->place);
      }
      if (stale(entry) || entry->lost) {
        checked(PyObject_CallMethod(policy, "_on_stale", "O", argument));
      }
    }
    if (!entry->fingerprints.empty()) {
      const auto now = fingerprints_of(entry->value, policy);
      for (size_t i = 0; i < now.size(); ++i) {
        if (!now[i].defined() || !entry->fingerprints[i].defined()) {
          continue;
        }
        const auto then = checked(THPVariable_Wrap(entry->fingerprints[i]));
        if (!now[i].is_cpu()) {
          const auto here = checked(THPVariable_Wrap(now[i]));
          checked(PyObject_CallMethod(policy, "_compare", "OOO", argument, then.get(), here.get()));
        } else if (now[i].const_data_ptr<int64_t>()[0] != entry->fingerprints[i].const_data_ptr<int64_t>()[0]) {
          checked(PyObject_CallMethod(policy, "_on_mismatch", "O", argument));
          break;
        }
      }
    }
    entry->unpacked += entry->unpacked_by != nullptr; // grad_fn._saved_self is no backward
    return THPVariable_Wrap(entry->value);
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

// ---- the type Saved

void saved_dealloc(PyObject* object) {
  auto* entry = saved(object);
  ledger().remove(entry);
  entry->note.~Object();
  entry->policy.~Object();
  entry->place.~shared_ptr();
  entry->beside.~shared_ptr();
  entry->fingerprints.~vector();
  entry->storages.~vector();
  entry->extents.~Extents();
  entry->original.~weak_intrusive_ptr();
  entry->value.~Tensor();
  PyTypeObject* type = Py_TYPE(object);
  type->tp_free(object);
  Py_DECREF(type);
}

// The value became a private copy.
PyObject* saved_replace(PyObject* self, PyObject* argument) {
  HANDLE_TH_ERRORS
  auto* entry = saved(self);
  TORCH_CHECK_TYPE(THPVariable_Check(argument), "replace() takes a tensor");
  ledger().remove(entry);
  entry->extents.clear();
  entry->storages.clear();
  entry->original.reset();
  entry->value = THPVariable_Unpack(argument).detach();
  entry->versioned = entry->value.unsafeGetTensorImpl()->version_counter().enabled();
  entry->version = entry->versioned ? version_of(entry->value) : 0;
  entry->released = true;
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// Later writes to it are of no interest: the first one has been reported.
PyObject* saved_release(PyObject* self, PyObject*) {
  saved(self)->released = true;
  saved(self)->fingerprints.clear();
  Py_RETURN_NONE;
}

// Its version rose, its bytes did not change.
PyObject* saved_accept(PyObject* self, PyObject*) {
  HANDLE_TH_ERRORS
  auto* entry = saved(self);
  entry->version = entry->versioned ? version_of(entry->value) : 0;
  entry->accounted = entry->version;
  entry->unaccounted = false;
  entry->beside.reset();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_value(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return THPVariable_Wrap(saved(self)->value);
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_op(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  const auto* entry = saved(self);
  if (entry->op == nullptr) {
    Py_RETURN_NONE;
  }
  return operator_name(*entry->op).release();
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_place(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  return place_objects(*saved(self)->place).release();
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_beside(PyObject* self, void*) {
  HANDLE_TH_ERRORS
  const auto& raise = saved(self)->beside;
  if (raise == nullptr) {
    Py_RETURN_NONE;
  }
  return checked(PyTuple_Pack(2, operator_name(*raise->op).get(), place_objects(*raise->place).get())).release();
  END_HANDLE_TH_ERRORS
}

PyObject* saved_get_away(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->away);
}

PyObject* saved_get_unread(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->unread);
}

PyObject* saved_get_result(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->result);
}

PyObject* saved_get_stale(PyObject* self, void*) {
  return PyBool_FromLong(stale(saved(self)));
}

PyObject* saved_get_unaccounted(PyObject* self, void*) {
  return PyBool_FromLong(stale(saved(self)) && !seen_beside(saved(self)));
}

PyObject* saved_get_lost(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->lost);
}

PyObject* saved_get_leaf(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->leaf);
}

PyObject* saved_get_parameter(PyObject* self, void*) {
  return PyBool_FromLong(saved(self)->parameter);
}

PyObject* saved_get_version(PyObject* self, void*) {
  return PyLong_FromUnsignedLong(saved(self)->version);
}

PyObject* saved_get_unpacked(PyObject* self, void*) {
  return PyLong_FromLong(saved(self)->unpacked);
}

PyObject* saved_get_note(PyObject* self, void*) {
  const auto& note = saved(self)->note;
  return share(note ? note.get() : Py_None).release();
}

int saved_set_note(PyObject* self, PyObject* value, void*) {
  saved(self)->note = share(value);
  return 0;
}

PyMethodDef saved_methods[] = {
    {"replace", saved_replace, METH_O, nullptr},
    {"release", saved_release, METH_NOARGS, nullptr},
    {"accept", saved_accept, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr}};

PyGetSetDef saved_attributes[] = {
    {"value", saved_get_value, nullptr, nullptr, nullptr},
    {"op", saved_get_op, nullptr, nullptr, nullptr},
    {"place", saved_get_place, nullptr, nullptr, nullptr},
    {"result", saved_get_result, nullptr, nullptr, nullptr},
    {"beside", saved_get_beside, nullptr, nullptr, nullptr},
    {"away", saved_get_away, nullptr, nullptr, nullptr},
    {"unread", saved_get_unread, nullptr, nullptr, nullptr},
    {"stale", saved_get_stale, nullptr, nullptr, nullptr},
    {"unaccounted", saved_get_unaccounted, nullptr, nullptr, nullptr},
    {"lost", saved_get_lost, nullptr, nullptr, nullptr},
    {"leaf", saved_get_leaf, nullptr, nullptr, nullptr},
    {"parameter", saved_get_parameter, nullptr, nullptr, nullptr},
    {"version", saved_get_version, nullptr, nullptr, nullptr},
    {"unpacked", saved_get_unpacked, nullptr, nullptr, nullptr},
    {"note", saved_get_note, saved_set_note, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr}};

PyType_Slot saved_slots[] = {
    {Py_tp_dealloc, reinterpret_cast<void*>(saved_dealloc)},
    {Py_tp_methods, saved_methods},
    {Py_tp_getset, saved_attributes},
    {0, nullptr}};

PyType_Spec saved_spec = {
    "safe_inplace._C.Saved",
    sizeof(SavedObject),
    0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
    saved_slots};

// ---- switching it on

PyObject* hooks[2] = {nullptr, nullptr};

void set_policy(PyObject* policy) {
  at::impl::ThreadLocalPythonObjects::set(
      policy_key(), std::make_shared<c10::SafePyObject>(share(policy).release(), getPyInterpreter()));
}

bool top_hooks_are_ours() {
  return at::SavedTensorDefaultHooks::get_tls_state().stack.top().first.ptr(getPyInterpreter()) == hooks[0];
}

// The thread's watch begins, by this policy.
PyObject* enter(PyObject*, PyObject* policy) {
  HANDLE_TH_ERRORS
  at::SavedTensorDefaultHooks::lazy_initialize();
  at::SavedTensorDefaultHooks::push_hooks(
      c10::SafePyObject(share(hooks[0]).release(), getPyInterpreter()),
      c10::SafePyObject(share(hooks[1]).release(), getPyInterpreter()));
  set_policy(policy);
  ++entered;
  c10::impl::tls_set_dispatch_key_included(kKey, true);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// One guard less, that with `inside` guards inside of it; `policy` decides from here, None where the watch ends.
PyObject* exit(PyObject*, PyObject* arguments) {
  HANDLE_TH_ERRORS
  PyObject* policy = nullptr;
  int inside = 0;
  if (!PyArg_ParseTuple(arguments, "Oi", &policy, &inside)) {
    return nullptr;
  }
  // Hooks that were pushed inside the guard and outlive it (an ExitStack closed in another order) stay as they are.
  std::vector<std::pair<c10::SafePyObject, c10::SafePyObject>> others;
  const auto& stack = at::SavedTensorDefaultHooks::get_tls_state().stack;
  while (!stack.empty() && (!top_hooks_are_ours() || inside-- > 0)) {
    others.push_back(at::SavedTensorDefaultHooks::pop_hooks());
  }
  if (!stack.empty()) {
    at::SavedTensorDefaultHooks::pop_hooks();
  }
  for (; !others.empty(); others.pop_back()) {
    at::SavedTensorDefaultHooks::push_hooks(std::move(others.back().first), std::move(others.back().second));
  }
  --entered;
  if (policy == Py_None) {
    c10::impl::tls_set_dispatch_key_included(kKey, false);
  }
  // None where there is no policy: the entry itself cannot be erased before torch 2.13.
  set_policy(policy);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* current(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  PyObject* policy = current_policy();
  return Py_NewRef(policy != nullptr ? policy : Py_None);
  END_HANDLE_TH_ERRORS
}

PyObject* live(PyObject*, PyObject*) {
  return PyLong_FromSize_t(ledger().size.load(std::memory_order_relaxed));
}

PyObject* set_whose_code(PyObject*, PyObject* arguments) {
  PyObject* predicate = nullptr;
  PyObject* call = nullptr;
  if (!PyArg_ParseTuple(arguments, "OO", &predicate, &call)) {
    return nullptr;
  }
  Py_XSETREF(whose_code, Py_NewRef(predicate));
  Py_XSETREF(module_call, Py_NewRef(call));
  Py_RETURN_NONE;
}

PyObject* set_parameter_type(PyObject*, PyObject* type) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(PyType_Check(type), "guard_parameter_type takes a class");
  Py_XSETREF(parameter_type, reinterpret_cast<PyTypeObject*>(Py_NewRef(type)));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// A storage, by the address of its StorageImpl, has another size.
PyObject* resized(PyObject*, PyObject* address) {
  HANDLE_TH_ERRORS
  void* storage = PyLong_AsVoidPtr(address);
  if (storage == nullptr && PyErr_Occurred() != nullptr) {
    return nullptr;
  }
  ledger().resized(static_cast<const c10::StorageImpl*>(storage));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// A compiled region is about to write `tensors`; `raise_versions` is called with them.
PyObject* compiled_writes(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "guard_compiled_writes takes the tensors and a function");
  static const auto* name = kept_for_ever(c10::OperatorName("torch::compile", ""));
  const auto sequence = checked(PySequence_Fast(arguments[0], "guard_compiled_writes takes a sequence of tensors"));
  std::vector<at::Tensor> tensors;
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(sequence.get()); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(sequence.get(), i);
    TORCH_CHECK_TYPE(THPVariable_Check(item), "guard_compiled_writes takes tensors");
    tensors.push_back(THPVariable_Unpack(item));
  }
  Writes writes(name);
  writes.judge(tensors);
  const auto result = checked(PyObject_CallOneArg(arguments[1], sequence.get()));
  writes.finish();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* share_memory(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(
      count == 2 && THPVariable_Check(arguments[0]) && THPVariable_Check(arguments[1]),
      "guard_overlap takes two tensors");
  const auto a = extent_of(THPVariable_Unpack(arguments[0]));
  const auto b = extent_of(THPVariable_Unpack(arguments[1]));
  return PyBool_FromLong(a && b && overlap(*a, *b));
  END_HANDLE_TH_ERRORS
}

// [(tensor, is it written?)]: the tensors that the operator which is being judged was called with.
PyObject* arguments(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  auto list = checked(PyList_New(0));
  if (const auto* judging = Judging::current) {
    const auto& written = judging->facts.written;
    for (size_t i = 0; i < judging->arguments.size(); ++i) {
      PyObject* is_written = std::find(written.begin(), written.end(), i) != written.end() ? Py_True : Py_False;
      each_tensor(judging->arguments[i], [&](const at::Tensor& tensor) {
        const auto wrapped = checked(THPVariable_Wrap(tensor));
        const auto pair = checked(PyTuple_Pack(2, wrapped.get(), is_written));
        if (PyList_Append(list.get(), pair.get()) != 0) {
          rethrow_python();
        }
      });
    }
  }
  return list.release();
  END_HANDLE_TH_ERRORS
}

// How many hold the tensor's storage, beside the saved values: itself, its base, views and other aliases of it.
PyObject* holders(PyObject*, PyObject* argument) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(THPVariable_Check(argument), "guard_holders takes a tensor");
  const auto& tensor = THPVariable_Unpack(argument);
  if (!tensor.has_storage()) {
    return PyLong_FromLong(-1);
  }
  const auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto count = static_cast<long>(tensor.storage().use_count());
  const auto found = ledger().by_storage.find(storage);
  if (found != ledger().by_storage.end()) {
    for (const auto* entry : found->second) {
      count -= entry->value.has_storage() && entry->value.storage().unsafeGetStorageImpl() == storage;
    }
  }
  return PyLong_FromLong(count);
  END_HANDLE_TH_ERRORS
}

PyMethodDef functions[] = {
    {"guard_enter", enter, METH_O, nullptr},
    {"guard_exit", exit, METH_VARARGS, nullptr},
    {"guard_current", current, METH_NOARGS, nullptr},
    {"guard_live", live, METH_NOARGS, nullptr},
    {"guard_pack", pack, METH_O, nullptr},
    {"guard_unpack", unpack, METH_O, nullptr},
    {"guard_arguments", arguments, METH_NOARGS, nullptr},
    {"guard_holders", holders, METH_O, nullptr},
    {"guard_whose_code", set_whose_code, METH_VARARGS, nullptr},
    {"guard_parameter_type", set_parameter_type, METH_O, nullptr},
    {"guard_resized", resized, METH_O, nullptr},
    {"guard_compiled_writes",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(compiled_writes)),
     METH_FASTCALL,
     nullptr},
    {"guard_overlap", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(share_memory)), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr}};

} // namespace

TORCH_LIBRARY_IMPL(_, TESTING_ONLY_GenericMode, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&watch>());
}

bool bind_guard(PyObject* module) {
  answer_slot = request_code_extra(nullptr);
  if (answer_slot < 0) {
    PyErr_SetString(PyExc_ImportError, "safe_inplace: every slot for extra data of code objects is taken");
    return false;
  }
  static const auto* departures = new c10::RegistrationHandleRAII(
      c10::Dispatcher::singleton().addRegistrationListener(std::make_unique<Departures>()));
  static_cast<void>(departures);
  // A forked child has this thread alone: a lock that another one held would stay locked for ever.
  pthread_atfork(
      [] { ledger().mutex.lock(); }, [] { ledger().mutex.unlock(); }, [] { ledger().mutex.unlock(); });
  saved_type = reinterpret_cast<PyTypeObject*>(PyType_FromSpec(&saved_spec));
  if (saved_type == nullptr || PyModule_AddObjectRef(module, "Saved", reinterpret_cast<PyObject*>(saved_type)) < 0 ||
      PyModule_AddFunctions(module, functions) < 0) {
    return false;
  }
  hooks[0] = PyObject_GetAttrString(module, "guard_pack");
  hooks[1] = PyObject_GetAttrString(module, "guard_unpack");
  return hooks[0] != nullptr && hooks[1] != nullptr;
}

} // namespace safe_inplace
