#include "counts.h"

#include <atomic>
#include <iterator>

namespace safe_inplace {

namespace {

constexpr const char* names[] = {
    "view.own",          "view.base held",      "view.memory held",      "view.part of base",
    "view.another kind", "view.hooks",          "view.gradient",         "view.left to torch",
    "result.taken over", "result.no temporary", "result.another layout", "result.memory held",
};
static_assert(std::size(names) == kEvents);

constinit std::array<std::atomic<uint64_t>, kEvents> counted = {};

} // namespace

const char* name_of(Event event) {
  return names[size_t(event)];
}

void count(Event event) {
  counted[size_t(event)].fetch_add(1, std::memory_order_relaxed);
}

std::array<uint64_t, kEvents> counts() {
  std::array<uint64_t, kEvents> values;
  for (size_t i = 0; i < kEvents; ++i) {
    values[i] = counted[i].load(std::memory_order_relaxed);
  }
  return values;
}

void reset_counts() {
  for (auto& value : counted) {
    value.store(0, std::memory_order_relaxed);
  }
}

} // namespace safe_inplace
