// The loops of recurrent.h, included once for every width of registers: no guard, no namespace of its own.

template <typename T>
struct Register {
  using Whole = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  typedef T Numbers __attribute__((vector_size(register_bytes)));
  typedef Whole Bits __attribute__((vector_size(register_bytes)));
  static constexpr int64_t count = register_bytes / sizeof(T);
};

#define TT_INLINE inline __attribute__((always_inline))

// 2^n, and e^r - 1 where x = n ln 2 + r with |r| <= ln 2 / 2: Taylor's series, exact to roundoff there.
template <typename T>
TT_INLINE void split_exponential(typename Register<T>::Numbers x, typename Register<T>::Numbers& power,
                                 typename Register<T>::Numbers& rest) {
  using Numbers = typename Register<T>::Numbers;
  using Bits = typename Register<T>::Bits;
  constexpr bool is_single = sizeof(T) == 4;
  // Added to a number, it leaves the whole part in the last bits.
  constexpr T whole = is_single ? T(12582912) : T(6755399441055744.0);
  constexpr T ln2_high = is_single ? T(0.693359375) : T(0.693147180369123816490);
  constexpr T ln2_low = is_single ? T(-2.12194440054690583e-4) : T(1.90821492927058770002e-10);
  const Numbers shifted = x * T(1.44269504088896340736) + whole;
  const Numbers n = shifted - whole, r = (x - n * ln2_high) - n * ln2_low;
  constexpr int degree = is_single ? 7 : 13;
  constexpr double inverse[] = {1,           1,           1.0 / 2,       1.0 / 6,        1.0 / 24,
                                1.0 / 120,   1.0 / 720,   1.0 / 5040,    1.0 / 40320,    1.0 / 362880,
                                1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0};
  Numbers sum = Numbers{} + T(inverse[degree]);
#pragma GCC unroll 16
  for (int k = degree - 1; k > 0; --k) sum = sum * r + T(inverse[k]);
  rest = sum * r;
  Bits bits;
  __builtin_memcpy(&bits, &shifted, sizeof(bits));
  constexpr int mantissa = is_single ? 23 : 52, bias = is_single ? 127 : 1023;
  T known = whole;
  typename Register<T>::Whole zero;
  __builtin_memcpy(&zero, &known, sizeof(zero));
  bits = (bits - zero + bias) << mantissa;
  __builtin_memcpy(&power, &bits, sizeof(bits));
}

// What is not a number stays so: the comparisons are false then.
template <typename T>
TT_INLINE typename Register<T>::Numbers within(typename Register<T>::Numbers x, T most) {
  using Numbers = typename Register<T>::Numbers;
  const Numbers high = Numbers{} + most, low = Numbers{} - most;
  x = high < x ? high : x;
  return x < low ? low : x;
}

template <typename T>
TT_INLINE typename Register<T>::Numbers sigmoid(typename Register<T>::Numbers x) {
  typename Register<T>::Numbers power, rest;
  split_exponential<T>(within<T>(-x, sizeof(T) == 4 ? T(87) : T(700)), power, rest);
  return T(1) / (T(1) + (power + power * rest));
}

// (e^2x - 1) / (e^2x + 1), the difference without cancellation
template <typename T>
TT_INLINE typename Register<T>::Numbers hyperbolic_tangent(typename Register<T>::Numbers x) {
  typename Register<T>::Numbers power, rest;
  split_exponential<T>(within<T>(x + x, T(44)), power, rest);
  const auto less = power * rest + (power - T(1));
  return less / (less + T(2));
}

// Up to a register's numbers from memory, and back.
template <typename T>
struct Some {
  using Numbers = typename Register<T>::Numbers;
  int64_t n;
  TT_INLINE Numbers of(const T* from) const {
    Numbers found{};
    if (n == Register<T>::count) {
      __builtin_memcpy(&found, from, sizeof(found));
    } else {
      T held[Register<T>::count] = {};
      for (int64_t k = 0; k < n; ++k) held[k] = from[k];
      __builtin_memcpy(&found, held, sizeof(found));
    }
    return found;
  }
  TT_INLINE void put(T* to, Numbers numbers) const {
    if (n == Register<T>::count) {
      __builtin_memcpy(to, &numbers, sizeof(numbers));
    } else {
      T held[Register<T>::count];
      __builtin_memcpy(held, &numbers, sizeof(numbers));
      for (int64_t k = 0; k < n; ++k) to[k] = held[k];
    }
  }
};

template <typename T, typename Work>
TT_INLINE void by_registers(int64_t size, const Work& work) {
  constexpr int64_t count = Register<T>::count;
  int64_t at = 0;
  for (; at + count <= size; at += count) work(at, Some<T>{count});
  if (at < size) work(at, Some<T>{size - at});
}

// One example's next state from what the input map (x) and the hidden map (u) gave. `kept` is for the way back.
template <typename T>
inline void step_forward(Kind kind, int64_t size, const T* x, const T* u, const Kept<T>& kept, T* h, T* c) {
  using Numbers = typename Register<T>::Numbers;
  const auto gate = [size](const T* row, int64_t k) { return row + k * size; };
  const int64_t f_at = kind == Kind::igfo ? 2 : 1, g_at = 3 - f_at;
  switch (kind) {
    case Kind::tanh:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        some.put(h + at, hyperbolic_tangent<T>(some.of(x + at) + some.of(u + at)));
      });
      break;
    case Kind::relu:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers sum = some.of(x + at) + some.of(u + at), zero{};
        some.put(h + at, sum < zero ? zero : sum);
      });
      break;
    case Kind::sigmoid:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        some.put(h + at, sigmoid<T>(some.of(x + at) + some.of(u + at)));
      });
      break;
    case Kind::linear:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        some.put(h + at, some.of(x + at) + some.of(u + at));
      });
      break;
    case Kind::gru:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers r = sigmoid<T>(some.of(gate(x, 0) + at) + some.of(gate(u, 0) + at));
        const Numbers z = sigmoid<T>(some.of(gate(x, 1) + at) + some.of(gate(u, 1) + at));
        const Numbers un = some.of(gate(u, 2) + at);
        const Numbers n = hyperbolic_tangent<T>(some.of(gate(x, 2) + at) + r * un);
        const Numbers before = some.of(h + at);
        some.put(h + at, n + z * (before - n));
        if (!kept.gates) return;
        some.put(kept.gates + at, r), some.put(kept.gates + size + at, z), some.put(kept.gates + 2 * size + at, n);
        some.put(kept.state + at, un);
      });
      break;
    case Kind::lstm:
    case Kind::igfo:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers i = sigmoid<T>(some.of(gate(x, 0) + at) + some.of(gate(u, 0) + at));
        const Numbers f = sigmoid<T>(some.of(gate(x, f_at) + at) + some.of(gate(u, f_at) + at));
        const Numbers g = hyperbolic_tangent<T>(some.of(gate(x, g_at) + at) + some.of(gate(u, g_at) + at));
        const Numbers o = sigmoid<T>(some.of(gate(x, 3) + at) + some.of(gate(u, 3) + at));
        const Numbers cell = f * some.of(c + at) + i * g;
        some.put(c + at, cell);
        some.put(h + at, o * hyperbolic_tangent<T>(cell));
        if (!kept.gates) return;
        some.put(kept.gates + at, i), some.put(kept.gates + f_at * size + at, f);
        some.put(kept.gates + g_at * size + at, g), some.put(kept.gates + 3 * size + at, o);
        some.put(kept.state + at, cell);
      });
      break;
  }
}

// The way back through it. dh, dc: gradients of the new state, replaced by those of the one before, what goes through the
// hidden map left out. dx, du: of what the two maps gave.
template <typename T>
inline void step_backward(Kind kind, int64_t size, const Kept<T>& kept, const T* h, const T* h_before,
                          const T* c_before, T* dh, T* dc, T* dx, T* du) {
  using Numbers = typename Register<T>::Numbers;
  const T* const gates = kept.gates;
  const int64_t f_at = kind == Kind::igfo ? 2 : 1, g_at = 3 - f_at;
  switch (kind) {
    case Kind::tanh:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers y = some.of(h + at);
        some.put(dx + at, some.of(dh + at) * (T(1) - y * y));
        some.put(dh + at, Numbers{});
      });
      break;
    case Kind::relu:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers zero{}, y = some.of(h + at);
        some.put(dx + at, y > zero ? some.of(dh + at) : zero);
        some.put(dh + at, zero);
      });
      break;
    case Kind::sigmoid:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers y = some.of(h + at);
        some.put(dx + at, some.of(dh + at) * y * (T(1) - y));
        some.put(dh + at, Numbers{});
      });
      break;
    case Kind::linear:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        some.put(dx + at, some.of(dh + at));
        some.put(dh + at, Numbers{});
      });
      break;
    case Kind::gru:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers r = some.of(gates + at), z = some.of(gates + size + at), n = some.of(gates + 2 * size + at);
        const Numbers dy = some.of(dh + at), dn = dy * (T(1) - z) * (T(1) - n * n);
        const Numbers dz = dy * (some.of(h_before + at) - n) * z * (T(1) - z);
        const Numbers dr = dn * some.of(kept.state + at) * r * (T(1) - r);
        some.put(dx + at, dr), some.put(dx + size + at, dz), some.put(dx + 2 * size + at, dn);
        some.put(du + at, dr), some.put(du + size + at, dz), some.put(du + 2 * size + at, dn * r);
        some.put(dh + at, dy * z);
      });
      break;
    case Kind::lstm:
    case Kind::igfo:
      by_registers<T>(size, [&](int64_t at, Some<T> some) __attribute__((always_inline)) {
        const Numbers i = some.of(gates + at), f = some.of(gates + f_at * size + at);
        const Numbers g = some.of(gates + g_at * size + at), o = some.of(gates + 3 * size + at);
        const Numbers y = hyperbolic_tangent<T>(some.of(kept.state + at)), dy = some.of(dh + at);
        const Numbers cell = some.of(dc + at) + dy * o * (T(1) - y * y);
        some.put(dx + at, cell * g * i * (T(1) - i));
        some.put(dx + f_at * size + at, cell * some.of(c_before + at) * f * (T(1) - f));
        some.put(dx + g_at * size + at, cell * i * (T(1) - g * g));
        some.put(dx + 3 * size + at, dy * y * o * (T(1) - o));
        some.put(dc + at, cell * f);
        some.put(dh + at, Numbers{});
      });
      break;
  }
}

#undef TT_INLINE
