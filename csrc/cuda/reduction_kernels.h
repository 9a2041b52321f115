// The reduction kernels, as functions of (parameters, block, thread), like the element-wise ones. What lies between two
// barriers is one function: accumulate, then step for each halving of the distance from first_step on, then write.
#pragma once

#include "inputs.h"

namespace safe_inplace::cuda {

template <class T, class M>
SI_INLINE void store_sum(const Sum& sum, uint64_t offset, M value) {
  if (sum.store == Store::Accumulator) {
    static_cast<M*>(sum.data)[offset] = value;
    return;
  }
  if constexpr (kMayMix<T>) {
    if (sum.store != Store::Own) {
      const DType dtype = sum.store == Store::Float ? DType::Float : sum.store == Store::Half ? DType::Half : DType::BFloat16;
      with_element<T, true>(dtype, [&](auto element) {
        using E = decltype(element);
        static_cast<E*>(sum.data)[offset] = narrow<E>(value);
      });
      return;
    }
  }
  static_cast<T*>(sum.data)[offset] = narrow<T>(value);
}

// Element-wise gradients written, the others summed, in one reading. Threads add up in registers, then the lanes of a
// group in shared memory, in an order that the plan fixes.
template <class Functor, class T, bool Mixed, int V, class I>
struct Reduce {
  using Element = T;
  using M = OpMath<T>;
  using Params = ReduceParams<M, I>;
  static constexpr int U = kReduceUnroll<T, Mixed, V, I, (Functor::reads_first && Functor::reads_second)>;
  static constexpr int S = Functor::sums; // that a thread adds up

  struct Shared {
    M sums[S][V][kThreads];
  };

  // The gradient that is made of sum s. One sum serves both where there is one only: then they are alike.
  SI_INLINE static const Sum& made_of(const Params& p, int s) {
    return p.sums[Functor::outs == 0 ? (p.sums[0].wanted ? 0 : 1) : s];
  }

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
    M sums[S][V] = {};
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
  SI_INLINE static void put_aside(const Params& p, uint32_t thread, bool more, M (&sums)[S][V], Shared& shared) {
    SI_UNROLL
    for (int i = 0; i < S; ++i) {
      if (made_of(p, i).wanted) {
        if (made_of(p, i).per_column) {
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

  SI_INLINE static void round(const Params& p, const uint64_t (&base)[kSlots + 2], I start, I lanes, I end, M (&sums)[S][V]) {
    I index[U];
    bool live[U];
    I offsets[U][kIns] = {};
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      index[u] = start + u * lanes;
      live[u] = index[u] < end;
    }
    p.loop.template add_offsets<Main>(index, offsets);
    Inputs<Functor, T, Mixed, V> inputs[U];
    inputs[0].fetch_all(p.accessors, live, base, offsets, inputs);
    SI_UNROLL
    for (int u = 0; u < U; ++u) {
      if (live[u]) {
        inputs[u].settle_all(p.accessors);
        if constexpr (Functor::outs == 0) {
          add_terms(sums[0], inputs[u]);
        } else {
          finish(p, base, index[u], inputs[u], sums);
        }
      }
    }
  }

  SI_INLINE static void add_terms(M (&sum)[V], const Inputs<Functor, T, Mixed, V>& inputs) {
    SI_UNROLL
    for (int j = 0; j < V; ++j) {
      sum[j] = sum[j] + settled(inputs.main, j);
    }
  }

  // Of one vector: what is written is written, what is summed is added.
  SI_INLINE static void finish(const Params& p, const uint64_t (&base)[kSlots + 2], I index,
                               const Inputs<Functor, T, Mixed, V>& inputs, M (&sums)[S][V]) {
    I out_offsets[1][kOuts] = {};
    const I at[1] = {index};
    p.loop.template add_offsets<Out0>(at, out_offsets);
    SI_UNROLL
    for (int out = 0; out < Functor::outs; ++out) {
      const int i = out > 0 ? out - 1 : 0;
      if (out > 0 && p.sums[i].wanted) {
        if (p.common_factors[i].mode != AccessMode::Absent) {
          add_terms(sums[i], inputs);
        } else {
          SI_UNROLL
          for (int j = 0; j < V; ++j) {
            sums[i][j] = sums[i][j] + inputs.term(out, p.op, j);
          }
        }
      } else if (p.accessors[Out0 + out].mode != AccessMode::Absent) {
        M values[V];
        inputs.compute_all(out, p.op, p.parameter, values);
        store<T, Mixed>(p.accessors[Out0 + out], base[Out0 + out] + out_offsets[0][out], values);
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
    for (int i = 0; i < S; ++i) {
      if (made_of(p, i).wanted) {
        if (!made_of(p, i).per_column) {
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

  // Each thread reads what it has itself written last, so no barrier is due before. What all terms of a sum are multiplied by
  // multiplies the sum.
  SI_INLINE static void write(const Params& p, uint32_t block, uint32_t thread, const Shared& shared) {
    const Place place = locate(p, block, thread);
    if (!place.live || place.lane != 0) {
      return;
    }
    uint64_t base[1][4] = {};
    const I outer[1] = {place.outer};
    p.outer.template add_offsets<kSlots>(outer, base);
    SI_UNROLL
    for (int i = 0; i < (S > Functor::outs ? 2 : S); ++i) {
      const Sum& sum = p.sums[i];
      if (!sum.wanted || (!sum.per_column && place.in_group != 0)) {
        continue;
      }
      const auto& own = shared.sums[i < S ? i : 0];
      M values[V];
      SI_UNROLL
      for (int j = 0; j < V; ++j) {
        values[j] = sum.per_column || j == 0 ? own[j][thread] : M{};
      }
      const Accessor<M>& factor = p.common_factors[i];
      if (factor.mode != AccessMode::Absent) {
        const uint64_t at = base[0][2 + i] + uint64_t(place.column) * p.common_factor_column_strides[i];
        const auto bits = load<T, V, kMayMix<T>>(factor, at);
        SI_UNROLL
        for (int j = 0; j < V; ++j) {
          values[j] = values[j] * conjugate(settled(bits, j));
        }
      }
      if (sum.times_parameter) {
        SI_UNROLL
        for (int j = 0; j < V; ++j) {
          values[j] = values[j] * p.parameter;
        }
      }
      uint64_t at = base[0][i] + place.chunk * sum.chunk_stride;
      if (sum.per_column) {
        at += uint64_t(place.column) * V * sum.column_stride;
        SI_UNROLL
        for (int j = 0; j < V; ++j) {
          store_sum<T>(sum, at + j * sum.column_stride, values[j]);
        }
      } else {
        store_sum<T>(sum, at + place.column_block * sum.column_block_stride, values[0]);
      }
    }
  }
};

// Adds up the partial sums that Reduce left.
template <class T>
struct ReducePartials {
  using Element = T;
  using M = OpMath<T>;
  using Params = ReducePartialsParams<M>;
  static constexpr int U = kPartialsUnroll;

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
    const PartialSums<M>& sum = p.sums[place.which];
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
    const PartialSums<M>& sum = p.sums[place.which];
    if (place.lane == 0 && place.result < sum.count) {
      uint64_t offsets[1][1] = {};
      const uint64_t result[1] = {place.result};
      sum.offset_calculator.template add_offsets<0>(result, offsets);
      Sum target;
      target.data = sum.data;
      target.store = sum.store;
      store_sum<T>(target, offsets[0][0], shared.sums[thread]);
    }
  }
};

} // namespace safe_inplace::cuda
