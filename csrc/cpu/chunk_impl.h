// Sixteen elements of a row in the arithmetic dtype. Included by rows_impl.h: no include guard, one inclusion per instruction set.

// Sums are taken in this many lanes: their order is the same for all instruction sets.
constexpr int kLanes = 16;

// A chunk of a row in the arithmetic dtype. The formulas take it like one number.
template <class M>
struct Chunk {
  M lanes[kLanes];
};

template <class V>
inline constexpr bool is_chunk = false;
template <class M>
inline constexpr bool is_chunk<Chunk<M>> = true;

template <class M>
SI_INLINE Chunk<M> operator+(const Chunk<M>& a, const Chunk<M>& b) {
  Chunk<M> sum;
  for (int lane = 0; lane < kLanes; ++lane) {
    sum.lanes[lane] = a.lanes[lane] + b.lanes[lane];
  }
  return sum;
}

template <class M>
SI_INLINE Chunk<M> operator*(const Chunk<M>& a, const Chunk<M>& b) {
  Chunk<M> product;
  for (int lane = 0; lane < kLanes; ++lane) {
    product.lanes[lane] = a.lanes[lane] * b.lanes[lane];
  }
  return product;
}

using safe_inplace::conjugate;
template <class M>
SI_INLINE Chunk<M> conjugate(const Chunk<M>& a) {
  Chunk<M> result;
  for (int lane = 0; lane < kLanes; ++lane) {
    result.lanes[lane] = conjugate(a.lanes[lane]);
  }
  return result;
}

template <class M>
SI_INLINE void spread(Chunk<M>& to, M value) {
  for (int lane = 0; lane < kLanes; ++lane) {
    to.lanes[lane] = value;
  }
}

template <class M, class S>
SI_INLINE void read(Chunk<M>& to, const S* from) {
  for (int lane = 0; lane < kLanes; ++lane) {
    to.lanes[lane] = widen(from[lane]);
  }
}

template <class M>
SI_INLINE void write(M* to, const Chunk<M>& from) {
  for (int lane = 0; lane < kLanes; ++lane) {
    to[lane] = from.lanes[lane];
  }
}

#if defined(SI_F16C)
// float32 in registers: the compiler vectorises neither the conversion of half nor loops over arrays that it has to
// keep in registers. 256 bits with AVX-512 too: in place, past the last cache, loads and stores of 512 bits reach 0.8 of
// the bytes per second (Zen 4).
typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
constexpr int kWidth = 8;
constexpr int kRegisters = kLanes / kWidth;

template <>
struct Chunk<float> {
  Floats registers[kRegisters];
};

SI_INLINE Chunk<float> operator+(const Chunk<float>& a, const Chunk<float>& b) {
  Chunk<float> sum;
  for (int i = 0; i < kRegisters; ++i) {
    sum.registers[i] = a.registers[i] + b.registers[i];
  }
  return sum;
}

SI_INLINE Chunk<float> operator*(const Chunk<float>& a, const Chunk<float>& b) {
  Chunk<float> product;
  for (int i = 0; i < kRegisters; ++i) {
    product.registers[i] = a.registers[i] * b.registers[i];
  }
  return product;
}

SI_INLINE Chunk<float> multiply_add(const Chunk<float>& a, const Chunk<float>& b, const Chunk<float>& c) {
  Chunk<float> result;
  for (int i = 0; i < kRegisters; ++i) {
    result.registers[i] = _mm256_fmadd_ps(a.registers[i], b.registers[i], c.registers[i]);
  }
  return result;
}

SI_INLINE Chunk<float> conjugate(const Chunk<float>& a) {
  return a;
}

SI_INLINE void spread(Chunk<float>& to, float value) {
  for (int i = 0; i < kRegisters; ++i) {
    to.registers[i] = value - Floats{}; // minus: adding zero would lose the sign of -0
  }
}

SI_INLINE Floats widen_register(const float* from) {
  Floats out;
  memcpy(&out, from, sizeof out);
  return out;
}

SI_INLINE Floats widen_register(const BFloat16* from) {
  __m128i in;
  memcpy(&in, from, sizeof in);
  return Floats(Words(_mm256_cvtepu16_epi32(in)) << 16);
}

SI_INLINE Floats widen_register(const Half* from) {
  __m128i in;
  memcpy(&in, from, sizeof in);
  return _mm256_cvtph_ps(in);
}

template <class S>
SI_INLINE void read(Chunk<float>& to, const S* from) {
  for (int i = 0; i < kRegisters; ++i) {
    to.registers[i] = widen_register(from + i * kWidth);
  }
}

SI_INLINE void write(float* to, const Chunk<float>& from) {
  // One by one: a copy of the whole goes through memory.
  for (int i = 0; i < kRegisters; ++i) {
    memcpy(to + i * kWidth, &from.registers[i], sizeof(Floats));
  }
}

SI_INLINE void write(BFloat16* to, const Chunk<float>& from) {
  static_assert(kRegisters == 2);
  // One comparison for both registers; NaN are rare enough for a branch.
  const Floats unordered = _mm256_cmp_ps(from.registers[0], from.registers[1], _CMP_UNORD_Q);
  if (__builtin_expect(_mm256_movemask_ps(unordered) != 0, 0)) {
    for (int lane = 0; lane < kLanes; ++lane) {
      to[lane] = narrow<BFloat16>(from.registers[lane / kWidth][lane % kWidth]);
    }
    return;
  }
  const Words first = round_to_bfloat16(Words(from.registers[0]));
  const Words second = round_to_bfloat16(Words(from.registers[1]));
#if defined(SI_AVX512)
  // The upper half of every word.
  const __m256i upper = _mm256_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  const __m256i packed = _mm256_permutex2var_epi16(__m256i(first), upper, __m256i(second));
#else
  const __m256i pairs = _mm256_packus_epi32(__m256i(first >> 16), __m256i(second >> 16));
  const __m256i packed = _mm256_permute4x64_epi64(pairs, _MM_SHUFFLE(3, 1, 2, 0));
#endif
  memcpy(to, &packed, sizeof packed);
}

SI_INLINE void write(Half* to, const Chunk<float>& from) {
  for (int i = 0; i < kRegisters; ++i) {
    const __m128i out = _mm256_cvtps_ph(from.registers[i], _MM_FROUND_TO_NEAREST_INT);
    memcpy(to + i * kWidth, &out, sizeof out);
  }
}

template <class T>
inline constexpr bool in_chunks = std::is_same_v<OpMath<T>, float>;
#else
// Plain loops, which the compiler vectorises as far as it can.
template <class T>
inline constexpr bool in_chunks = false;
#endif
