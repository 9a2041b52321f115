#include "extent.h"

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <numeric>

namespace safe_inplace {
namespace {

// Enumerating the blocks of one side is exact and linear. Beyond this many an overlap is assumed: a report too many,
// never one too few.
constexpr int64_t kMostBlocks = 1 << 20;

// Does [begin, end) meet a block of `extent`? Dimensions are in order of falling stride. Where each one steps over
// all that is inside it (any tensor that is not overlapping in itself) at most two indices per dimension can reach.
bool meets(const Extent& extent, size_t dimension, int64_t offset, int64_t begin, int64_t end) {
  if (dimension == extent.blocks.size()) {
    return offset < end && begin < offset + extent.run;
  }
  int64_t inside = extent.run;
  for (size_t d = dimension + 1; d < extent.blocks.size(); ++d) {
    inside += extent.blocks[d].stride * (extent.blocks[d].size - 1);
  }
  const auto [stride, size] = extent.blocks[dimension];
  // offset + i * stride < end  and  offset + i * stride + inside > begin
  const int64_t last = std::min(size - 1, end - 1 < offset ? -1 : (end - 1 - offset) / stride);
  const int64_t reach = begin - offset - inside;
  const int64_t first = reach < 0 ? 0 : reach / stride + 1;
  for (int64_t i = first; i <= last; ++i) {
    if (meets(extent, dimension + 1, offset + i * stride, begin, end)) {
      return true;
    }
  }
  return false;
}

template <class F>
bool any_block(const Extent& extent, size_t dimension, int64_t offset, const F& test) {
  if (dimension == extent.blocks.size()) {
    return test(offset);
  }
  const auto [stride, size] = extent.blocks[dimension];
  for (int64_t i = 0; i < size; ++i) {
    if (any_block(extent, dimension + 1, offset + i * stride, test)) {
      return true;
    }
  }
  return false;
}

// Columns of one matrix, even and odd rows: where every stride is a multiple of one period, the blocks of both sides
// keep their places within it.
bool apart_in_period(const Extent& a, const Extent& b) {
  int64_t period = 0;
  for (const auto* extent : {&a, &b}) {
    for (const auto& dimension : extent->blocks) {
      period = std::gcd(period, dimension.stride);
    }
  }
  if (period == 0 || a.run + b.run > period) {
    return false;
  }
  const int64_t ahead = ((b.begin - a.begin) % period + period) % period;
  return ahead >= a.run && ahead + b.run <= period;
}

// Is there a step, other than none at all, that leads from an element back to itself? `offset` is where the dimensions before
// this one have led; those from here on must take it back to 0. They are in order of falling stride, so that few steps can.
class ReturningStep {
 public:
  explicit ReturningStep(c10::ArrayRef<Extent::Dimension> dimensions) : dimensions_(dimensions) {}

  bool exists(size_t at = 0, int64_t offset = 0, bool moved = false) {
    if (at == dimensions_.size()) {
      return moved && offset == 0;
    }
    int64_t reach = 0;
    for (size_t d = at + 1; d < dimensions_.size(); ++d) {
      reach += dimensions_[d].stride * (dimensions_[d].size - 1);
    }
    const auto [stride, size] = dimensions_[at];
    // |offset + step * stride| <= reach
    const int64_t last = std::min(size - 1, floor_divide(reach - offset, stride));
    for (int64_t step = std::max(1 - size, -floor_divide(reach + offset, stride)); step <= last; ++step) {
      if (--budget_ == 0 || exists(at + 1, offset + step * stride, moved || step != 0)) {
        return true;
      }
    }
    return false;
  }

 private:
  static int64_t floor_divide(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

  c10::ArrayRef<Extent::Dimension> dimensions_;
  int64_t budget_ = kMostBlocks;
};

} // namespace

bool overlaps_itself(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense() || tensor.numel() <= 1) {
    return false;
  }
  c10::SmallVector<Extent::Dimension, 6> dimensions; // in order of falling stride
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 1) {
      continue;
    }
    if (strides[d] == 0) {
      return true;
    }
    const auto* place =
        std::find_if(dimensions.begin(), dimensions.end(), [&](const auto& other) { return other.stride < strides[d]; });
    dimensions.insert(dimensions.begin() + (place - dimensions.begin()), {strides[d], sizes[d]});
  }
  // Nearly always each one steps over all that is inside it.
  int64_t inside = 0;
  const bool apart = std::all_of(dimensions.rbegin(), dimensions.rend(), [&](const auto& dimension) {
    const bool steps_over = dimension.stride > inside;
    inside += dimension.stride * (dimension.size - 1);
    return steps_over;
  });
  return !apart && ReturningStep(dimensions).exists();
}

int64_t Extent::count() const {
  int64_t count = 1;
  for (const auto& dimension : blocks) {
    count *= dimension.size;
  }
  return count;
}

std::optional<Extent> extent_of(const at::Tensor& tensor) {
  const auto* impl = tensor.unsafeGetTensorImpl();
  if (!impl->has_storage()) {
    return std::nullopt;
  }
  const auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  const auto* base = static_cast<const char*>(storage->data());
  if (impl->numel() == 0) {
    return Extent{storage, base, 0, 0, 0, {}};
  }
  if (base == nullptr) {
    return std::nullopt;
  }
  const auto item = static_cast<int64_t>(impl->itemsize());
  Extent extent{storage, base, impl->storage_offset() * item, 0, item, {}};
  if (impl->is_non_overlapping_and_dense()) {
    extent.run = impl->numel() * item;
  } else {
    for (int64_t d = 0; d < impl->dim(); ++d) {
      if (impl->size(d) > 1 && impl->stride(d) > 0) {
        extent.blocks.push_back({impl->stride(d) * item, impl->size(d)});
      }
    }
    std::stable_sort(extent.blocks.begin(), extent.blocks.end(),
                     [](const auto& a, const auto& b) { return a.stride > b.stride; });
    while (!extent.blocks.empty() && extent.blocks.back().stride <= extent.run) {
      const auto [stride, size] = extent.blocks.back();
      extent.run += stride * (size - 1);
      extent.blocks.pop_back();
    }
  }
  extent.end = extent.begin + extent.run;
  for (const auto& dimension : extent.blocks) {
    extent.end += dimension.stride * (dimension.size - 1);
  }
  return extent;
}

bool overlap(const Extent& a, const Extent& b) {
  if (a.run == 0 || b.run == 0) {
    return false;
  }
  if (a.storage != b.storage && a.base != b.base) {
    if (a.base == nullptr || b.base == nullptr || a.base + a.end <= b.base + b.begin || b.base + b.end <= a.base + a.begin) {
      return false;
    }
    Extent seen_from_a = b;
    seen_from_a.storage = a.storage;
    seen_from_a.begin += b.base - a.base;
    seen_from_a.end += b.base - a.base;
    return overlap(a, seen_from_a);
  }
  if (a.end <= b.begin || b.end <= a.begin) {
    return false;
  }
  if (a.blocks.empty() && b.blocks.empty()) {
    return true;
  }
  if (apart_in_period(a, b)) {
    return false;
  }
  const bool a_is_fewer = a.count() <= b.count();
  const Extent& fewer = a_is_fewer ? a : b;
  const Extent& other = a_is_fewer ? b : a;
  if (fewer.count() > kMostBlocks) {
    return true;
  }
  return any_block(fewer, 0, fewer.begin,
                   [&](int64_t offset) { return meets(other, 0, other.begin, offset, offset + fewer.run); });
}

} // namespace safe_inplace
