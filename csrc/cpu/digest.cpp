#include <atomic>
#include <cstring>

#include <ATen/Parallel.h>

#include "../digest_mix.h"
#include "kernels.h"

#if defined(__x86_64__)
#define SAFE_INPLACE_DIGEST_CLONES __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define SAFE_INPLACE_DIGEST_CLONES
#endif

namespace safe_inplace {
namespace {

constexpr int64_t kWord = sizeof(uint64_t);
constexpr int64_t kGrain = 1 << 15; // words: below this a second thread costs more than it brings

SAFE_INPLACE_DIGEST_CLONES uint64_t sum_of_terms(const char* data, int64_t first, int64_t last) {
  uint64_t sum = 0;
  for (int64_t i = first; i < last; ++i) {
    uint64_t word;
    std::memcpy(&word, data + i * kWord, kWord); // a view may start at any byte
    sum += digest_term(word, static_cast<uint64_t>(i));
  }
  return sum;
}

} // namespace

void digest_on_cpu(const void* pointer, int64_t bytes, const at::Tensor& result) {
  const auto* data = static_cast<const char*>(pointer);
  const int64_t words = bytes / kWord;
  std::atomic<uint64_t> total{0};
  at::parallel_for(0, words, kGrain, [&](int64_t first, int64_t last) {
    total.fetch_add(sum_of_terms(data, first, last), std::memory_order_relaxed);
  });
  uint64_t sum = total.load();
  if (bytes % kWord != 0) {
    uint64_t word = 0;
    std::memcpy(&word, data + words * kWord, static_cast<size_t>(bytes % kWord));
    sum += digest_term(word, static_cast<uint64_t>(words));
  }
  *result.mutable_data_ptr<int64_t>() = static_cast<int64_t>(digest_finish(sum, static_cast<uint64_t>(bytes)));
}

} // namespace safe_inplace
