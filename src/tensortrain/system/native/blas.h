// Products of plain matrices in memory, by the BLAS that comes with torch: without a tensor around each of them.
#pragma once

#include "threads.h"

#include <ATen/Parallel.h>

#include <cstdint>

// Weak: where torch exports none of them, the address is null and the way through tensors is taken.
#if defined(__GNUC__) || defined(__clang__)
#define TENSORTRAIN_WEAK __attribute__((weak))
#else
#define TENSORTRAIN_WEAK
#define TENSORTRAIN_WITHOUT_BLAS
#endif

#ifndef TENSORTRAIN_WITHOUT_BLAS
extern "C" {
TENSORTRAIN_WEAK void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                             const int*, const float*, const int*, const float*, float*, const int*);
TENSORTRAIN_WEAK void dgemm_(const char*, const char*, const int*, const int*, const int*, const double*,
                             const double*, const int*, const double*, const int*, const double*, double*, const int*);
TENSORTRAIN_WEAK void sgemv_(const char*, const int*, const int*, const float*, const float*, const int*, const float*,
                             const int*, const float*, float*, const int*);
TENSORTRAIN_WEAK void dgemv_(const char*, const int*, const int*, const double*, const double*, const int*,
                             const double*, const int*, const double*, double*, const int*);
TENSORTRAIN_WEAK int MKL_Set_Num_Threads_Local(int);  // gives what held before; 0 stands for the number of the process
}
#endif

namespace tensortrain {

#ifdef TENSORTRAIN_WITHOUT_BLAS
inline bool has_blas() { return false; }
struct OneThread {
  explicit OneThread(bool) {}
  static bool is_asked() { return true; }
};
template <typename T>
void blas_gemm(char, char, int, int, int, T, const T*, int, const T*, int, T, T*, int) {}
template <typename T>
void blas_gemv(char, int, int, T, const T*, int, const T*, int, T, T*, int) {}
#else
// While it lives, BLAS and LAPACK run on the thread that asked: waking others for a small matrix takes longer than the
// work.
class OneThread {
 public:
  explicit OneThread(bool is_small) : is_set_(is_small && MKL_Set_Num_Threads_Local != nullptr) {
    if (!is_set_) return;
    at::get_num_threads();  // torch asks BLAS how many threads there are when it is first asked itself: not in here
    before_ = MKL_Set_Num_Threads_Local(1), ++depth();
  }
  ~OneThread() {
    if (is_set_) MKL_Set_Num_Threads_Local(before_), --depth();
  }
  static bool is_asked() { return depth() > 0; }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  static int& depth() {
    static thread_local int depth = 0;
    return depth;
  }

  bool is_set_;
  int before_ = 0;
};

inline bool has_blas() { return sgemm_ != nullptr && dgemm_ != nullptr && sgemv_ != nullptr && dgemv_ != nullptr; }

inline void blas_gemm(char ta, char tb, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                      int ldb, float beta, float* c, int ldc) {
  sgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void blas_gemm(char ta, char tb, int m, int n, int k, double alpha, const double* a, int lda, const double* b,
                      int ldb, double beta, double* c, int ldc) {
  dgemm_(&ta, &tb, &m, &n, &k, &alpha, a, &lda, b, &ldb, &beta, c, &ldc);
}
inline void blas_gemv(char t, int m, int n, float alpha, const float* a, int lda, const float* x, int incx, float beta,
                      float* y, int incy) {
  sgemv_(&t, &m, &n, &alpha, a, &lda, x, &incx, &beta, y, &incy);
}
inline void blas_gemv(char t, int m, int n, double alpha, const double* a, int lda, const double* x, int incx,
                      double beta, double* y, int incy) {
  dgemv_(&t, &m, &n, &alpha, a, &lda, x, &incx, &beta, y, &incy);
}
#endif

// Up to so many multiplications one thread is the faster: a second one takes about three microseconds to wake.
constexpr int64_t products_of_one_thread = 500'000;

// A matrix as it lies in memory, row after row; `transposed` takes it as its transpose.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row;  // entries from one row to the next
  bool transposed = false;
};

// c (m, n) = beta c + a (m, k) b (k, n), rows of c lying ldc apart.
template <typename T>
void multiply_into(T* c, int64_t ldc, const Matrix<T>& a, const Matrix<T>& b, int64_t m, int64_t n, int64_t k,
                   T beta = T(0)) {
  const auto lda = static_cast<int>(a.row), ldb = static_cast<int>(b.row);
  const auto M = static_cast<int>(m), N = static_cast<int>(n), K = static_cast<int>(k);
  const OneThread alone(m * n * k <= products_of_one_thread);
  if (!OneThread::is_asked()) rouse();
  // BLAS takes columns one after the other: to it, all matrices are their transposes.
  if (m == 1) {
    blas_gemv(b.transposed ? 'T' : 'N', b.transposed ? K : N, b.transposed ? N : K, T(1), b.data, ldb, a.data,
              a.transposed ? lda : 1, beta, c, 1);
  } else if (n == 1) {
    blas_gemv(a.transposed ? 'N' : 'T', a.transposed ? M : K, a.transposed ? K : M, T(1), a.data, lda, b.data,
              b.transposed ? 1 : ldb, beta, c, static_cast<int>(ldc));
  } else {
    blas_gemm(b.transposed ? 'T' : 'N', a.transposed ? 'T' : 'N', N, M, K, T(1), b.data, ldb, a.data, lda, beta, c,
              static_cast<int>(ldc));
  }
}

}  // namespace tensortrain
