// The kernels, as functions of (parameters, block, thread): the bodies of __global__ functions on a device, and of loops
// over blocks and threads in the simulator. What lies between two barriers is one function.
#pragma once

#include <type_traits>
#include <utility>

#include "access.h"
#include "bodies.h"

namespace safe_inplace::tiles {

// Vectors that a thread has in flight. More would cost so many registers that fewer threads fit.
template <class T, bool Mixed, int V>
inline constexpr int kUnroll = V == 1 && sizeof(T) <= 4 ? 4 : Mixed || sizeof(T) == 16 ? 2 : 4;

// What a thread has read of one vector.
template <class Body, class T, bool Mixed, int V>
struct Inputs {
  using M = Math<T>;
  Bits<T, V, false> main, saved;
  Bits<T, V, Mixed> first, second;

  template <int U, class Offset>
  SI_INLINE static void fetch_all(const Stream<M>* streams, const bool (&live)[U], const uint64_t* base,
                                  const Offset (&offsets)[U][kIns], Inputs (&inputs)[U]) {
    fetch<&Inputs::main>(streams[Main], live, base, offsets, Main, inputs);
    if constexpr (Body::reads_saved) {
      fetch<&Inputs::saved>(streams[Saved], live, base, offsets, Saved, inputs);
    }
    if constexpr (Body::reads_first) {
      fetch<&Inputs::first>(streams[First], live, base, offsets, First, inputs);
    }
    if constexpr (Body::reads_second) {
      fetch<&Inputs::second>(streams[Second], live, base, offsets, Second, inputs);
    }
  }

  SI_INLINE void settle_all(const Stream<M>* streams) {
    settle(streams[Main], main);
    if constexpr (Body::reads_saved) {
      settle(streams[Saved], saved);
    }
    if constexpr (Body::reads_first) {
      settle(streams[First], first);
    }
    if constexpr (Body::reads_second) {
      settle(streams[Second], second);
    }
  }

  // Element j of the value that belongs to Out0 + `out`.
  SI_INLINE M compute(int out, int op, M parameter, int j) const {
    M in[kIns] = {};
    in[Main] = settled(main, j);
    if constexpr (Body::reads_saved) {
      in[Saved] = settled(saved, j);
    }
    if constexpr (Body::reads_first) {
      in[First] = settled(first, j);
    }
    if constexpr (Body::reads_second) {
      in[Second] = settled(second, j);
    }
    return Body::compute(out, op, parameter, in);
  }

  SI_INLINE void compute_all(int out, int op, M parameter, M (&values)[V]) const {
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      values[j] = compute(out, op, parameter, j);
    }
  }

 private:
  template <auto Member, int U, class Offset>
  SI_INLINE static void fetch(const Stream<M>& stream, const bool (&live)[U], const uint64_t* base,
                              const Offset (&offsets)[U][kIns], int slot, Inputs (&inputs)[U]) {
    if (stream.mode == Mode::Absent || stream.mode == Mode::Number) {
      return;
    }
    if constexpr (std::decay_t<decltype(std::declval<Inputs&>().*Member)>::mixed) {
      if (stream.wide) {
        return fetch_as<Member, float>(stream, live, base, offsets, slot, inputs);
      }
    }
    fetch_as<Member, T>(stream, live, base, offsets, slot, inputs);
  }

  // The branch on the mode is outside, so that the loads of one tensor follow each other.
  template <auto Member, class E, int U, class Offset>
  SI_INLINE static void fetch_as(const Stream<M>& stream, const bool (&live)[U], const uint64_t* base,
                                 const Offset (&offsets)[U][kIns], int slot, Inputs (&inputs)[U]) {
    if (V == 1 || stream.mode == Mode::Vector) {
      fetch_as<Member, E, Mode::Vector>(stream, live, base, offsets, slot, inputs);
    } else if (stream.mode == Mode::Same) {
      fetch_as<Member, E, Mode::Same>(stream, live, base, offsets, slot, inputs);
    } else {
      fetch_as<Member, E, Mode::Elements>(stream, live, base, offsets, slot, inputs);
    }
  }

  template <auto Member, class E, Mode mode, int U, class Offset>
  SI_INLINE static void fetch_as(const Stream<M>& stream, const bool (&live)[U], const uint64_t* base,
                                 const Offset (&offsets)[U][kIns], int slot, Inputs (&inputs)[U]) {
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      if (live[u]) {
        tiles::fetch_as<E, V, mode>(stream, base[slot] + offsets[u][slot], (inputs[u].*Member).words);
      }
    }
  }
};

// One element-wise pass over vectors that do not cross rows (or over single elements, V = 1).
template <class Body, class T, bool Mixed, int V, class I>
struct Map {
  using Element = T;
  using M = Math<T>;
  using Params = MapParams<M, I>;
  static constexpr int U = kUnroll<T, Mixed, V>;

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
    p.nest.template add_offsets<Main>(index, offsets);

    Inputs<Body, T, Mixed, V> inputs[U];
    const uint64_t base[kIns] = {};
    inputs[0].fetch_all(p.streams, live, base, offsets, inputs);
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      if (live[u]) {
        inputs[u].settle_all(p.streams);
        // Walked once more: offsets kept since the loads would cost the registers of a third of the threads.
        uint64_t out_offsets[1][kOuts] = {};
        const I at[1] = {index[u]};
        p.nest.template add_offsets<Out0>(at, out_offsets);
        SI_UNROLL
        for (int out = 0; out < Body::outs; ++out) {
          if (p.streams[Out0 + out].mode != Mode::Absent) {
            M values[V];
            inputs[u].compute_all(out, p.op, p.parameter, values);
            store<T>(p.streams[Out0 + out], out_offsets[0][out], values);
          }
        }
      }
    }
  }
};

// The same over contiguous memory whose rows are no multiple of a vector, or do not start at one: every vector but the
// first and the last is whole, and may belong to two rows.
template <class Body, class T>
struct Ragged {
  using Element = T;
  using M = Math<T>;
  using Params = MapParams<M, uint32_t>;
  static constexpr bool Mixed = kMayMix<T>;
  static constexpr int V = kVector<T>;
  static constexpr int U = 2;

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
      p.nest.template add_offsets<Main>(row, piece.rows);
    }
    return piece;
  }

  template <class E>
  SI_INLINE static void fetch_vector(const Stream<M>& stream, const Piece& piece, uint32_t* words) {
    const char* data = static_cast<const char*>(stream.data);
    if (piece.whole()) {
      SI_UNROLL
      for (int b = 0; b < V * int(sizeof(E)) / 16; ++b) {
        load_16_bytes(data + uint64_t(piece.start) * sizeof(E) + 16 * b, words + 4 * b);
      }
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
  SI_INLINE static void load_values(const Stream<M>& stream, int slot, const Piece& piece, uint32_t* words) {
    if (stream.mode == Mode::Same) {
      const E here = load_element<E>(stream.data, piece.rows[0][slot]);
      const E next = piece.turn < piece.to ? load_element<E>(stream.data, piece.rows[1][slot]) : here;
      SI_UNROLL
      for (int j = 0; j < V; ++j) {
        put_element(words, j, j < piece.turn ? here : next);
      }
    } else {
      SI_UNROLL
      for (int j = 0; j < V; ++j) {
        E element{};
        if (j >= piece.from && j < piece.to) {
          element = load_element<E>(stream.data, piece.offset(slot, stream.step, j));
        }
        put_element(words, j, element);
      }
    }
  }

  template <class E>
  SI_INLINE static void store_values(const Stream<M>& stream, int slot, const Piece& piece, const M (&values)[V]) {
    if (stream.mode == Mode::Vector && piece.whole()) {
      Stream<M> at = stream;
      store_as<E>(at, piece.start, values);
      return;
    }
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      if (j >= piece.from && j < piece.to) {
        store_element(stream.data, piece.offset(slot, stream.step, j), narrow<E>(values[j]));
      }
    }
  }

  // Vectors come first, for all pieces: they are what the memory has to deliver, the rest is small and lies in cache.
  template <bool Vectors, bool MayBeWide>
  SI_INLINE static void fetch(const Stream<M>& stream, int slot, const Piece& piece, Bits<T, V, MayBeWide>& bits) {
    if (Vectors ? stream.mode != Mode::Vector : stream.mode != Mode::Same && stream.mode != Mode::Elements) {
      return;
    }
    if constexpr (MayBeWide) {
      if (stream.wide) {
        return Vectors ? fetch_vector<float>(stream, piece, bits.words)
                       : load_values<float>(stream, slot, piece, bits.words);
      }
    }
    return Vectors ? fetch_vector<T>(stream, piece, bits.words) : load_values<T>(stream, slot, piece, bits.words);
  }

  template <bool Vectors>
  SI_INLINE static void fetch_all(const Params& p, const Piece& piece, Inputs<Body, T, Mixed, V>& inputs) {
    fetch<Vectors>(p.streams[Main], Main, piece, inputs.main);
    fetch<Vectors>(p.streams[Saved], Saved, piece, inputs.saved);
    fetch<Vectors>(p.streams[First], First, piece, inputs.first);
    fetch<Vectors>(p.streams[Second], Second, piece, inputs.second);
  }

  SI_INLINE static void run(const Params& p, uint32_t block, uint32_t thread) {
    const uint32_t begin = block * p.tile;
    const uint32_t end = p.count - begin < p.tile ? p.count : begin + p.tile;
    Piece pieces[U];
    Inputs<Body, T, Mixed, V> inputs[U];
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
        for (int out = 0; out < Body::outs; ++out) {
          const Stream<M>& stream = p.streams[Out0 + out];
          if (stream.mode != Mode::Absent) {
            M values[V];
            inputs[u].compute_all(out, p.op, p.parameter, values);
            if constexpr (Mixed) {
              if (stream.wide) {
                store_values<float>(stream, Out0 + out, pieces[u], values);
                continue;
              }
            }
            store_values<T>(stream, Out0 + out, pieces[u], values);
          }
        }
      }
    }
  }

  // load_values has already given every element its own value.
  SI_INLINE static void settle_each(const Params& p, Inputs<Body, T, Mixed, V>& inputs) {
    Stream<M> streams[kIns];
    SI_UNROLL
    for (int slot = 0; slot < kIns; ++slot) {
      streams[slot] = p.streams[slot];
      streams[slot].mode = streams[slot].mode == Mode::Same ? Mode::Elements : streams[slot].mode;
    }
    inputs.settle_all(streams);
  }
};

template <class T, class M>
SI_INLINE void store_sum(const Sum& sum, uint64_t offset, M value) {
  if (sum.store == Store::Accumulator) {
    static_cast<M*>(sum.data)[offset] = value;
    return;
  }
  if constexpr (kMayMix<T>) {
    if (sum.store == Store::Float) {
      static_cast<float*>(sum.data)[offset] = value;
      return;
    }
  }
  static_cast<T*>(sum.data)[offset] = narrow<T>(value);
}

// Element-wise gradients written, the others summed, in one reading. Threads add up in registers, then the lanes of a
// group in shared memory, in an order that the plan fixes.
template <class Body, class T, bool Mixed, int V, class I>
struct Reduce {
  using Element = T;
  using M = Math<T>;
  using Params = ReduceParams<M, I>;
  // What fits in 128 registers.
  static constexpr int U = V == 1 ? (sizeof(T) <= 8 && sizeof(I) == 4 ? 4 : 2) : !Mixed ? 4 : Body::reads_first && Body::reads_second ? 2 : 3;

  struct Shared {
    M sums[2][V][kThreads];
  };

  struct Place {
    uint32_t column_block, chunk;
    uint32_t in_group; // lane and column
    uint32_t lane;
    I column, outer;
    bool live;
  };

  SI_INLINE static Place locate(const Params& p, uint32_t block, uint32_t thread) {
    Place place;
    uint32_t rest = p.column_blocks.divide(block);
    place.column_block = block - rest * p.column_blocks.size;
    place.chunk = p.outer_blocks.divide(rest);
    const uint32_t outer_block = rest - place.chunk * p.outer_blocks.size;
    const uint32_t log_group = p.log_columns + p.log_lanes;
    place.in_group = thread & ((1u << log_group) - 1);
    place.lane = place.in_group >> p.log_columns;
    place.column = (I(place.column_block) << p.log_columns) + (thread & ((1u << p.log_columns) - 1));
    place.outer = (I(outer_block) << (kLogThreads - log_group)) + (thread >> log_group);
    place.live = place.column < p.columns && place.outer < p.outer_count;
    return place;
  }

  SI_INLINE static uint32_t first_step(const Params& p) { return (1u << (p.log_columns + p.log_lanes)) / 2; }

  SI_INLINE static void accumulate(const Params& p, uint32_t block, uint32_t thread, Shared& shared) {
    const Place place = locate(p, block, thread);
    M sums[2][V] = {};
    bool more = false; // of this thread's sums are in shared memory
    if (place.live) {
      uint64_t base[1][kSlots + 2] = {};
      const I outer[1] = {place.outer};
      p.outer.template add_offsets<Main>(outer, base);
      SI_UNROLL
      for (int slot = 0; slot < kSlots; ++slot) {
        base[0][slot] += uint64_t(place.column) * p.column_strides[slot];
      }
      const I lanes = I(1) << p.log_lanes;
      I begin = I(place.chunk) * p.chunk;
      I end = p.loop_count - begin < p.chunk ? p.loop_count : begin + p.chunk;
      // From its chunk on, a loop of one dimension reaches far with narrow offsets.
      if (p.loop.ndim == 1) {
        SI_UNROLL
        for (int slot = 0; slot < kSlots; ++slot) {
          base[0][slot] += uint64_t(begin) * p.loop.strides[slot][0];
        }
        end -= begin;
        begin = 0;
      }
      I at = begin + place.lane;
      SI_ROLLED
      while (at < end) {
        // What is left may be less than a run, whose end may not fit the index.
        const I stop = end - at < p.run ? end : at + p.run;
        SI_ROLLED
        for (; at < stop; at += U * lanes) {
          round(p, base[0], at, lanes, end, sums);
        }
        if (at < end) {
          put_aside(p, thread, more, sums, shared);
          more = true;
        }
      }
    }
    put_aside(p, thread, more, sums, shared);
  }

  // Adds what a thread has summed up in registers to its sums in shared memory, and starts anew: long chains of additions
  // lose digits, and a second set of registers would cost a spill.
  SI_INLINE static void put_aside(const Params& p, uint32_t thread, bool more, M (&sums)[2][V], Shared& shared) {
    SI_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i + 1 < Body::outs && p.sums[i].wanted) {
        if (p.sums[i].per_column) {
          SI_UNROLL
          for (int j = 0; j < V; ++j) {
            M& aside = shared.sums[i][j][thread];
            aside = more ? aside + sums[i][j] : sums[i][j];
            sums[i][j] = M{};
          }
        } else {
          M total = sums[i][0];
          sums[i][0] = M{};
          SI_UNROLL
          for (int j = 1; j < V; ++j) {
            total = total + sums[i][j];
            sums[i][j] = M{};
          }
          M& aside = shared.sums[i][0][thread];
          aside = more ? aside + total : total;
        }
      }
    }
  }

  SI_INLINE static void round(const Params& p, const uint64_t (&base)[kSlots + 2], I start, I lanes, I end,
                              M (&sums)[2][V]) {
    I index[U];
    bool live[U];
    I offsets[U][kIns] = {};
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      index[u] = start + u * lanes;
      live[u] = index[u] < end;
    }
    p.loop.template add_offsets<Main>(index, offsets);
    Inputs<Body, T, Mixed, V> inputs[U];
    inputs[0].fetch_all(p.streams, live, base, offsets, inputs);
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      if (live[u]) {
        inputs[u].settle_all(p.streams);
        I out_offsets[1][kOuts] = {};
        const I at[1] = {index[u]};
        p.loop.template add_offsets<Out0>(at, out_offsets);
        SI_UNROLL
        for (int out = 0; out < Body::outs; ++out) {
          const bool summed = out > 0 && p.sums[out > 0 ? out - 1 : 0].wanted;
          if (summed) {
            SI_UNROLL
            for (int j = 0; j < V; ++j) {
              M& sum = sums[out > 0 ? out - 1 : 0][j];
              sum = sum + inputs[u].compute(out, p.op, p.parameter, j);
            }
          } else if (p.streams[Out0 + out].mode != Mode::Absent) {
            M values[V];
            inputs[u].compute_all(out, p.op, p.parameter, values);
            store<T>(p.streams[Out0 + out], base[Out0 + out] + out_offsets[0][out], values);
          }
        }
      }
    }
  }

  // One level of the tree over a group: sums of columns stop where each column has one left.
  SI_INLINE static void step(const Params& p, uint32_t, uint32_t thread, uint32_t distance, Shared& shared) {
    const uint32_t in_group = thread & ((1u << (p.log_columns + p.log_lanes)) - 1);
    if (in_group >= distance) {
      return;
    }
    SI_UNROLL
    for (int i = 0; i < 2; ++i) {
      if (i + 1 < Body::outs && p.sums[i].wanted) {
        if (!p.sums[i].per_column) {
          shared.sums[i][0][thread] = shared.sums[i][0][thread] + shared.sums[i][0][thread + distance];
        } else if (distance >> p.log_columns != 0) {
          SI_UNROLL
          for (int j = 0; j < V; ++j) {
            shared.sums[i][j][thread] = shared.sums[i][j][thread] + shared.sums[i][j][thread + distance];
          }
        }
      }
    }
  }

  // Each thread reads what it has itself written last, so no barrier is due before.
  SI_INLINE static void write(const Params& p, uint32_t block, uint32_t thread, const Shared& shared) {
    const Place place = locate(p, block, thread);
    if (!place.live || place.lane != 0) {
      return;
    }
    uint64_t base[1][2] = {};
    const I outer[1] = {place.outer};
    p.outer.template add_offsets<kSlots>(outer, base);
    SI_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Sum& sum = p.sums[i];
      if (i + 1 < Body::outs && sum.wanted) {
        uint64_t at = base[0][i] + place.chunk * sum.chunk_stride;
        if (sum.per_column) {
          at += uint64_t(place.column) * V * sum.column_stride;
          SI_UNROLL
          for (int j = 0; j < V; ++j) {
            store_sum<T>(sum, at + j * sum.column_stride, shared.sums[i][j][thread]);
          }
        } else if (place.in_group == 0) {
          store_sum<T>(sum, at + place.column_block * sum.column_block_stride, shared.sums[i][0][thread]);
        }
      }
    }
  }
};

// Adds up the partial sums that Reduce left.
template <class T>
struct Finish {
  using Element = T;
  using M = Math<T>;
  using Params = FinishParams<M>;
  static constexpr int U = kFinishUnroll;

  struct Shared {
    M sums[kThreads];
  };

  struct Place {
    int which;
    uint32_t lane;
    uint64_t result;
  };

  SI_INLINE static Place locate(const Params& p, uint32_t block, uint32_t thread) {
    Place place;
    place.which = block < p.first_blocks ? 0 : 1;
    const uint32_t log_results = kLogThreads - p.sums[place.which].log_lanes;
    const uint32_t own_block = place.which == 0 ? block : block - p.first_blocks;
    place.lane = thread >> log_results;
    place.result = (uint64_t(own_block) << log_results) + (thread & ((1u << log_results) - 1));
    return place;
  }

  SI_INLINE static uint32_t first_step(const Params&) { return kThreads / 2; }

  SI_INLINE static void accumulate(const Params& p, uint32_t block, uint32_t thread, Shared& shared) {
    const Place place = locate(p, block, thread);
    const FinishSum<M>& sum = p.sums[place.which];
    const uint32_t lanes = 1u << sum.log_lanes;
    M total{}, run{};
    if (place.result < sum.count) {
      uint32_t rounds = 0;
      SI_ROLLED
      for (uint32_t term = place.lane; term < sum.terms; term += U * lanes) {
        M values[U];
        SI_UNROLL
        for (int u = 0; u < U; ++u) {
          const uint32_t at = term + u * lanes;
          values[u] = at < sum.terms ? sum.partials[at * sum.count + place.result] : M{};
        }
        SI_UNROLL
        for (int distance = U / 2; distance > 0; distance /= 2) {
          SI_UNROLL
          for (int u = 0; u < distance; ++u) {
            values[u] = values[u] + values[u + distance];
          }
        }
        run = run + values[0];
        if ((++rounds & (sum.run - 1)) == 0) {
          total = total + run;
          run = M{};
        }
      }
    }
    shared.sums[thread] = total + run;
  }

  // Lanes are `kThreads >> log_lanes` threads apart; the tree ends there.
  SI_INLINE static void step(const Params& p, uint32_t block, uint32_t thread, uint32_t distance, Shared& shared) {
    const Place place = locate(p, block, thread);
    if (thread < distance && distance >> (kLogThreads - p.sums[place.which].log_lanes) != 0) {
      shared.sums[thread] = shared.sums[thread] + shared.sums[thread + distance];
    }
  }

  SI_INLINE static void write(const Params& p, uint32_t block, uint32_t thread, const Shared& shared) {
    const Place place = locate(p, block, thread);
    const FinishSum<M>& sum = p.sums[place.which];
    if (place.lane == 0 && place.result < sum.count) {
      uint64_t offsets[1][1] = {};
      const uint64_t result[1] = {place.result};
      sum.nest.template add_offsets<0>(result, offsets);
      Sum target;
      target.data = sum.data;
      target.store = sum.store;
      store_sum<T>(target, offsets[0][0], shared.sums[thread]);
    }
  }
};

} // namespace safe_inplace::tiles
