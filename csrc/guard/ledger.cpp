// Entries come with a save and go with the node.
#include "guard/ledger.h"

#include <map>

namespace safe_inplace::guard {

void Ledger::add(SavedValue* entry) {
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

void Ledger::remove(SavedValue* entry) {
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

bool Ledger::has_near(c10::ArrayRef<Extent> extents) {
  const std::lock_guard<std::mutex> lock(mutex);
  bool any = false;
  for (const auto& extent : extents) {
    each_near(extent, [&](const auto&) { any = true; });
  }
  return any;
}

void Ledger::resized(const c10::StorageImpl* storage) {
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

Ledger& ledger() {
  static auto* instance = new Ledger(); // outlives the interpreter's last deallocations
  return *instance;
}

} // namespace safe_inplace::guard
