// Fingerprints of what is saved, and of what is there when backward asks for it.
#include "guard/fingerprints.h"

#include "digest.h"
#include "guard/ledger.h"

namespace safe_inplace::guard {

std::vector<at::Tensor> fingerprints_of(const at::Tensor& tensor, const Policy& policy) {
  std::vector<at::Tensor> fingerprints;
  const auto fingerprint = [&](const at::Tensor& part) {
    if (part.layout() != at::kStrided || !part.has_storage() || part.is_meta()) {
      return;
    }
    if (!can_digest(part)) {
      policy.no_digest(part);
      return;
    }
    const auto extent = extent_of(part);
    const bool there = extent && extent->end <= bytes_of(part.unsafeGetTensorImpl()->unsafe_storage().unsafeGetStorageImpl());
    fingerprints.push_back(there ? digest_on_device(part) : at::Tensor());
  };
  each_plain(tensor, policy, [&](const at::Tensor& one) { each_part(one, fingerprint); }, Which::arrived);
  return fingerprints;
}

void compare_fingerprints(const SavedValue* entry, const Policy& policy) {
  const auto now = fingerprints_of(entry->value, policy);
  for (size_t i = 0; i < now.size(); ++i) {
    const auto& then = entry->fingerprints[i];
    if (!now[i].defined() || !then.defined()) {
      continue;
    }
    if (!now[i].is_cpu()) {
      policy.compare(entry, then, now[i]);
    } else if (now[i].const_data_ptr<int64_t>()[0] != then.const_data_ptr<int64_t>()[0]) {
      policy.on_mismatch(entry);
      return;
    }
  }
}

} // namespace safe_inplace::guard
