// What one 64-bit word adds to a digest. Shared by host and device.
#pragma once

#include "numeric.h"

namespace safe_inplace {

// Terms are summed modulo 2^64, so neither threads nor blocks need an order. The product of two 32-bit halves is the one
// wide multiplication that every vector unit has; the keys make a word's place count, the word itself catches the one
// case that a product hides, the other factor being zero.
SI_INLINE uint64_t digest_term(uint64_t word, uint64_t index) {
  const auto place = static_cast<uint32_t>(index);
  const auto low = static_cast<uint32_t>(word) + (place * 0x9E3779B1u + 0x7F4A7C15u);
  const auto high = static_cast<uint32_t>(word >> 32) + (place * 0x85EBCA77u + 0xC2B2AE3Du);
  return static_cast<uint64_t>(low) * high + word;
}

SI_INLINE uint64_t digest_finish(uint64_t sum, uint64_t bytes) {
  uint64_t h = sum ^ (bytes * 0x9E3779B97F4A7C15ull);
  h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93ull;
  h = (h ^ (h >> 32)) * 0xD6E8FEB86659FD93ull;
  return h ^ (h >> 32);
}

} // namespace safe_inplace
