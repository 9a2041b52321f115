// The loops over rows. Included by each rows_*.cpp after its target pragma, inside a namespace of its own.
// No include guard: one inclusion per translation unit, each for another instruction set.

#include "chunk_impl.h"

// One number or a chunk.
template <class V, class S>
SI_INLINE V load(const S* from) {
  if constexpr (is_chunk<V>) {
    V value;
    read(value, from);
    return value;
  } else {
    return widen(*from);
  }
}

template <class V, class M>
SI_INLINE V same_everywhere(M value) {
  if constexpr (is_chunk<V>) {
    V values;
    spread(values, value);
    return values;
  } else {
    return value;
  }
}

template <class T, class V>
SI_INLINE void store(T* to, const V& value) {
  if constexpr (is_chunk<V>) {
    write(to, value);
  } else {
    *to = narrow<T>(value);
  }
}

// How far ahead of the loops elements of two bytes are asked for. Converting them takes so many instructions that the
// processor sees fewer cache lines ahead than with float32: past the last cache, asking brought 1.1 to 1.2 of the bytes per
// second, any distance of 0.5 to 4 KiB about the same (Zen 3). Asking never faults, wherever it points.
constexpr int64_t kAhead = 1024;

SI_INLINE void fetch_ahead(const void* from) {
  __builtin_prefetch(static_cast<const char*>(from) + kAhead);
}

template <class T, int kind>
struct Operand {
  using M = OpMath<T>;
  using S = std::conditional_t<kind == kOwn, T, M>;
  const S* data;

  SI_INLINE explicit Operand(const void* pointer) : data(static_cast<const S*>(pointer)) {}
  template <class V>
  SI_INLINE V at(int64_t i) const {
    return load<V>(data + i);
  }
  SI_INLINE void ahead(int64_t i) const {
    if constexpr (kind == kOwn) {
      fetch_ahead(data + i); // in kOpMath it may be a vector, which is in the first cache
    }
  }
};

template <class T>
struct Operand<T, kOne> {
  using M = OpMath<T>;
  using S = M;
  M value;

  SI_INLINE explicit Operand(const void* pointer) : value(*static_cast<const M*>(pointer)) {}
  template <class V>
  SI_INLINE V at(int64_t) const {
    return same_everywhere<V>(value);
  }
  SI_INLINE void ahead(int64_t) const {}
};

template <class T>
struct Operand<T, kNoFactor> {
  using S = OpMath<T>;
  SI_INLINE explicit Operand(const void*) {}
  SI_INLINE void ahead(int64_t) const {}
};

// Calls step with the index of each chunk and of each element that is left, and with which of the two it is; and ahead
// with the index of each cache line, where it pays.
template <class T, class Ahead, class Step>
SI_INLINE void along_row(int64_t n, const Ahead& ahead, const Step& step) {
  int64_t done = 0;
  if constexpr (in_chunks<T> && sizeof(T) == 2) {
    for (; done + 2 * kLanes <= n; done += 2 * kLanes) {
      ahead(done);
      step(Chunk<OpMath<T>>{}, done);
      step(Chunk<OpMath<T>>{}, done + kLanes);
    }
  }
  if constexpr (in_chunks<T>) {
    for (; done + kLanes <= n; done += kLanes) {
      step(Chunk<OpMath<T>>{}, done);
    }
  }
  // What is written is exactly what is read, or disjoint from it, so no iteration depends on another.
#pragma GCC ivdep
  for (int64_t i = done; i < n; ++i) {
    step(OpMath<T>{}, i);
  }
}

template <class Op, class T, int first_kind, int second_kind, bool keep>
SI_INLINE void forward_loops(const ForwardBlock& block) {
  using First = Operand<T, first_kind>;
  using Second = Operand<T, second_kind>;
  const auto parameter = *static_cast<const OpMath<T>*>(block.parameter);
  for (int64_t row = 0; row < block.rows; ++row) {
    T* const result = static_cast<T*>(block.result) + row * block.result_stride;
    const T* const input = static_cast<const T*>(block.input) + row * block.input_stride;
    T* const kept = keep ? static_cast<T*>(block.kept) + row * block.kept_stride : nullptr;
    const First first(static_cast<const typename First::S*>(block.operands[0]) + row * block.operand_strides[0]);
    const Second second(static_cast<const typename Second::S*>(block.operands[1]) + row * block.operand_strides[1]);
    const auto ahead = [&](int64_t i) __attribute__((always_inline)) {
      fetch_ahead(input + i);
      first.ahead(i);
      second.ahead(i);
    };
    along_row<T>(block.n, ahead, [&](auto kind, int64_t i) __attribute__((always_inline)) {
      using V = decltype(kind);
      const V x = load<V>(input + i);
      const V a = first.template at<V>(i);
      const V b = second.template at<V>(i);
      if constexpr (keep && Op::kept == Kept::Input && is_chunk<V> && sizeof(T) == 2) {
        memcpy(kept + i, input + i, kLanes * sizeof(T)); // needs no rounding
      } else if constexpr (keep) {
        store(kept + i, kept_value<Op>(x, a));
      }
      store(result + i, Op::result(x, a, b, same_everywhere<V>(parameter)));
    });
  }
}

template <class Op, class T, int first_kind, int second_kind>
void forward_rows(const ForwardBlock& block) {
  if constexpr (Op::kept != Kept::Nothing) {
    if (block.kept != nullptr) {
      forward_loops<Op, T, first_kind, second_kind, true>(block);
      return;
    }
  }
  forward_loops<Op, T, first_kind, second_kind, false>(block);
}

template <class T>
void narrow_row(const void* from, void* to, int64_t n) {
  const auto* const in = static_cast<const OpMath<T>*>(from);
  T* const out = static_cast<T*>(to);
  along_row<T>(
      n, [](int64_t) {},
      [&](auto kind, int64_t i) __attribute__((always_inline)) { store(out + i, load<decltype(kind)>(in + i)); });
}

// One row of a block: the gradient, what it is multiplied by, and the terms that come of it.
template <class T, int factor_kind>
struct Terms {
  using F = Operand<T, factor_kind>;
  const T* grad;
  F factor;
  OpMath<T> multiplier;

  SI_INLINE Terms(const BackwardBlock& block, int64_t row)
      : grad(static_cast<const T*>(block.grad) + row * block.grad_stride),
        factor(static_cast<const typename F::S*>(block.factor) + row * block.factor_stride),
        multiplier(*static_cast<const OpMath<T>*>(block.multiplier)) {}
  template <class V>
  SI_INLINE V at(int64_t i) const {
    const V value = load<V>(grad + i);
    if constexpr (factor_kind == kNoFactor) {
      return value * same_everywhere<V>(multiplier);
    } else {
      return value * conjugate(factor.template at<V>(i)) * same_everywhere<V>(multiplier);
    }
  }
  SI_INLINE void ahead(int64_t i) const {
    fetch_ahead(grad + i);
    factor.ahead(i);
  }
};

template <class T, int factor_kind, class Out>
void store_rows(const BackwardBlock& block) {
  for (int64_t row = 0; row < block.rows; ++row) {
    Out* const target = static_cast<Out*>(block.target) + row * block.target_stride;
    const Terms<T, factor_kind> terms(block, row);
    const auto ahead = [&](int64_t i) __attribute__((always_inline)) { terms.ahead(i); };
    along_row<T>(block.n, ahead, [&](auto kind, int64_t i) __attribute__((always_inline)) {
      store(target + i, terms.template at<decltype(kind)>(i));
    });
  }
}

// Rows whose sum is taken apart from that of the others, to keep chains of additions short.
constexpr int64_t kColumnRun = 64;
constexpr int64_t kSumRun = 32;

template <class T, int factor_kind>
void add_columns(const BackwardBlock& block) {
  using M = OpMath<T>;
  if (block.target_stride == 0 && block.rows > kColumnRun) {
    using S = typename Operand<T, factor_kind>::S;
    M part[kMostNarrow];
    M* const target = static_cast<M*>(block.target);
    BackwardBlock run = block;
    run.target = part;
    for (int64_t row = 0; row < block.rows; row += kColumnRun) {
      run.grad = static_cast<const T*>(block.grad) + row * block.grad_stride;
      run.factor = static_cast<const S*>(block.factor) + row * block.factor_stride;
      run.rows = block.rows - row < kColumnRun ? block.rows - row : kColumnRun;
      for (int64_t i = 0; i < block.n; ++i) {
        part[i] = M{};
      }
      add_columns<T, factor_kind>(run);
      for (int64_t i = 0; i < block.n; ++i) {
        target[i] = target[i] + part[i];
      }
    }
    return;
  }
  int64_t row = 0;
  // Rows that share a target are added by fours: fewer passes over the target, and shorter chains of additions.
  if (block.target_stride == 0) {
    M* const target = static_cast<M*>(block.target);
    for (; row + 4 <= block.rows; row += 4) {
      const Terms<T, factor_kind> first(block, row), second(block, row + 1), third(block, row + 2), fourth(block, row + 3);
      const auto ahead = [&](int64_t i) __attribute__((always_inline)) {
        first.ahead(i);
        second.ahead(i);
        third.ahead(i);
        fourth.ahead(i);
      };
      along_row<T>(block.n, ahead, [&](auto kind, int64_t i) __attribute__((always_inline)) {
        using V = decltype(kind);
        const V sum = (first.template at<V>(i) + second.template at<V>(i)) + (third.template at<V>(i) + fourth.template at<V>(i));
        store(target + i, load<V>(target + i) + sum);
      });
    }
  }
  for (; row < block.rows; ++row) {
    M* const target = static_cast<M*>(block.target) + row * block.target_stride;
    const Terms<T, factor_kind> terms(block, row);
    const auto ahead = [&](int64_t i) __attribute__((always_inline)) { terms.ahead(i); };
    along_row<T>(block.n, ahead, [&](auto kind, int64_t i) __attribute__((always_inline)) {
      using V = decltype(kind);
      store(target + i, load<V>(target + i) + terms.template at<V>(i));
    });
  }
}

template <class T, int factor_kind>
void add_sum(const BackwardBlock& block) {
  using M = OpMath<T>;
  using V = Chunk<M>;
  M* const target = static_cast<M*>(block.target);
  M run{}, runs{};
  for (int64_t row = 0; row < block.rows; ++row) {
    const Terms<T, factor_kind> terms(block, row);
    int64_t i = 0;
    V sum = same_everywhere<V>(M{});
    // Four chains of additions: one alone would wait for each.
    if (block.n >= 4 * kLanes) {
      V sums[3] = {sum, sum, sum};
      for (; i + 4 * kLanes <= block.n; i += 4 * kLanes) {
        sum = sum + terms.template at<V>(i);
        sums[0] = sums[0] + terms.template at<V>(i + kLanes);
        sums[1] = sums[1] + terms.template at<V>(i + 2 * kLanes);
        sums[2] = sums[2] + terms.template at<V>(i + 3 * kLanes);
      }
      sum = (sum + sums[0]) + (sums[1] + sums[2]);
    }
    for (; i + kLanes <= block.n; i += kLanes) {
      sum = sum + terms.template at<V>(i);
    }
    M lanes[kLanes];
    store(lanes, sum);
    for (int lane = 0; i < block.n; ++i, ++lane) {
      lanes[lane] = lanes[lane] + terms.template at<M>(i);
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        lanes[lane] = lanes[lane] + lanes[lane + width];
      }
    }
    if (block.target_stride != 0) {
      target[row * block.target_stride] = target[row * block.target_stride] + lanes[0];
      continue;
    }
    run = run + lanes[0];
    if ((row + 1) % kSumRun == 0) {
      runs = runs + run;
      run = M{};
    }
  }
  if (block.target_stride == 0) {
    *target = *target + (runs + run);
  }
}

template <class T>
inline constexpr bool has_opmath_dtype = !std::is_same_v<T, OpMath<T>>;

template <class Op, class T>
constexpr void fill_forward(RowTable& table) {
  auto& rows = table.forward[op_index<Op>][int(Type<T>::dtype)];
  rows[kOwn][kOne] = forward_rows<Op, T, kOwn, kOne>;
  rows[kOne][kOne] = forward_rows<Op, T, kOne, kOne>;
  if constexpr (Op::operands == 2) {
    rows[kOwn][kOwn] = forward_rows<Op, T, kOwn, kOwn>;
    rows[kOne][kOwn] = forward_rows<Op, T, kOne, kOwn>;
  }
  if constexpr (has_opmath_dtype<T>) {
    rows[kOpMath][kOne] = forward_rows<Op, T, kOpMath, kOne>;
    if constexpr (Op::operands == 2) {
      rows[kOpMath][kOwn] = forward_rows<Op, T, kOpMath, kOwn>;
      rows[kOpMath][kOpMath] = forward_rows<Op, T, kOpMath, kOpMath>;
      rows[kOwn][kOpMath] = forward_rows<Op, T, kOwn, kOpMath>;
      rows[kOne][kOpMath] = forward_rows<Op, T, kOne, kOpMath>;
    }
  }
}

template <class T, int factor_kind>
constexpr void fill_backward(RowTable& table) {
  auto& rows = table.backward[int(Type<T>::dtype)][factor_kind];
  rows[kStoreOwn] = store_rows<T, factor_kind, T>;
  if constexpr (has_opmath_dtype<T>) {
    rows[kStoreMath] = store_rows<T, factor_kind, OpMath<T>>;
  }
  rows[kAddColumns] = add_columns<T, factor_kind>;
  rows[kAddSum] = add_sum<T, factor_kind>;
}

template <class T, class... Ops>
constexpr void fill_dtype(RowTable& table, OpList<Ops...>) {
  (fill_forward<Ops, T>(table), ...);
  fill_backward<T, kFactorOwn>(table);
  if constexpr (has_opmath_dtype<T>) {
    fill_backward<T, kFactorMath>(table);
  }
  if constexpr (has_opmath_dtype<T>) {
    table.narrow[int(Type<T>::dtype)] = narrow_row<T>;
  }
  fill_backward<T, kFactorOne>(table);
  fill_backward<T, kNoFactor>(table);
}

constexpr RowTable make_table() {
  RowTable table = {};
  fill_dtype<Half>(table, AllOps{});
  fill_dtype<BFloat16>(table, AllOps{});
  fill_dtype<float>(table, AllOps{});
  fill_dtype<double>(table, AllOps{});
  fill_dtype<Complex<float>>(table, AllOps{});
  fill_dtype<Complex<double>>(table, AllOps{});
  return table;
}
