// BLAS and LAPACK as torch's CPU library brings them along, called on plain memory: for small matrices the dispatch of
// a torch operation takes longer than the product. Where a library does not export them, `has_lapack()` is false.
#pragma once

#include "blas.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

// Loops over entries gain from vectors; at -O2 older compilers do not make them.
#if defined(__GNUC__) && !defined(__clang__)
#define TENSORTRAIN_LOOPS __attribute__((optimize("O3")))
#else
#define TENSORTRAIN_LOOPS
#endif

// Where the loader can choose, one way of a loop for wide vectors and one for any machine.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__)
#define TENSORTRAIN_WIDE __attribute__((optimize("O3"), target_clones("avx2", "default")))
#else
#define TENSORTRAIN_WIDE
#endif

#ifndef TENSORTRAIN_WITHOUT_BLAS
#define TENSORTRAIN_DECLARE(T, gemm, trsm, geqrf, orgqr, gesdd, potrf)                                               \
  extern "C" {                                                                                                       \
  TENSORTRAIN_WEAK void gemm(const char*, const char*, const int*, const int*, const int*, const T*, const T*,       \
                             const int*, const T*, const int*, const T*, T*, const int*);                            \
  TENSORTRAIN_WEAK void trsm(const char*, const char*, const char*, const char*, const int*, const int*, const T*,   \
                             const T*, const int*, T*, const int*);                                                  \
  TENSORTRAIN_WEAK void geqrf(const int*, const int*, T*, const int*, T*, T*, const int*, int*);                     \
  TENSORTRAIN_WEAK void orgqr(const int*, const int*, const int*, T*, const int*, const T*, T*, const int*, int*);   \
  TENSORTRAIN_WEAK void gesdd(const char*, const int*, const int*, T*, const int*, T*, T*, const int*, T*,           \
                              const int*, T*, const int*, int*, int*);                                               \
  TENSORTRAIN_WEAK void potrf(const char*, const int*, T*, const int*, int*);                                        \
  }                                                                                                                  \
  namespace tensortrain::lapack {                                                                                    \
  template <>                                                                                                        \
  struct Of<T> {                                                                                                     \
    static bool is_there() { return gemm && trsm && geqrf && orgqr && gesdd && potrf; }                              \
    static constexpr auto gemm_of = [](auto... a) { gemm(a...); };                                                   \
    static constexpr auto trsm_of = [](auto... a) { trsm(a...); };                                                   \
    static constexpr auto geqrf_of = [](auto... a) { geqrf(a...); };                                                 \
    static constexpr auto orgqr_of = [](auto... a) { orgqr(a...); };                                                 \
    static constexpr auto gesdd_of = [](auto... a) { gesdd(a...); };                                                 \
    static constexpr auto potrf_of = [](auto... a) { potrf(a...); };                                                 \
  };                                                                                                                 \
  }

namespace tensortrain::lapack {
template <typename T>
struct Of;
}
TENSORTRAIN_DECLARE(double, dgemm_, dtrsm_, dgeqrf_, dorgqr_, dgesdd_, dpotrf_)
TENSORTRAIN_DECLARE(float, sgemm_, strsm_, sgeqrf_, sorgqr_, sgesdd_, spotrf_)
#else
namespace tensortrain::lapack {
template <typename T>
struct Of {
  static bool is_there() { return false; }
  static constexpr auto nothing = [](auto...) {};
  static constexpr auto gemm_of = nothing, trsm_of = nothing, geqrf_of = nothing, orgqr_of = nothing,
                        gesdd_of = nothing, potrf_of = nothing;
};
}  // namespace tensortrain::lapack
#endif

namespace tensortrain::lapack {

using Int = int64_t;

// Leaves numbers as they are that nobody gave: what a product writes need not be zero before.
template <typename T>
struct Unwritten : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Unwritten<U>;
  };
  template <typename U>
  void construct(U* at) {
    ::new (static_cast<void*>(at)) U;
  }
  template <typename U, typename... Args>
  void construct(U* at, Args&&... given) {
    ::new (static_cast<void*>(at)) U(std::forward<Args>(given)...);
  }
};

template <typename T>
using Buffer = std::vector<T, Unwritten<T>>;

inline bool has_lapack() { return Of<double>::is_there() && Of<float>::is_there(); }

// c (m, n) = op(a) op(b), row by row in memory; a is (m, k) or transposed (k, m), b is (k, n) or transposed (n, k).
template <typename T>
void multiply(bool a_turned, bool b_turned, Int m, Int n, Int k, const T* a, const T* b, T* c) {
  if (m == 0 || n == 0) return;
  const T one = 1, zero = 0;
  if (k == 0) {
    std::fill(c, c + m * n, zero);
    return;
  }
  if (m * n * k > products_of_one_thread && !OneThread::is_asked()) rouse();
  const int rows = n, columns = m, inner = k;  // LAPACK reads columns: the transposed product
  const int of_b = b_turned ? k : n, of_a = a_turned ? m : k;
  Of<T>::gemm_of(b_turned ? "T" : "N", a_turned ? "T" : "N", &rows, &columns, &inner, &one, b, &of_b, a, &of_a, &zero, c,
                 &rows);
}

// Rows become columns: (m, n) to (n, m), both row by row.
template <typename T>
TENSORTRAIN_LOOPS void turn(Int m, Int n, const T* __restrict a, T* __restrict out) {
  constexpr Int block = 16;
  for (Int i = 0; i < m; i += block)
    for (Int j = 0; j < n; j += block) {
      const Int i_end = std::min(i + block, m), j_end = std::min(j + block, n);
      for (Int y = j; y < j_end; ++y)
        for (Int x = i; x < i_end; ++x) out[y * m + x] = a[x * n + y];
    }
}

// Memory that LAPACK asks for, kept from call to call.
template <typename T>
struct Desk {
  Buffer<T> work, tau;
  std::vector<int> integers;

  T* room(Int n) {
    if (static_cast<Int>(work.size()) < n) work.resize(n);
    return work.data();
  }

  // a, columns one after the other (m each, n of them), becomes what LAPACK makes of it: R and reflections.
  // The columns begin `apart` from each other, m if left out.
  void qr(Int m, Int n, T* a, Int apart = 0) {
    if (static_cast<Int>(tau.size()) < std::min(m, n)) tau.resize(std::min(m, n));
    const int rows = m, columns = n, most = std::max<Int>(64 * n, 64), step = std::max(apart, m);
    int info = 0;
    if (rows && columns) Of<T>::geqrf_of(&rows, &columns, a, &step, tau.data(), room(most), &most, &info);
  }

  // The orthonormal factor (m, k) in place of what `qr` left, k = min(m, n).
  void q(Int m, Int k, T* a) {
    const int rows = m, columns = k, most = std::max<Int>(64 * k, 64);
    int info = 0;
    if (rows && columns) Of<T>::orgqr_of(&rows, &columns, &columns, a, &rows, tau.data(), room(most), &most, &info);
  }

  // Columns of a (m, n), destroyed; u (m, t), vt (t, n), columns one after the other, t = min(m, n).
  bool svd(Int m, Int n, T* a, T* s, T* u, T* vt) {
    const int rows = m, columns = n, t = std::min(m, n), big = std::max(m, n);
    const int most = 4 * t * t + 7 * t + std::max(big, 5 * t * t + 4 * t) + 64 * big;
    if (static_cast<Int>(integers.size()) < 8 * t) integers.resize(8 * t);
    int info = 0;
    Of<T>::gesdd_of("S", &rows, &columns, a, &rows, s, u, &rows, vt, &t, room(most), &most, integers.data(), &info);
    if (info != 0) return false;
    for (int k = 0; k < t; ++k)
      if (!std::isfinite(s[k])) return false;
    return true;
  }
};

// The upper triangle that `Desk::qr` left in columns of m, as rows (min(m, n), n).
template <typename T>
void triangle_rows(Int m, Int n, const T* a, T* out) {
  for (Int k = 0; k < std::min(m, n); ++k)
    for (Int j = 0; j < n; ++j) out[k * n + j] = j < k ? T(0) : a[j * m + k];
}

}  // namespace tensortrain::lapack
