// What differs between the supported versions of torch.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/version.h>

#include <memory>

namespace safe_inplace {

// Graph nodes are held by shared_ptr up to torch 2.12 and by intrusive_ptr from 2.13 on.
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
template <class T>
using NodePtr = std::shared_ptr<T>;
template <class T, class... Args>
NodePtr<T> make_node(Args&&... args) {
  return NodePtr<T>(new T(std::forward<Args>(args)...), torch::autograd::deleteNode);
}
#else
template <class T>
using NodePtr = c10::intrusive_ptr<T>;
template <class T, class... Args>
NodePtr<T> make_node(Args&&... args) {
  return c10::make_intrusive<T>(std::forward<Args>(args)...);
}
#endif

} // namespace safe_inplace
