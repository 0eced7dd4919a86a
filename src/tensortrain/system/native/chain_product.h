// Cores of a product of two chains in one call: what `hadamard_core` in cores/algebra.py and `times_matrix_core` in
// cores/matrix.py make core by core.
#pragma once

#include "chain.h"

namespace tensortrain::chain {

// out = factor row.
TENSORTRAIN_WIDE inline void put_scaled(const double* __restrict row, double factor, Int n, double* __restrict out) {
  for (Int k = 0; k < n; ++k) out[k] = factor * row[k];
}

TENSORTRAIN_WIDE inline void put_scaled(const float* __restrict row, float factor, Int n, float* __restrict out) {
  for (Int k = 0; k < n; ++k) out[k] = factor * row[k];
}

// (r, n, s) and (t, n, u) to (r t, n, s u), entry by entry.
template <typename T>
void times_entries(const Core<T>& a, const Core<T>& b, T* out) {
  for (Int i = 0; i < a.r; ++i)
    for (Int l = 0; l < b.r; ++l)
      for (Int j = 0; j < a.n; ++j) {
        const T* const factors = a.data + (i * a.n + j) * a.s;
        const T* const row = b.data + (l * b.n + j) * b.s;
        for (Int k = 0; k < a.s; ++k, out += b.s) put_scaled(row, factors[k], b.s, out);
      }
}

// A core of a matrix, (r, i, j, s) row by row.
template <typename T>
struct MatrixCore {
  const T* data;
  Int r, i, j, s;
};

// What is made on the way of a product of matrices, kept from core to core.
template <typename T>
struct MatrixRoom {
  Buffer<T> left, right, made;
};

// (r, i, j, s) and (t, j, k, u) to (r t, i k, s u): one product (i s, j) (j, t k u) for every row r, then turned.
template <typename T>
void times_matrix(const MatrixCore<T>& a, const MatrixCore<T>& b, T* out, MatrixRoom<T>& room) {
  const Int t = b.r, j = b.i, k = b.j, u = b.s, s = a.s, width = t * k * u;
  room.right.resize(j * width), room.left.resize(a.i * s * j), room.made.resize(a.i * s * width);
  for (Int l = 0; l < t; ++l)
    for (Int m = 0; m < j; ++m)
      std::copy_n(b.data + (l * j + m) * k * u, k * u, room.right.data() + (m * t + l) * k * u);
  for (Int x = 0; x < a.r; ++x) {
    for (Int i = 0; i < a.i; ++i) turn(j, s, a.data + (x * a.i + i) * j * s, room.left.data() + i * s * j);
    multiply(false, false, a.i * s, width, j, room.left.data(), room.right.data(), room.made.data());
    for (Int l = 0; l < t; ++l)
      for (Int i = 0; i < a.i; ++i)
        for (Int n = 0; n < k; ++n)
          for (Int y = 0; y < s; ++y, out += u)
            std::copy_n(room.made.data() + (i * s + y) * width + (l * k + n) * u, u, out);
  }
}

}  // namespace tensortrain::chain
