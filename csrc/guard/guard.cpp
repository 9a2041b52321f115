#include "guard/guard.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>

#include "guard/fingerprints.h"
#include "guard/ledger.h"
#include "guard/policy.h"
#include "guard/saving.h"

namespace safe_inplace::guard {
namespace {

// Its operator is about to overwrite it.
void judge_own_write(SavedValue& value, const Policy& policy) {
  if (const auto* op = about_to_overwrite(&value)) {
    std::vector<Object> hit;
    hit.push_back(share(value.object));
    const auto notes = policy.on_write(hit, *op->op, *current_place(), false);
    each_note(hit, notes, [&](const Object&, PyObject* note) { note_loss(&value, note); });
  }
}

void fingerprint(SavedValue& value, const Policy& policy) {
  if (value.unread || value.released || !policy.verify()) {
    return;
  }
  if (auto* op = about_to_fill(&value)) {
    op->unfinished.push_back(share(value.object));
  } else {
    value.fingerprints = fingerprints_of(value.value, policy);
  }
}

bool strided(const c10::TensorImpl* impl) {
  return impl->has_storage() && !impl->key_set().has(c10::DispatchKey::NestedTensor);
}

bool see_the_same(const c10::TensorImpl* a, const c10::TensorImpl* b) {
  return a->unsafe_storage().unsafeGetStorageImpl() == b->unsafe_storage().unsafeGetStorageImpl() && a->dtype() == b->dtype() &&
         a->storage_offset() == b->storage_offset() && a->sizes() == b->sizes() && a->strides() == b->strides();
}

// The tensor that torch alone would hand to backward lies in other memory now, or sees it otherwise.
bool exchanged(const SavedValue* entry, const c10::TensorImpl* original) {
  const auto* value = entry->value.unsafeGetTensorImpl();
  return strided(value) && strided(original) && !see_the_same(value, original);
}

// What torch alone would refuse, and what a note tells of.
void refuse_stale(SavedValue& value, const Policy& policy) {
  TORCH_CHECK(policy,
              "one of the variables needed for gradient computation has been modified by an inplace operation: it is at "
              "version ",
              version_of(value.value), "; expected version ", value.version, " instead");
  if (seen_beside(&value) && !value.note) {
    policy.on_version(&value);
  }
  if (stale(&value) || value.lost) {
    policy.on_stale(&value);
  }
}

} // namespace

void saves(SavedValue& value) {
  if (const Policy policy(value.policy.get()); policy) {
    judge_own_write(value, policy);
    fingerprint(value, policy);
  }
  if (!value.released && !value.extents.empty()) {
    ledger().add(&value);
  }
}

at::Tensor asked_for(SavedValue& value) {
  const Policy policy(value.policy.get());
  value.unpacked_by = torch::autograd::get_current_node().get();
  const bool by_backward = value.unpacked_by != nullptr; // grad_fn._saved_self is none
  if (const at::Tensor original(value.original.lock()); original.defined() && !value.lost) {
    TORCH_CHECK(
        !value.had_node || has_node(original.unsafeGetTensorImpl()),
        "Trying to use a saved tensor that has been detached in-place, i.e. with .detach_(). This is not supported, please "
        "use out-of-place `.detach()` instead");
    if (!seen_beside(&value) && exchanged(&value, original.unsafeGetTensorImpl())) {
      value.unpacked += by_backward;
      const auto now = original.tensor_data();
      return policy ? THPVariable_Unpack(policy.on_exchange(&value, now).get()) : now;
    }
  }
  if (stale(&value) || value.lost) {
    refuse_stale(value, policy);
  }
  if (!value.fingerprints.empty()) {
    compare_fingerprints(&value, policy);
  }
  value.unpacked += by_backward;
  return value.value;
}

at::Tensor original_of(const SavedValue& value, const at::Tensor& given) {
  at::Tensor original(value.original.lock());
  const bool same = original.defined() && !stale(&value) && strided(original.unsafeGetTensorImpl()) &&
                    strided(given.unsafeGetTensorImpl()) &&
                    see_the_same(original.unsafeGetTensorImpl(), given.unsafeGetTensorImpl());
  return same ? original : at::Tensor();
}

} // namespace safe_inplace::guard
