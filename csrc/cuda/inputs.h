// What a thread has read of one vector, and what it computes from that: shared by all kernels that evaluate an op.
#pragma once

#include <type_traits>
#include <utility>

#include "accessor.h"

namespace safe_inplace::cuda {

// What a thread has read of one vector.
template <class Functor, class T, bool Mixed, int V>
struct Inputs {
  using M = OpMath<T>;
  // Beside 16 bits only an operand is float, and, for which there are no vectors, what a hook has put in a kept value's place.
  static constexpr bool narrow_beside = Mixed && sizeof(T) == 4;
  Bits<T, V, narrow_beside> main;
  Bits<T, V, narrow_beside || (Mixed && V == 1)> saved;
  Bits<T, V, Mixed> first, second;

  // Unless `Strided`, no tensor is reached element by element.
  template <bool Strided = true, int U, class Offset>
  SI_INLINE static void fetch_all(const Accessor<M>* accessors, const bool (&live)[U], const uint64_t* base,
                                  const Offset (&offsets)[U][kIns], Inputs (&inputs)[U]) {
    fetch<Strided, &Inputs::main>(accessors[Main], live, base, offsets, Main, inputs);
    if constexpr (Functor::reads_saved) {
      fetch<Strided, &Inputs::saved>(accessors[Saved], live, base, offsets, Saved, inputs);
    }
    if constexpr (Functor::reads_first) {
      fetch<Strided, &Inputs::first>(accessors[First], live, base, offsets, First, inputs);
    }
    if constexpr (Functor::reads_second) {
      fetch<Strided, &Inputs::second>(accessors[Second], live, base, offsets, Second, inputs);
    }
  }

  SI_INLINE void settle_all(const Accessor<M>* accessors) {
    settle(accessors[Main], main);
    if constexpr (Functor::reads_saved) {
      settle(accessors[Saved], saved);
    }
    if constexpr (Functor::reads_first) {
      settle(accessors[First], first);
    }
    if constexpr (Functor::reads_second) {
      settle(accessors[Second], second);
    }
  }

  SI_INLINE void take(int j, M (&in)[kIns]) const {
    in[Main] = settled(main, j);
    if constexpr (Functor::reads_saved) {
      in[Saved] = settled(saved, j);
    }
    if constexpr (Functor::reads_first) {
      in[First] = settled(first, j);
    }
    if constexpr (Functor::reads_second) {
      in[Second] = settled(second, j);
    }
  }

  // Element j of the value that belongs to Out0 + `out`.
  SI_INLINE M compute(int out, int op, M parameter, int j) const {
    M in[kIns] = {};
    take(j, in);
    return Functor::compute(out, op, parameter, in);
  }

  // The same of what is summed.
  SI_INLINE M term(int out, int op, int j) const {
    M in[kIns] = {};
    take(j, in);
    return Functor::term(out, op, in);
  }

  SI_INLINE void compute_all(int out, int op, M parameter, M (&values)[V]) const {
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      values[j] = compute(out, op, parameter, j);
    }
  }

 private:
  template <bool Strided, auto Member, int U, class Offset>
  SI_INLINE static void fetch(const Accessor<M>& accessor, const bool (&live)[U], const uint64_t* base,
                              const Offset (&offsets)[U][kIns], int slot, Inputs (&inputs)[U]) {
    if (accessor.mode == AccessMode::Absent || accessor.mode == AccessMode::Number) {
      return;
    }
    with_bits<T, std::decay_t<decltype(std::declval<Inputs&>().*Member)>::mixed>(accessor.dtype, [&](auto element) {
      fetch_as<Strided, Member, decltype(element)>(accessor, live, base, offsets, slot, inputs);
    });
  }

  // The branch on the mode is outside, so that the loads of one tensor follow each other.
  template <bool Strided, auto Member, class E, int U, class Offset>
  SI_INLINE static void fetch_as(const Accessor<M>& accessor, const bool (&live)[U], const uint64_t* base,
                                 const Offset (&offsets)[U][kIns], int slot, Inputs (&inputs)[U]) {
    if (V == 1 || accessor.mode == AccessMode::Vector) {
      fetch_as<Member, E, AccessMode::Vector>(accessor, live, base, offsets, slot, inputs);
    } else if (!Strided || accessor.mode == AccessMode::Broadcast) {
      fetch_as<Member, E, AccessMode::Broadcast>(accessor, live, base, offsets, slot, inputs);
    } else {
      fetch_as<Member, E, AccessMode::Elements>(accessor, live, base, offsets, slot, inputs);
    }
  }

  template <auto Member, class E, AccessMode mode, int U, class Offset>
  SI_INLINE static void fetch_as(const Accessor<M>& accessor, const bool (&live)[U], const uint64_t* base,
                                 const Offset (&offsets)[U][kIns], int slot, Inputs (&inputs)[U]) {
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      if (live[u]) {
        cuda::fetch_as<E, V, mode>(accessor, base[slot] + offsets[u][slot], (inputs[u].*Member).words);
      }
    }
  }
};

} // namespace safe_inplace::cuda
