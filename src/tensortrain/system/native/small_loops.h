// Included once for every set of instructions, see small_products.h: in a namespace of its own, with TT_TARGET the
// attribute of its functions. Therefore no "#pragma once".

// rows x (vectors * lanes) of C, in registers while the terms and k run. A has any strides, B and C lie row by row.
template <typename T, int rows, int vectors>
TT_TARGET inline __attribute__((always_inline)) void tile(int64_t k, int64_t n_terms, const T* const* as, int64_t a_at,
                                                          int64_t a_row, int64_t a_k, const T* const* bs, int64_t b_at,
                                                          int64_t b_row, T* c, int64_t c_row, bool adds) {
  typedef T Vector __attribute__((vector_size(32)));
  constexpr int lanes = 32 / sizeof(T);
  Vector sums[rows][vectors];
  TT_UNROLL
  for (int i = 0; i < rows; ++i)
    TT_UNROLL
    for (int v = 0; v < vectors; ++v) {
      if (adds)
        __builtin_memcpy(&sums[i][v], c + i * c_row + v * lanes, sizeof(Vector));
      else
        sums[i][v] = Vector{};
    }
  for (int64_t term = 0; term < n_terms; ++term) {
    const T* const a = as[term] + a_at;
    const T* const b = bs[term] + b_at;
    for (int64_t l = 0; l < k; ++l) {
      Vector right[vectors];
      TT_UNROLL
      for (int v = 0; v < vectors; ++v) __builtin_memcpy(&right[v], b + l * b_row + v * lanes, sizeof(Vector));
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
    for (int v = 0; v < vectors; ++v) __builtin_memcpy(c + i * c_row + v * lanes, &sums[i][v], sizeof(Vector));
}

// All rows of one or two columns of vectors. Eight to twelve sums keep both units for products busy.
template <typename T, int vectors, int most>
TT_TARGET inline void columns(int64_t m, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row, int64_t a_k,
                              const T* const* bs, int64_t b_at, int64_t b_row, T* c, int64_t c_row, bool adds) {
  int64_t i = 0;
  // Two sums of one or two rows keep no unit busy: seven or eight rows are taken as four and the others.
  for (; i + most <= m && !(most == 6 && (m - i == 7 || m - i == 8)); i += most)
    tile<T, most, vectors>(k, n_terms, as, i * a_row, a_row, a_k, bs, b_at, b_row, c + i * c_row, c_row, adds);
  for (; i + 4 <= m; i += 4)
    tile<T, 4, vectors>(k, n_terms, as, i * a_row, a_row, a_k, bs, b_at, b_row, c + i * c_row, c_row, adds);
  switch (m - i) {
    case 3:
      return tile<T, 3, vectors>(k, n_terms, as, i * a_row, a_row, a_k, bs, b_at, b_row, c + i * c_row, c_row, adds);
    case 2:
      return tile<T, 2, vectors>(k, n_terms, as, i * a_row, a_row, a_k, bs, b_at, b_row, c + i * c_row, c_row, adds);
    case 1:
      return tile<T, 1, vectors>(k, n_terms, as, i * a_row, a_row, a_k, bs, b_at, b_row, c + i * c_row, c_row, adds);
    default:
      return;
  }
}

// C (m x n) = or += the sum of all A (m x k) B (k x n), n a multiple of the lanes.
template <typename T>
TT_TARGET void product(int64_t m, int64_t n, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row,
                       int64_t a_k, const T* const* bs, int64_t b_row, T* c, int64_t c_row, bool adds) {
  constexpr int64_t lanes = 32 / sizeof(T);
  int64_t at = 0;
  for (; at + 2 * lanes <= n; at += 2 * lanes)
    columns<T, 2, 6>(m, k, n_terms, as, a_row, a_k, bs, at, b_row, c + at, c_row, adds);
  if (at < n) columns<T, 1, 8>(m, k, n_terms, as, a_row, a_k, bs, at, b_row, c + at, c_row, adds);
}

// The same where each B lies in panels: two vectors of each of its rows, one row after the other, then the next two.
// Columns of wide matrices lie on few lines of the cache otherwise.
template <typename T>
TT_TARGET void panel_product(int64_t m, int64_t n, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row,
                             int64_t a_k, const T* const* bs, T* c, int64_t c_row, bool adds) {
  constexpr int64_t lanes = 32 / sizeof(T);
  int64_t at = 0;
  for (; at + 2 * lanes <= n; at += 2 * lanes)
    columns<T, 2, 6>(m, k, n_terms, as, a_row, a_k, bs, at * k, 2 * lanes, c + at, c_row, adds);
  if (at < n) columns<T, 1, 8>(m, k, n_terms, as, a_row, a_k, bs, at * k, lanes, c + at, c_row, adds);
}

// c (rows x 4) = a (rows x k) times four rows of b, each with each; k a multiple of the lanes.
template <typename T, int rows>
TT_TARGET inline __attribute__((always_inline)) void dots(int64_t k, const T* a, int64_t a_row, const T* b,
                                                          int64_t b_row, T* c, int64_t c_row) {
  typedef T Vector __attribute__((vector_size(32)));
  constexpr int lanes = 32 / sizeof(T);
  Vector sums[rows][4];
  TT_UNROLL
  for (int i = 0; i < rows; ++i)
    TT_UNROLL
    for (int v = 0; v < 4; ++v) sums[i][v] = Vector{};
  for (int64_t l = 0; l < k; l += lanes) {
    Vector right[4];
    TT_UNROLL
    for (int v = 0; v < 4; ++v) __builtin_memcpy(&right[v], b + v * b_row + l, sizeof(Vector));
    TT_UNROLL
    for (int i = 0; i < rows; ++i) {
      Vector left;
      __builtin_memcpy(&left, a + i * a_row + l, sizeof(Vector));
      TT_UNROLL
      for (int v = 0; v < 4; ++v) sums[i][v] += left * right[v];
    }
  }
  TT_UNROLL
  for (int i = 0; i < rows; ++i)
    TT_UNROLL
    for (int v = 0; v < 4; ++v) {
      T total = 0;
      TT_UNROLL
      for (int at = 0; at < lanes; ++at) total += sums[i][v][at];
      c[i * c_row + v] = total;
    }
}

// The same for any number of rows of a.
template <typename T>
TT_TARGET void four_dots(int64_t m, int64_t k, const T* a, int64_t a_row, const T* b, int64_t b_row, T* c,
                         int64_t c_row) {
  int64_t i = 0;
  for (; i + 2 <= m; i += 2) dots<T, 2>(k, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row);
  if (i < m) dots<T, 1>(k, a + i * a_row, a_row, b, b_row, c + i * c_row, c_row);
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

// Columns of k numbers, lying `apart`, as rows of so many numbers: out (k, lanes), its rows `out_row` from each other.
template <typename T>
TT_TARGET void columns_to_rows(const T* columns, int64_t apart, int64_t k, T* out, int64_t out_row) {
  constexpr int64_t lanes = 32 / sizeof(T);
  int64_t l = 0;
#if defined(__GNUC__) && !defined(__clang__)
  if constexpr (sizeof(T) == 8) {
    typedef T Vector __attribute__((vector_size(32)));
    typedef long long Places __attribute__((vector_size(32)));
    constexpr Places even = {0, 4, 2, 6}, odd = {1, 5, 3, 7}, low = {0, 1, 4, 5}, high = {2, 3, 6, 7};
    for (; l + 4 <= k; l += 4) {
      Vector a[4];
      TT_UNROLL
      for (int j = 0; j < 4; ++j) __builtin_memcpy(&a[j], columns + j * apart + l, sizeof(Vector));
      const Vector first = __builtin_shuffle(a[0], a[1], even), second = __builtin_shuffle(a[0], a[1], odd);
      const Vector third = __builtin_shuffle(a[2], a[3], even), fourth = __builtin_shuffle(a[2], a[3], odd);
      const Vector rows[4] = {__builtin_shuffle(first, third, low), __builtin_shuffle(second, fourth, low),
                              __builtin_shuffle(first, third, high), __builtin_shuffle(second, fourth, high)};
      TT_UNROLL
      for (int j = 0; j < 4; ++j) __builtin_memcpy(out + (l + j) * out_row, &rows[j], sizeof(Vector));
    }
  }
#endif
  for (int64_t j = 0; j < lanes; ++j)
    for (int64_t at = l; at < k; ++at) out[at * out_row + j] = columns[j * apart + at];
}
