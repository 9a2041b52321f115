// What runs, and where that was called.
#include "guard/running.h"

#include <memory>

namespace safe_inplace::guard {

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

} // namespace

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

} // namespace safe_inplace::guard
