// Included once for every set of instructions, see small_products.h: in a namespace of its own, with TT_TARGET the
// attribute of its functions and TT_VECTOR_BYTES the size of its vectors. Therefore no "#pragma once".

// rows x vectors of C, in registers while the terms and k run. A has any strides, B and C lie row by row. The last vector
// begins at column `last`: where a matrix ends within a vector, that one begins earlier and shares columns with the other.
template <typename T, int rows, int vectors, int bytes>
TT_TARGET inline __attribute__((always_inline)) void tile(int64_t k, int64_t n_terms, const T* const* as, int64_t a_at,
                                                          int64_t a_row, int64_t a_k, const T* const* bs, int64_t b_at,
                                                          int64_t b_row, T* c, int64_t c_row, int64_t last, bool adds) {
  typedef T Vector __attribute__((vector_size(bytes)));
  constexpr int lanes = bytes / sizeof(T);
  const int64_t starts[2] = {vectors == 1 ? last : 0, last};
  static_assert(vectors <= 2 && lanes > 0, "one or two vectors");
  Vector sums[rows][vectors];
  TT_UNROLL
  for (int i = 0; i < rows; ++i)
    TT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      if (adds)
        __builtin_memcpy(&sums[i][v], c + i * c_row + starts[v], sizeof(Vector));
      else
        sums[i][v] = Vector{};
    }
  for (int64_t term = 0; term < n_terms; ++term) {
    const T* const a = as[term] + a_at;
    const T* const b = bs[term] + b_at;
    for (int64_t l = 0; l < k; ++l) {
      Vector right[vectors];
      TT_UNROLL
      for (int v = 0; v < vectors; ++v) __builtin_memcpy(&right[v], b + l * b_row + starts[v], sizeof(Vector));
      TT_UNROLL
      for (int i = 0; i < rows; ++i) {
        const T left = a[i * a_row + l * a_k];
        TT_UNROLL
        for (int v = 0; v < vectors; ++v) sums[i][v] += left * right[v];
      }
    }
  }
  TT_UNROLL
  for (int i = 0; i < rows; ++i)
    TT_UNROLL
    for (int v = 0; v < vectors; ++v) __builtin_memcpy(c + i * c_row + starts[v], &sums[i][v], sizeof(Vector));
}

// All rows of one or two columns of vectors. Eight to twelve sums keep both units for products busy; rows that are left
// over would not, so that all tiles get about as many.
template <typename T, int vectors, int most, int bytes>
TT_TARGET inline void columns(int64_t m, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row, int64_t a_k,
                              const T* const* bs, int64_t b_at, int64_t b_row, T* c, int64_t c_row, int64_t last,
                              bool adds) {
  int64_t n_tiles = (m + most - 1) / most;
  for (int64_t i = 0; i < m; --n_tiles) {
    const auto here = (m - i + n_tiles - 1) / n_tiles;
    switch (here) {
#define TT_ROWS(n)                                                                                                  \
  case n:                                                                                                           \
    if constexpr (n <= most)                                                                                        \
      tile<T, n, vectors, bytes>(k, n_terms, as, i * a_row, a_row, a_k, bs, b_at, b_row, c + i * c_row, c_row, last, \
                                 adds);                                                                             \
    break;
      TT_ROWS(1) TT_ROWS(2) TT_ROWS(3) TT_ROWS(4) TT_ROWS(5) TT_ROWS(6)
      TT_ROWS(7) TT_ROWS(8) TT_ROWS(9) TT_ROWS(10) TT_ROWS(11) TT_ROWS(12)
#undef TT_ROWS
    }
    i += here;
  }
}

// The same of two vectors of 32 bytes, which are one of 64.
template <typename T>
TT_TARGET inline void two_vectors(int64_t m, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row, int64_t a_k,
                                  const T* const* bs, int64_t b_at, int64_t b_row, T* c, int64_t c_row, bool adds) {
#if TT_VECTOR_BYTES == 64
  columns<T, 1, 12, 64>(m, k, n_terms, as, a_row, a_k, bs, b_at, b_row, c, c_row, 0, adds);
#else
  columns<T, 2, 6, 32>(m, k, n_terms, as, a_row, a_k, bs, b_at, b_row, c, c_row, 32 / sizeof(T), adds);
#endif
}

// All columns, by vectors of so many bytes. Columns that two vectors share are in one tile, or they would be added twice.
template <typename T, int most, int bytes>
TT_TARGET inline void by_vectors(int64_t m, int64_t n, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row,
                                 int64_t a_k, const T* const* bs, int64_t b_row, T* c, int64_t c_row, bool adds) {
  constexpr int64_t lanes = bytes / sizeof(T);
  int64_t at = 0;
  if ((n + lanes - 1) / lanes % 2 != 0) {
    columns<T, 1, 12, bytes>(m, k, n_terms, as, a_row, a_k, bs, 0, b_row, c, c_row, 0, adds);
    at = lanes;
  }
  for (; at < n; at += 2 * lanes) {
    const auto last = (at + 2 * lanes <= n ? at + lanes : n - lanes) - at;
    columns<T, 2, most, bytes>(m, k, n_terms, as, a_row, a_k, bs, at, b_row, c + at, c_row, last, adds);
  }
}

// C (m x n) = or += the sum of all A (m x k) B (k x n). No number outside the matrices is read or written.
template <typename T>
TT_TARGET void product(int64_t m, int64_t n, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row,
                       int64_t a_k, const T* const* bs, int64_t b_row, T* c, int64_t c_row, bool adds) {
  constexpr int64_t lanes = 32 / sizeof(T);
#if TT_VECTOR_BYTES == 64
  if (n >= 2 * lanes) return by_vectors<T, 12, 64>(m, n, k, n_terms, as, a_row, a_k, bs, b_row, c, c_row, adds);
#endif
  if (n >= lanes) return by_vectors<T, 6, 32>(m, n, k, n_terms, as, a_row, a_k, bs, b_row, c, c_row, adds);
  if (n >= lanes / 2) return by_vectors<T, 6, 16>(m, n, k, n_terms, as, a_row, a_k, bs, b_row, c, c_row, adds);
  for (int64_t at = 0; at < n; ++at)
    columns<T, 1, 8, sizeof(T)>(m, k, n_terms, as, a_row, a_k, bs, at, b_row, c + at, c_row, 0, adds);
}

// The same where each B lies in panels: two vectors of each of its rows, one row after the other, then the next two.
// Columns of wide matrices lie on few lines of the cache otherwise.
template <typename T>
TT_TARGET void panel_product(int64_t m, int64_t n, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row,
                             int64_t a_k, const T* const* bs, T* c, int64_t c_row, bool adds) {
  constexpr int64_t lanes = 32 / sizeof(T);
  int64_t at = 0;
  for (; at + 2 * lanes <= n; at += 2 * lanes)
    two_vectors<T>(m, k, n_terms, as, a_row, a_k, bs, at * k, 2 * lanes, c + at, c_row, adds);
  if (at < n) columns<T, 1, 8, 32>(m, k, n_terms, as, a_row, a_k, bs, at * k, lanes, c + at, c_row, 0, adds);
}

// c += a, n numbers.
template <typename T>
TT_TARGET void add_row(T* c, const T* a, int64_t n) {
  typedef T Vector __attribute__((vector_size(32)));
  constexpr int64_t lanes = 32 / sizeof(T);
  int64_t at = 0;
  for (; at + lanes <= n; at += lanes) {
    Vector sum, more;
    __builtin_memcpy(&sum, c + at, sizeof(Vector));
    __builtin_memcpy(&more, a + at, sizeof(Vector));
    sum += more;
    __builtin_memcpy(c + at, &sum, sizeof(Vector));
  }
  for (; at < n; ++at) c[at] += a[at];
}

// The sum of products of n numbers, in four vectors of sums at once.
template <typename T>
TT_TARGET T dot(const T* a, const T* b, int64_t n) {
  typedef T Vector __attribute__((vector_size(32)));
  constexpr int64_t lanes = 32 / sizeof(T), n_sums = 4;
  Vector sums[n_sums] = {};
  int64_t at = 0;
  for (; at + n_sums * lanes <= n; at += n_sums * lanes)
    TT_UNROLL
    for (int64_t k = 0; k < n_sums; ++k) {
      Vector left, right;
      __builtin_memcpy(&left, a + at + k * lanes, sizeof(Vector));
      __builtin_memcpy(&right, b + at + k * lanes, sizeof(Vector));
      sums[k] += left * right;
    }
  const Vector all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  T found(0);
  for (int64_t k = 0; k < lanes; ++k) found += all[k];
  for (; at < n; ++at) found += a[at] * b[at];
  return found;
}

#if defined(__GNUC__) && !defined(__clang__)
// A square of whole vectors, turned.
TT_TARGET inline void turn_square(const float* from, int64_t from_row, float* to, int64_t to_row) {
  typedef float Vector __attribute__((vector_size(32)));
  typedef int Places __attribute__((vector_size(32)));
  constexpr Places even = {0, 8, 1, 9, 4, 12, 5, 13}, odd = {2, 10, 3, 11, 6, 14, 7, 15};
  constexpr Places first = {0, 1, 8, 9, 4, 5, 12, 13}, second = {2, 3, 10, 11, 6, 7, 14, 15};
  constexpr Places low = {0, 1, 2, 3, 8, 9, 10, 11}, high = {4, 5, 6, 7, 12, 13, 14, 15};
  Vector a[8], b[8];
  TT_UNROLL
  for (int k = 0; k < 8; ++k) __builtin_memcpy(&a[k], from + k * from_row, sizeof(Vector));
  TT_UNROLL
  for (int k = 0; k < 8; k += 2) b[k] = __builtin_shuffle(a[k], a[k + 1], even), b[k + 1] = __builtin_shuffle(a[k], a[k + 1], odd);
  TT_UNROLL
  for (int k = 0; k < 8; k += 4)
    TT_UNROLL
    for (int one = 0; one < 2; ++one) {
      a[k + 2 * one] = __builtin_shuffle(b[k + one], b[k + 2 + one], first);
      a[k + 2 * one + 1] = __builtin_shuffle(b[k + one], b[k + 2 + one], second);
    }
  TT_UNROLL
  for (int k = 0; k < 4; ++k) {
    const Vector near = __builtin_shuffle(a[k], a[k + 4], low), far = __builtin_shuffle(a[k], a[k + 4], high);
    __builtin_memcpy(to + k * to_row, &near, sizeof(Vector));
    __builtin_memcpy(to + (k + 4) * to_row, &far, sizeof(Vector));
  }
}

TT_TARGET inline void turn_square(const double* from, int64_t from_row, double* to, int64_t to_row) {
  typedef double Vector __attribute__((vector_size(32)));
  typedef long long Places __attribute__((vector_size(32)));
  constexpr Places even = {0, 4, 2, 6}, odd = {1, 5, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
  Vector a[4];
  TT_UNROLL
  for (int k = 0; k < 4; ++k) __builtin_memcpy(&a[k], from + k * from_row, sizeof(Vector));
  const Vector first = __builtin_shuffle(a[0], a[1], even), second = __builtin_shuffle(a[0], a[1], odd);
  const Vector third = __builtin_shuffle(a[2], a[3], even), fourth = __builtin_shuffle(a[2], a[3], odd);
  const Vector rows[4] = {__builtin_shuffle(first, third, low), __builtin_shuffle(second, fourth, low),
                          __builtin_shuffle(first, third, high), __builtin_shuffle(second, fourth, high)};
  TT_UNROLL
  for (int k = 0; k < 4; ++k) __builtin_memcpy(to + k * to_row, &rows[k], sizeof(Vector));
}
#else
template <typename T>
TT_TARGET inline void turn_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int64_t lanes = 32 / sizeof(T);
  for (int64_t at = 0; at < lanes; ++at)
    for (int64_t k = 0; k < lanes; ++k) to[at * to_row + k] = from[k * from_row + at];
}
#endif

// A block (n_rows, n), turned.
template <typename T>
TT_TARGET void turn_block(int64_t n_rows, int64_t n, const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int64_t lanes = 32 / sizeof(T);
  const auto whole = n / lanes * lanes, whole_rows = n_rows / lanes * lanes;
  for (int64_t k = 0; k < whole_rows; k += lanes)
    for (int64_t at = 0; at < whole; at += lanes)
      turn_square(from + k * from_row + at, from_row, to + at * to_row + k, to_row);
  for (int64_t at = 0; at < n; ++at)
    for (auto k = at < whole ? whole_rows : 0; k < n_rows; ++k) to[at * to_row + k] = from[k * from_row + at];
}

// Columns of k numbers, lying `apart`, as rows of so many numbers: out (k, lanes), its rows `out_row` from each other.
template <typename T>
TT_TARGET void columns_to_rows(const T* columns, int64_t apart, int64_t k, T* out, int64_t out_row) {
  turn_block(int64_t{32 / sizeof(T)}, k, columns, apart, out, out_row);
}
