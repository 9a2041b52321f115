// The element-wise kernels, as functions of (parameters, block, thread): the bodies of __global__ functions on a device, and
// of loops over blocks and threads in the simulator.
//
// A kernel needs a functor (functors.h), a dtype and parameters, which the planner of its path cuts. To write the gradient of
// mul_ over rows that are whole vectors, float32:
//
//   using Kernel = Elementwise<BackwardFunctor<Mul>, float, /*Mixed=*/false, /*V=*/4, uint32_t>;
//   Problem problem;  // dtype, shape, and the tensors by slot:
//   ...               // the gradient in Main, the operand in First, the gradient of the input in Out0
//   auto params = plan_elementwise<float, uint32_t>(problem, 4, Kernel::U);
//   params.op = op_index<Mul>;
//   const auto blocks = ceil_divide(params.count, params.tile);
//   elementwise_kernel<Kernel><<<blocks, kThreads, 0, stream>>>(params);
//
// dispatch.h chooses among the kernels and does the rest.
#pragma once

#include "inputs.h"

namespace safe_inplace::cuda {

// One element-wise pass over vectors that do not cross rows (or over single elements, V = 1).
template <class Functor, class T, bool Mixed, int V, class I>
struct Elementwise {
  using Element = T;
  using M = OpMath<T>;
  using Params = ElementwiseParams<M, I>;
  static constexpr int U = kElementwiseUnroll<T, Mixed, V>;

  SI_INLINE static void run(const Params& p, uint32_t block, uint32_t thread) {
    const I begin = I(block) * p.tile;
    const I end = p.count - begin < p.tile ? p.count : begin + p.tile;
    I index[U];
    bool live[U];
    uint64_t offsets[U][kIns] = {};
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      index[u] = begin + u * kThreads + thread;
      live[u] = index[u] < end;
    }
    p.offset_calculator.template add_offsets<Main>(index, offsets);

    Inputs<Functor, T, Mixed, V> inputs[U];
    const uint64_t base[kIns] = {};
    inputs[0].fetch_all(p.accessors, live, base, offsets, inputs);
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      if (live[u]) {
        inputs[u].settle_all(p.accessors);
        // Walked once more: offsets kept since the loads would cost the registers of a third of the threads.
        uint64_t out_offsets[1][kOuts] = {};
        const I at[1] = {index[u]};
        p.offset_calculator.template add_offsets<Out0>(at, out_offsets);
        SI_UNROLL
        for (int out = 0; out < Functor::outs; ++out) {
          if (p.accessors[Out0 + out].mode != AccessMode::Absent) {
            M values[V];
            inputs[u].compute_all(out, p.op, p.parameter, values);
            store<T, Mixed>(p.accessors[Out0 + out], out_offsets[0][out], values);
          }
        }
      }
    }
  }
};

// The same where one vector for each thread is enough: short code, few registers, few parameters.
template <class Functor, class T, bool Mixed>
struct Small {
  using Element = T;
  using M = OpMath<T>;
  using Params = SmallParams<M>;
  static constexpr int V = kVector<T>;

  SI_INLINE static void run(const Params& p, uint32_t block, uint32_t thread) {
    const uint32_t index = block * kThreads + thread;
    if (index >= p.count) {
      return;
    }
    const uint32_t row = p.row.divide(index);
    const uint32_t column = (index - row * p.row.size) * V;
    const auto offset = [&](int slot) {
      return (p.modes[slot] == AccessMode::Vector ? column : 0) + uint64_t(row) * p.row_strides[slot];
    };
    Accessor<M> accessors[kIns];
    uint64_t offsets[1][kIns];
    SI_UNROLL
    for (int slot = 0; slot < kIns; ++slot) {
      const int operand = slot == First ? 0 : 1;
      accessors[slot] = {p.data[slot], 0, p.numbers[operand], p.modes[slot], p.dtypes[slot]};
      offsets[0][slot] = offset(slot);
    }
    const uint64_t base[kIns] = {};
    const bool live[1] = {true};
    Inputs<Functor, T, Mixed, V> inputs[1];
    inputs[0].template fetch_all<false>(accessors, live, base, offsets, inputs);
    inputs[0].settle_all(accessors);
    SI_UNROLL
    for (int out = 0; out < Functor::outs; ++out) {
      const int slot = Out0 + out;
      if (p.modes[slot] != AccessMode::Absent) {
        M values[V];
        inputs[0].compute_all(out, p.op, p.parameter, values);
        store<T, Mixed>(Accessor<M>{p.data[slot], 0, M{}, AccessMode::Vector, p.dtypes[slot]}, offset(slot), values);
      }
    }
  }
};

// The same over contiguous memory whose rows are no multiple of a vector, or do not start at one: every vector but the
// first and the last is whole, and may belong to two rows.
template <class Functor, class T>
struct Unaligned {
  using Element = T;
  using M = OpMath<T>;
  using Params = ElementwiseParams<M, uint32_t>;
  static constexpr bool Mixed = kMayMix<T>;
  static constexpr int V = kVector<T>;
  static constexpr int U = kUnalignedUnroll;

  // The elements of one vector: [from, to) of it exist, those before `turn` lie in the first row.
  struct Piece {
    bool live = false;
    int from = 0, to = 0, turn = 0;
    uint32_t start = 0; // index of element `from`
    int column = 0; // of element 0, if the row began early enough
    uint64_t rows[2][kSlots] = {};

    SI_INLINE bool whole() const { return to - from == V; }
    SI_INLINE uint64_t offset(int slot, uint64_t step, int j) const {
      return j < turn ? rows[0][slot] + uint64_t(column + j) * step : rows[1][slot] + uint64_t(j - turn) * step;
    }
  };

  SI_INLINE static Piece locate(const Params& p, uint32_t index, bool live) {
    Piece piece;
    piece.live = live;
    if (live) {
      const int64_t first = int64_t(index) * V - p.head;
      const int64_t left = int64_t(p.numel) - first;
      piece.from = first < 0 ? int(-first) : 0;
      piece.to = left < V ? int(left) : V;
      piece.start = uint32_t(first + piece.from);
      uint32_t row[2];
      row[0] = p.row.divide(piece.start);
      row[1] = row[0] + 1;
      piece.column = int(piece.start - row[0] * p.row.size) - piece.from;
      piece.turn = int(p.row.size) - piece.column;
      p.offset_calculator.template add_offsets<Main>(row, piece.rows);
    }
    return piece;
  }

  template <class E>
  SI_INLINE static void fetch_vector(const Accessor<M>& accessor, const Piece& piece, uint32_t* words) {
    const char* data = static_cast<const char*>(accessor.data);
    if (piece.whole()) {
      load_bytes<V* int(sizeof(E))>(data + uint64_t(piece.start) * sizeof(E), words);
    } else {
      SI_UNROLL
      for (int j = 0; j < V; ++j) {
        E element{};
        if (j >= piece.from && j < piece.to) {
          element = load_element<E>(data, piece.start + j - piece.from);
        }
        put_element(words, j, element);
      }
    }
  }

  template <class E>
  SI_INLINE static void load_values(const Accessor<M>& accessor, int slot, const Piece& piece, uint32_t* words) {
    if (accessor.mode == AccessMode::Broadcast) {
      const E here = load_element<E>(accessor.data, piece.rows[0][slot]);
      const E next = piece.turn < piece.to ? load_element<E>(accessor.data, piece.rows[1][slot]) : here;
      SI_UNROLL
      for (int j = 0; j < V; ++j) {
        put_element(words, j, j < piece.turn ? here : next);
      }
    } else {
      SI_UNROLL
      for (int j = 0; j < V; ++j) {
        E element{};
        if (j >= piece.from && j < piece.to) {
          element = load_element<E>(accessor.data, piece.offset(slot, accessor.step, j));
        }
        put_element(words, j, element);
      }
    }
  }

  template <class E>
  SI_INLINE static void store_values(const Accessor<M>& accessor, int slot, const Piece& piece, const M (&values)[V]) {
    if (accessor.mode == AccessMode::Vector && piece.whole()) {
      Accessor<M> at = accessor;
      store_as<E>(at, piece.start, values);
      return;
    }
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      if (j >= piece.from && j < piece.to) {
        store_element(accessor.data, piece.offset(slot, accessor.step, j), narrow<E>(values[j]));
      }
    }
  }

  // Vectors come first, for all pieces: they are what the memory has to deliver, the rest is small and lies in cache.
  template <bool Vectors, bool MayMix>
  SI_INLINE static void fetch(const Accessor<M>& accessor, int slot, const Piece& piece, Bits<T, V, MayMix>& bits) {
    const AccessMode mode = accessor.mode;
    if (Vectors ? mode != AccessMode::Vector : mode != AccessMode::Broadcast && mode != AccessMode::Elements) {
      return;
    }
    with_bits<T, MayMix>(accessor.dtype, [&](auto element) {
      using E = decltype(element);
      return Vectors ? fetch_vector<E>(accessor, piece, bits.words) : load_values<E>(accessor, slot, piece, bits.words);
    });
  }

  template <bool Vectors>
  SI_INLINE static void fetch_all(const Params& p, const Piece& piece, Inputs<Functor, T, Mixed, V>& inputs) {
    fetch<Vectors>(p.accessors[Main], Main, piece, inputs.main);
    fetch<Vectors>(p.accessors[Saved], Saved, piece, inputs.saved);
    fetch<Vectors>(p.accessors[First], First, piece, inputs.first);
    fetch<Vectors>(p.accessors[Second], Second, piece, inputs.second);
  }

  SI_INLINE static void run(const Params& p, uint32_t block, uint32_t thread) {
    const uint32_t begin = block * p.tile;
    const uint32_t end = p.count - begin < p.tile ? p.count : begin + p.tile;
    Piece pieces[U];
    Inputs<Functor, T, Mixed, V> inputs[U];
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      const uint32_t index = begin + u * kThreads + thread;
      pieces[u] = locate(p, index, index < end);
      if (pieces[u].live) {
        fetch_all<true>(p, pieces[u], inputs[u]);
      }
    }
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      if (pieces[u].live) {
        fetch_all<false>(p, pieces[u], inputs[u]);
        settle_each(p, inputs[u]);
        SI_UNROLL
        for (int out = 0; out < Functor::outs; ++out) {
          const Accessor<M>& accessor = p.accessors[Out0 + out];
          if (accessor.mode != AccessMode::Absent) {
            M values[V];
            inputs[u].compute_all(out, p.op, p.parameter, values);
            with_element<T, Mixed>(
                accessor.dtype, [&](auto element) { store_values<decltype(element)>(accessor, Out0 + out, pieces[u], values); });
          }
        }
      }
    }
  }

  // load_values has already given every element its own value.
  SI_INLINE static void settle_each(const Params& p, Inputs<Functor, T, Mixed, V>& inputs) {
    Accessor<M> accessors[kIns];
    SI_UNROLL
    for (int slot = 0; slot < kIns; ++slot) {
      accessors[slot] = p.accessors[slot];
      accessors[slot].mode = accessors[slot].mode == AccessMode::Broadcast ? AccessMode::Elements : accessors[slot].mode;
    }
    inputs.settle_all(accessors);
  }
};

} // namespace safe_inplace::cuda
