// Included by each rows_*.cpp after its target pragma, inside namespace SI_ROWS.
// No include guard: one inclusion per translation unit, each for another instruction set.

// Rows are cut into chunks of this many elements, the lanes of every sum: the order of summation is the same for all
// instruction sets.
constexpr int kLanes = 16;

template <class M, class S>
SI_INLINE void load_chunk(M (&out)[kLanes], const S* in) {
  for (int lane = 0; lane < kLanes; ++lane) {
    out[lane] = widen(in[lane]);
  }
}

template <class T, class M>
SI_INLINE void store_chunk(T* out, const M (&in)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    out[lane] = narrow<T>(in[lane]);
  }
}

#if defined(SI_F16C)
// The compiler does not vectorise the scalar conversion instructions by itself.
SI_INLINE void load_chunk(float (&out)[kLanes], const Half* in) {
  for (int half = 0; half < kLanes; half += 8) {
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + half));
    _mm256_storeu_ps(out + half, _mm256_cvtph_ps(packed));
  }
}
SI_INLINE void store_chunk(Half* out, const float (&in)[kLanes]) {
  for (int half = 0; half < kLanes; half += 8) {
    const __m128i packed = _mm256_cvtps_ph(_mm256_loadu_ps(in + half), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + half), packed);
  }
}
#endif

template <class T, int kind>
struct Operand {
  using M = Math<T>;
  using S = std_conditional<kind == kOwn, T, M>;
  const S* data;
  M value;

  SI_INLINE explicit Operand(const void* pointer) : data(static_cast<const S*>(pointer)) {
    if constexpr (kind == kOne) {
      value = *static_cast<const M*>(pointer);
    }
  }
  SI_INLINE M at(int64_t i) const {
    if constexpr (kind == kOne) {
      return value;
    } else {
      return widen(data[i]);
    }
  }
  SI_INLINE void chunk(M (&out)[kLanes], int64_t i) const {
    if constexpr (kind == kOne) {
      for (int lane = 0; lane < kLanes; ++lane) {
        out[lane] = value;
      }
    } else {
      load_chunk(out, data + i);
    }
  }
};

template <class T>
struct Operand<T, kNoFactor> {
  using M = Math<T>;
  SI_INLINE explicit Operand(const void*) {}
};

template <class Op, class T, int first_kind, int second_kind, bool keep>
SI_INLINE void forward_loop(T* input, const void* first_data, const void* second_data, T* kept, Math<T> parameter,
                            int64_t n) {
  using M = Math<T>;
  const Operand<T, first_kind> first(first_data);
  const Operand<T, second_kind> second(second_data);
  int64_t i = 0;
  if constexpr (std_is_same<T, Half>) {
    for (; i + kLanes <= n; i += kLanes) {
      M x[kLanes], a[kLanes], b[kLanes];
      load_chunk(x, input + i);
      first.chunk(a, i);
      second.chunk(b, i);
      if constexpr (keep) {
        M old[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) {
          old[lane] = kept_value<Op>(x[lane], a[lane]);
        }
        store_chunk(kept + i, old);
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        x[lane] = Op::result(x[lane], a[lane], b[lane], parameter);
      }
      store_chunk(input + i, x);
    }
  }
  // An operand is either disjoint from the input or exactly it, so no iteration depends on another.
#pragma GCC ivdep
  for (int64_t j = i; j < n; ++j) {
    const M x = widen(input[j]);
    const M a = first.at(j);
    const M b = second.at(j);
    if constexpr (keep) {
      kept[j] = narrow<T>(kept_value<Op>(x, a));
    }
    input[j] = narrow<T>(Op::result(x, a, b, parameter));
  }
}

template <class Op, class T, int first_kind, int second_kind>
void forward_row(void* input, const void* first, const void* second, void* kept, const void* parameter, int64_t n) {
  const auto k = *static_cast<const Math<T>*>(parameter);
  auto* x = static_cast<T*>(input);
  if constexpr (Op::kept != Kept::Nothing) {
    if (kept != nullptr) {
      forward_loop<Op, T, first_kind, second_kind, true>(x, first, second, static_cast<T*>(kept), k, n);
      return;
    }
  }
  forward_loop<Op, T, first_kind, second_kind, false>(x, first, second, nullptr, k, n);
}

template <class T, int factor_kind>
SI_INLINE Math<T> term(Math<T> grad, const Operand<T, factor_kind>& factor, Math<T> multiplier, int64_t i) {
  if constexpr (factor_kind == kNoFactor) {
    return grad * multiplier;
  } else {
    return grad * conjugate(factor.at(i)) * multiplier;
  }
}

template <class T, int factor_kind>
SI_INLINE void term_chunk(Math<T> (&out)[kLanes], const T* grad, const Operand<T, factor_kind>& factor,
                          Math<T> multiplier, int64_t i) {
  using M = Math<T>;
  load_chunk(out, grad + i);
  if constexpr (factor_kind == kNoFactor) {
    for (int lane = 0; lane < kLanes; ++lane) {
      out[lane] = out[lane] * multiplier;
    }
  } else {
    M f[kLanes];
    factor.chunk(f, i);
    for (int lane = 0; lane < kLanes; ++lane) {
      out[lane] = out[lane] * conjugate(f[lane]) * multiplier;
    }
  }
}

template <class T, int factor_kind>
using FactorData = typename Operand<T, factor_kind == kNoFactor ? int(kOne) : factor_kind>::S;

template <class T, int factor_kind>
SI_INLINE Operand<T, factor_kind> factor_of_row(const BackwardBlock& block, int64_t row) {
  return Operand<T, factor_kind>(static_cast<const FactorData<T, factor_kind>*>(block.factor) +
                                 row * block.factor_stride);
}

template <class T, int factor_kind, class Out>
void store_rows(const BackwardBlock& block) {
  const auto k = *static_cast<const Math<T>*>(block.multiplier);
  for (int64_t row = 0; row < block.rows; ++row) {
    const T* grad = static_cast<const T*>(block.grad) + row * block.grad_stride;
    Out* target = static_cast<Out*>(block.target) + row * block.target_stride;
    const auto factor = factor_of_row<T, factor_kind>(block, row);
    int64_t i = 0;
    if constexpr (std_is_same<T, Half>) {
      for (; i + kLanes <= block.n; i += kLanes) {
        Math<T> value[kLanes];
        term_chunk(value, grad, factor, k, i);
        store_chunk(target + i, value);
      }
    }
    // The target is the gradient's own memory, the factor's, or disjoint from both.
#pragma GCC ivdep
    for (int64_t j = i; j < block.n; ++j) {
      target[j] = narrow<Out>(term(widen(grad[j]), factor, k, j));
    }
  }
}

template <class T, int factor_kind>
void add_columns(const BackwardBlock& block) {
  using M = Math<T>;
  const M k = *static_cast<const M*>(block.multiplier);
  const T* const grad = static_cast<const T*>(block.grad);
  // Rows that share a target are added in registers first: one pass over the target, and short chains of additions.
  const int64_t together = block.target_stride == 0 ? block.rows : 1;
  for (int64_t top = 0; top < block.rows; top += together) {
    M* target = static_cast<M*>(block.target) + top * block.target_stride;
    int64_t i = 0;
    for (; i + kLanes <= block.n; i += kLanes) {
      M sum[kLanes] = {};
      for (int64_t row = top; row < top + together; ++row) {
        M value[kLanes];
        term_chunk(value, grad + row * block.grad_stride, factor_of_row<T, factor_kind>(block, row), k, i);
        for (int lane = 0; lane < kLanes; ++lane) {
          sum[lane] = sum[lane] + value[lane];
        }
      }
      for (int lane = 0; lane < kLanes; ++lane) {
        target[i + lane] = target[i + lane] + sum[lane];
      }
    }
    for (; i < block.n; ++i) {
      M sum = {};
      for (int64_t row = top; row < top + together; ++row) {
        sum = sum + term(widen(grad[row * block.grad_stride + i]), factor_of_row<T, factor_kind>(block, row), k, i);
      }
      target[i] = target[i] + sum;
    }
  }
}

template <class T, int factor_kind>
void add_sum(const BackwardBlock& block) {
  using M = Math<T>;
  const M k = *static_cast<const M*>(block.multiplier);
  M* const target = static_cast<M*>(block.target);
  for (int64_t row = 0; row < block.rows; ++row) {
    const T* grad = static_cast<const T*>(block.grad) + row * block.grad_stride;
    const auto factor = factor_of_row<T, factor_kind>(block, row);
    M lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= block.n; i += kLanes) {
      M value[kLanes];
      term_chunk(value, grad, factor, k, i);
      for (int lane = 0; lane < kLanes; ++lane) {
        lanes[lane] = lanes[lane] + value[lane];
      }
    }
    for (int lane = 0; i < block.n; ++i, ++lane) {
      lanes[lane] = lanes[lane] + term(widen(grad[i]), factor, k, i);
    }
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int lane = 0; lane < width; ++lane) {
        lanes[lane] = lanes[lane] + lanes[lane + width];
      }
    }
    target[row * block.target_stride] = target[row * block.target_stride] + lanes[0];
  }
}

template <class T>
inline constexpr bool has_math_dtype = !std_is_same<T, Math<T>>;

template <class Op, class T>
constexpr void fill_forward(RowTable& table) {
  auto& rows = table.forward[op_index<Op>][int(Type<T>::dtype)];
  rows[kOwn][kOne] = forward_row<Op, T, kOwn, kOne>;
  rows[kOne][kOne] = forward_row<Op, T, kOne, kOne>;
  if constexpr (Op::operands == 2) {
    rows[kOwn][kOwn] = forward_row<Op, T, kOwn, kOwn>;
    rows[kOne][kOwn] = forward_row<Op, T, kOne, kOwn>;
  }
  if constexpr (has_math_dtype<T>) {
    rows[kMath][kOne] = forward_row<Op, T, kMath, kOne>;
    if constexpr (Op::operands == 2) {
      rows[kMath][kOwn] = forward_row<Op, T, kMath, kOwn>;
      rows[kMath][kMath] = forward_row<Op, T, kMath, kMath>;
      rows[kOwn][kMath] = forward_row<Op, T, kOwn, kMath>;
      rows[kOne][kMath] = forward_row<Op, T, kOne, kMath>;
    }
  }
}

template <class T, int factor_kind>
constexpr void fill_backward(RowTable& table) {
  auto& rows = table.backward[int(Type<T>::dtype)][factor_kind];
  rows[kStoreOwn] = store_rows<T, factor_kind, T>;
  if constexpr (has_math_dtype<T>) {
    rows[kStoreMath] = store_rows<T, factor_kind, Math<T>>;
  }
  rows[kAddColumns] = add_columns<T, factor_kind>;
  rows[kAddSum] = add_sum<T, factor_kind>;
}

template <class T, class... Ops>
constexpr void fill_dtype(RowTable& table, OpList<Ops...>) {
  (fill_forward<Ops, T>(table), ...);
  fill_backward<T, kFactorOwn>(table);
  if constexpr (has_math_dtype<T>) {
    fill_backward<T, kFactorMath>(table);
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
