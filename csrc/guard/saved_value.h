// A value that autograd saved under guard, and what has become of it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/core/operator_name.h>

#include "guard/place.h"
#include "guard/python_object.h"
#include "guard/tensor_parts.h"

namespace safe_inplace::guard {

// An operator that raised the version of saved values whose bytes it left alone.
struct Raise {
  const c10::OperatorName* op;
  SharedPlace place;
};

using WeakTensor = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

struct SavedValue {
  PyObject* object; // the one that this lies in
  at::Tensor value; // shares memory and version counter with what was saved, and holds no graph
  // What torch alone would keep, and read in backward: its memory may have been exchanged (x.data = y). None for a result
  // of the node that saves it, of which torch keeps an alias as well.
  WeakTensor original{c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>()};
  bool had_node = false;
  Extents extents;
  std::vector<c10::Storage> storages; // of a subclass's parts, so that the extents name memory that is there
  std::vector<at::Tensor> fingerprints;
  uint32_t version = 0;
  bool versioned = false;
  bool parameter = false; // a leaf that requires grad, an nn.Parameter that does not, or a view of one
  bool leaf = false; // it came to the graph from outside: a parameter, a buffer, an input
  bool result = false; // of the operator that saved it, not one of its arguments
  bool unread = false; // saved, but backward does not read it: running statistics of a batch norm that trains
  bool released = false; // the writer has been told, or the value is a private copy: later writes change nothing
  bool lost = false; // overwritten, which `note` tells: backward is refused when it asks for it
  const void* unpacked_by = nullptr; // the node
  long unpacked = 0;
  uint32_t accounted = 0; // up to this version every raise was by an operator that was seen to miss it
  bool unaccounted = false; // ... and another one came since
  std::shared_ptr<const Raise> beside; // the first of those operators
  bool away = false; // its storage gave the memory back, and the value with it
  bool refilled = false; // ... and something has been written there since
  const c10::OperatorName* op = nullptr;
  SharedPlace place;
  Object policy;
  Object note; // what became of it, for the policy
};

struct SavedObject {
  PyObject_HEAD SavedValue value;
};

// How many values were saved by now.
extern std::atomic<uint64_t> saved_so_far;

inline SavedValue* saved(PyObject* object) {
  return &reinterpret_cast<SavedObject*>(object)->value;
}

inline uint32_t version_of(const at::Tensor& tensor) {
  return tensor.unsafeGetTensorImpl()->version_counter().current_version();
}

// It has been written since, or something beside it in the same base has: what plain torch refuses.
inline bool stale(const SavedValue* entry) {
  return entry->versioned && version_of(entry->value) != entry->version;
}

// ... and every operator that did so was seen to leave its bytes alone: writes beside it, t_(), set_().
inline bool seen_beside(const SavedValue* entry) {
  return stale(entry) && entry->beside != nullptr && !entry->unaccounted && entry->accounted == version_of(entry->value);
}

// Where it lies now.
inline Extents extents_now(const SavedValue* entry) {
  auto extents = entry->extents;
  for (auto& extent : extents) {
    extent.base = static_cast<const char*>(extent.storage->data());
  }
  return extents;
}

// Its memory is about to be overwritten, or was: backward is refused when it asks for the value. The first write is the
// one that counts.
inline void note_loss(SavedValue* entry, PyObject* note) {
  if (!entry->lost) {
    entry->note = share(note);
    entry->lost = entry->released = true;
    entry->fingerprints.clear();
  }
}

} // namespace safe_inplace::guard
