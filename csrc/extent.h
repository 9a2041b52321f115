// Which bytes a strided tensor occupies, and whether two of them share one.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace safe_inplace {

struct Extent {
  struct Dimension {
    int64_t stride; // bytes
    int64_t size;
  };

  // Names the memory, wherever it moves to. Never read through: the storage may be gone, and then names nothing.
  const c10::StorageImpl* storage;
  const char* base; // where it began when this was made: what tells another storage over the same memory (NumPy, DLPack)
  int64_t begin; // bytes after base
  int64_t end;
  int64_t run; // bytes in one unbroken block
  std::vector<Dimension> blocks; // how the block is repeated, outermost first; empty where the bytes are one block

  int64_t count() const;
};

// None for a tensor without memory: no storage, a meta device. One without elements has an extent of no bytes: its version
// can rise all the same.
std::optional<Extent> extent_of(const at::Tensor& tensor);

bool overlap(const Extent& a, const Extent& b);

// Whether two indices of the tensor name one element. Exact, where at::has_internal_overlap finds it too hard to tell; beyond a
// million steps, which no layout was seen to take, the answer is yes.
bool overlaps_itself(const at::Tensor& tensor);

} // namespace safe_inplace
