#include "backend.h"

#include <c10/core/TensorOptions.h>

#include <array>
#include <optional>

namespace safe_inplace {

namespace {

// Ready before the static initialisers that register run, in whatever order.
constinit std::array<std::optional<Backend>, size_t(c10::DeviceType::COMPILE_TIME_MAX_DEVICE_TYPES)> backends = {};
using Listener = void (*)(c10::DispatchKey);
constinit Listener listener = nullptr;

c10::DispatchKey key_of(c10::DeviceType device) {
  return c10::computeDispatchKey(std::nullopt, std::nullopt, device);
}

} // namespace

constinit c10::DispatchKeySet kernel_keys{c10::DispatchKey::ADInplaceOrView};

RegisterBackend::RegisterBackend(const Backend& backend) {
  auto& place = backends[size_t(backend.device)];
  const bool known = place.has_value();
  place = backend;
  if (known) {
    return;
  }
  const c10::DispatchKey key = key_of(backend.device);
  const c10::BackendComponent component = c10::toBackendComponent(key);
  kernel_keys = kernel_keys | c10::DispatchKeySet(key) | c10::getAutogradRelatedKeySetFromBackend(component) |
                c10::getAutocastRelatedKeySetFromBackend(component);
  if (listener != nullptr) {
    listener(key);
  }
}

const Backend* backend_of(c10::DeviceType device) {
  const auto& backend = backends[size_t(device)];
  return backend.has_value() ? &*backend : nullptr;
}

void for_each_backend(void (*function)(c10::DispatchKey)) {
  listener = function;
  for (const auto& backend : backends) {
    if (backend.has_value()) {
      function(key_of(backend->device));
    }
  }
}

} // namespace safe_inplace
