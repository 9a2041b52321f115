// Every live saved value, found by the memory that it lies in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>

#include <c10/core/StorageImpl.h>
#include <c10/util/SmallVector.h>
#include <c10/util/flat_hash_map.h>

#include "guard/saved_value.h"

namespace safe_inplace::guard {

// Memory that torch has not allocated (NumPy, DLPack, shared memory) may have other storages over it.
inline bool borrowed(const c10::StorageImpl* storage) {
  return storage->allocator() == nullptr;
}

inline int64_t bytes_of(const c10::StorageImpl* storage) {
  return storage->sym_nbytes().maybe_as_int().value_or(0);
}

// Every live saved value by the storage it lies in: an address is another's as soon as memory is given back. Changed with
// the GIL held and the mutex locked; read with either. The GIL is never taken with the mutex locked. A saved value holds
// its storage, so a key stays true while it is here.
struct Ledger {
  std::mutex mutex;
  ska::flat_hash_map<const c10::StorageImpl*, c10::SmallVector<SavedValue*, 3>> by_storage;
  std::multimap<const char*, const c10::StorageImpl*> borrowed_at;
  std::atomic<size_t> size{0};

  void add(SavedValue* entry);
  void remove(SavedValue* entry);

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

  bool has_near(c10::ArrayRef<Extent> extents);

  // A storage has another size now: values that reach past its end are gone.
  void resized(const c10::StorageImpl* storage);
};

Ledger& ledger();

} // namespace safe_inplace::guard
