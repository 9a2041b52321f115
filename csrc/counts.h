// How often what a user cannot see went one way or the other: `safe_inplace.counts()`.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace safe_inplace {

// By groups; the names stand in counts.cpp in the same order.
enum class Event : uint8_t {
  // A recorded write to a view.
  ViewOwn,
  ViewBaseHeld,
  ViewMemoryHeld,
  ViewOfPart,
  ViewOfAnotherKind,
  ViewHooks,
  ViewGradient,
  ViewLeftToTorch,
  // A result out of place.
  ResultTakenOver,
  ResultNoTemporary,
  ResultOfAnotherLayout,
  ResultMemoryHeld,
  Count,
};

constexpr size_t kEvents = size_t(Event::Count);

const char* name_of(Event event);

// One more, from any thread.
void count(Event event);

std::array<uint64_t, kEvents> counts();
void reset_counts();

} // namespace safe_inplace
