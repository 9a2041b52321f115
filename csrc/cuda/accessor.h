// Loads and stores of a thread: how the elements of a vector come into registers and leave them. Loads only fetch bits;
// converting them waits until every load of the thread has been issued.
#pragma once

#include "params.h"

#if !defined(__CUDACC__)
#include <stdexcept>
#include <vector>
#endif

namespace safe_inplace::cuda {

SI_INLINE void check_alignment([[maybe_unused]] const void* address, [[maybe_unused]] int bytes) {
#if !defined(__CUDACC__)
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    throw std::logic_error("misaligned access in a simulated CUDA kernel");
  }
#endif
}

#if !defined(__CUDACC__)
// Memory whose loads a test counts, byte by byte.
struct Watched {
  uintptr_t begin = 0;
  std::vector<uint8_t> loads;
};
inline Watched watched;
#endif

SI_INLINE void check_load(const void* address, int bytes) {
  check_alignment(address, bytes);
#if !defined(__CUDACC__)
  const uintptr_t at = reinterpret_cast<uintptr_t>(address) - watched.begin;
  for (size_t i = 0; at < watched.loads.size() && i < size_t(bytes); ++i) {
    ++watched.loads[at + i];
  }
#endif
}

SI_INLINE void load_16_bytes(const char* address, uint32_t* words) {
  check_load(address, 16);
#if defined(__CUDA_ARCH__)
  const uint4 bits = *reinterpret_cast<const uint4*>(address);
  words[0] = bits.x;
  words[1] = bits.y;
  words[2] = bits.z;
  words[3] = bits.w;
#else
  memcpy(words, address, 16);
#endif
}

SI_INLINE void load_8_bytes(const char* address, uint32_t* words) {
  check_load(address, 8);
#if defined(__CUDA_ARCH__)
  const uint2 bits = *reinterpret_cast<const uint2*>(address);
  words[0] = bits.x;
  words[1] = bits.y;
#else
  memcpy(words, address, 8);
#endif
}

SI_INLINE void store_16_bytes(char* address, const uint32_t* words) {
  check_alignment(address, 16);
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint4*>(address) = make_uint4(words[0], words[1], words[2], words[3]);
#else
  memcpy(address, words, 16);
#endif
}

SI_INLINE void store_8_bytes(char* address, const uint32_t* words) {
  check_alignment(address, 8);
#if defined(__CUDA_ARCH__)
  *reinterpret_cast<uint2*>(address) = make_uint2(words[0], words[1]);
#else
  memcpy(address, words, 8);
#endif
}

// A vector of 16 bytes, of 32 (float beside 16 bits), or of 8 (the other way round).
template <int Bytes>
SI_INLINE void load_bytes(const char* address, uint32_t* words) {
  if constexpr (Bytes == 8) {
    load_8_bytes(address, words);
  } else {
    SI_UNROLL
    for (int b = 0; b < Bytes / 16; ++b) {
      load_16_bytes(address + 16 * b, words + 4 * b);
    }
  }
}

template <int Bytes>
SI_INLINE void store_bytes(char* address, const uint32_t* words) {
  if constexpr (Bytes == 8) {
    store_8_bytes(address, words);
  } else {
    SI_UNROLL
    for (int b = 0; b < Bytes / 16; ++b) {
      store_16_bytes(address + 16 * b, words + 4 * b);
    }
  }
}

// Calls visit with an element of the dtype, which is that of T or, where `Mixed`, of what stands beside it.
template <class T, bool Mixed, class Visit>
SI_INLINE void with_element([[maybe_unused]] DType dtype, const Visit& visit) {
  if constexpr (Mixed && sizeof(T) == 2) {
    if (dtype == DType::Float) {
      return visit(float{});
    }
  } else if constexpr (Mixed) {
    if (dtype == DType::Half) {
      return visit(Half{});
    }
    if (dtype == DType::BFloat16) {
      return visit(BFloat16{});
    }
  }
  visit(T{});
}

// The same where only the bits matter: all elements of 16 bits are one.
template <class T, bool Mixed, class Visit>
SI_INLINE void with_bits(DType dtype, const Visit& visit) {
  if constexpr (Mixed && sizeof(T) == 4) {
    dtype == DType::Float ? visit(float{}) : visit(Half{});
  } else {
    with_element<T, Mixed>(dtype, visit);
  }
}

// The bits of V elements of T, or of V floats where `Mixed` lets an accessor be of another dtype.
template <class T, int V, bool Mixed>
struct Bits {
  static constexpr bool mixed = Mixed;
  static constexpr int size = Mixed ? V : (V * int(sizeof(T)) + 3) / 4;
  uint32_t words[size];
};

template <class T>
SI_INLINE T element_of(const uint32_t* words, int j) {
  if constexpr (sizeof(T) == 2) {
    return T{uint16_t(words[j / 2] >> (16 * (j % 2)))};
  } else {
    constexpr int n = sizeof(T) / 4;
    T value;
    memcpy(&value, words + j * n, sizeof value);
    return value;
  }
}

template <class T>
SI_INLINE void put_element(uint32_t* words, int j, T value) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t bits = value.bits;
    words[j / 2] = j % 2 == 0 ? bits : words[j / 2] | bits << 16;
  } else {
    constexpr int n = sizeof(T) / 4;
    memcpy(words + j * n, &value, sizeof value);
  }
}

template <class T>
SI_INLINE T load_element(const void* data, uint64_t offset) {
  const T* address = static_cast<const T*>(data) + offset;
  check_load(address, sizeof(T));
  return *address;
}

template <class T>
SI_INLINE void store_element(void* data, uint64_t offset, T value) {
  T* address = static_cast<T*>(data) + offset;
  check_alignment(address, sizeof(T));
  *address = value;
}

template <class T, int V, AccessMode mode, class M>
SI_INLINE void fetch_as(const Accessor<M>& accessor, uint64_t offset, uint32_t* words) {
  if constexpr (V > 1 && mode == AccessMode::Vector) {
    const char* address = static_cast<const char*>(accessor.data) + offset * sizeof(T);
    load_bytes<V* int(sizeof(T))>(address, words);
  } else if constexpr (V == 1 || mode == AccessMode::Broadcast) {
    put_element(words, 0, load_element<T>(accessor.data, offset));
  } else {
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      put_element(words, j, load_element<T>(accessor.data, offset + j * accessor.step));
    }
  }
}

// Brings what was fetched into one form, whatever the mode: V elements of T, or V floats where `Mixed`. After it the
// elements are taken one by one, which costs fewer registers than a converted copy of every vector. A number among
// the elements of a 16-bit T is one of them (operands that are any number make a launch Mixed).
template <class T, int V, bool Mixed, class M>
SI_INLINE void settle(const Accessor<M>& accessor, Bits<T, V, Mixed>& bits) {
  if (accessor.mode == AccessMode::Number) {
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      if constexpr (Mixed) {
        put_element(bits.words, j, float(accessor.number));
      } else {
        put_element(bits.words, j, narrow<T>(accessor.number));
      }
    }
    return;
  }
  if constexpr (Mixed) {
    if (accessor.mode == AccessMode::Absent) {
      return;
    }
    with_element<T, true>(accessor.dtype, [&](auto element) {
      using E = decltype(element);
      if (sizeof(E) == 2 || (V > 1 && accessor.mode == AccessMode::Broadcast)) {
        // From the end: a float takes the place of two elements.
        const E same = element_of<E>(bits.words, 0);
        SI_UNROLL
        for (int j = V - 1; j >= 0; --j) {
          put_element(bits.words, j, float(widen(accessor.mode == AccessMode::Broadcast ? same : element_of<E>(bits.words, j))));
        }
      }
    });
  } else if (V > 1 && accessor.mode == AccessMode::Broadcast) {
    const T same = element_of<T>(bits.words, 0);
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      put_element(bits.words, j, same);
    }
  }
}

template <class T, int V, bool Mixed>
SI_INLINE OpMath<T> settled(const Bits<T, V, Mixed>& bits, int j) {
  if constexpr (Mixed) {
    return element_of<float>(bits.words, j);
  } else {
    return widen(element_of<T>(bits.words, j));
  }
}

// One vector, whatever the mode.
template <class T, int V, bool Mixed, class M>
SI_INLINE Bits<T, V, Mixed> load(const Accessor<M>& accessor, uint64_t offset) {
  Bits<T, V, Mixed> bits = {};
  const auto fetch = [&](auto tag) {
    using E = decltype(tag);
    if (V == 1 || accessor.mode == AccessMode::Vector) {
      fetch_as<E, V, AccessMode::Vector>(accessor, offset, bits.words);
    } else if (accessor.mode == AccessMode::Broadcast) {
      fetch_as<E, V, AccessMode::Broadcast>(accessor, offset, bits.words);
    } else {
      fetch_as<E, V, AccessMode::Elements>(accessor, offset, bits.words);
    }
  };
  if (accessor.mode != AccessMode::Number) {
    with_bits<T, Mixed>(accessor.dtype, fetch);
  }
  settle(accessor, bits);
  return bits;
}

template <class T, int V, class M>
SI_INLINE void store_as(const Accessor<M>& accessor, uint64_t offset, const M (&values)[V]) {
  if (V > 1 && accessor.mode == AccessMode::Vector) {
    uint32_t words[V * sizeof(T) / 4 > 0 ? V * sizeof(T) / 4 : 1];
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      put_element(words, j, narrow<T>(values[j]));
    }
    char* address = static_cast<char*>(accessor.data) + offset * sizeof(T);
    store_bytes<V* int(sizeof(T))>(address, words);
  } else {
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      store_element(accessor.data, offset + j * accessor.step, narrow<T>(values[j]));
    }
  }
}

template <class T, bool Mixed, int V, class M>
SI_INLINE void store(const Accessor<M>& accessor, uint64_t offset, const M (&values)[V]) {
  // Operands that are not read do not make a launch Mixed, and their gradients may be float beside 16 bits all the same.
  with_element<T, Mixed || sizeof(T) == 2>(accessor.dtype,
                                           [&](auto element) { store_as<decltype(element), V>(accessor, offset, values); });
}

} // namespace safe_inplace::cuda
