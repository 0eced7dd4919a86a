// Products of matrices with two small sides, some tens to a hundred, as chains have them: BLAS is made for square ones,
// and where its library does not know the processor well it reaches less than half its rate here.
#pragma once

#include "lapack.h"
#include "small_products.h"
#include "threads.h"

namespace tensortrain::chain {

using lapack::Buffer;
using lapack::Int;

// Loops of our own use vectors of 32 bytes: with wider ones BLAS is the faster.
inline bool has_wide_products() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const bool found = has_avx2() && !__builtin_cpu_supports("avx512f");
  return found;
#else
  return false;
#endif
}

// Columns from .. from + width of the rows `first` .. first + k of a matrix, row by row, `room` columns in each.
template <typename T>
TENSORTRAIN_LOOPS void pack_panel(const Matrix<T>& b, Int first, Int k, Int from, Int width, Int room, T* out) {
  if (!b.transposed) {
    const T* row = b.data + first * b.row + from;
    for (Int l = 0; l < k; ++l, row += b.row, out += room) {
      for (Int j = 0; j < width; ++j) out[j] = row[j];
      for (Int j = width; j < room; ++j) out[j] = 0;
    }
    return;
  }
  Int whole = 0;
  for (const auto turn = columns_to_rows<T>(); whole + lanes_of<T> <= width; whole += lanes_of<T>)
    turn(b.data + (from + whole) * b.row + first, b.row, k, out + whole, room);
  for (Int j = whole; j < room; ++j) {
    const T* const column = b.data + (from + j) * b.row + first;
    for (Int l = 0; l < k; ++l) out[l * room + j] = j < width ? column[l] : T(0);
  }
}

// c (m, n) = or += a (m, k) b (k, n) by one thread: blocks of b in panels, blocks of a that stay in the cache.
template <typename T>
void multiply_panels(T* c, Int ldc, const Matrix<T>& a, const Matrix<T>& b, Int m, Int n, Int k, bool adds) {
  constexpr Int lanes = lanes_of<T>, wide = 2 * lanes, k_block = 256, n_block = 32 * wide, m_block = 96;
  static thread_local Buffer<T> panels, edge;
  if (panels.empty()) panels.resize(k_block * n_block), edge.resize(m_block * lanes);
  const auto run = panel_product<T>();
  const Int a_row = a.transposed ? 1 : a.row, a_k = a.transposed ? a.row : 1;
  for (Int l = 0; l < k; l += k_block, adds = true) {
    const Int depth = std::min(k_block, k - l);
    for (Int j = 0; j < n; j += n_block) {
      const Int width = std::min(n_block, n - j), whole = width / lanes * lanes, rest = width - whole;
      for (Int at = 0; at < width;) {
        const Int room = whole - at >= wide ? wide : lanes;
        pack_panel(b, l, depth, j + at, std::min(room, width - at), room, panels.data() + at * depth);
        at += room;
      }
      for (Int i = 0; i < m; i += m_block) {
        const Int height = std::min(m_block, m - i);
        const T *const rows = a.data + i * a_row + l * a_k, *const first = panels.data();
        T* const out = c + i * ldc + j;
        if (whole) run(height, whole, depth, 1, &rows, a_row, a_k, &first, out, ldc, adds);
        if (rest == 0) continue;
        const T* const last = panels.data() + whole * depth;  // through room for whole vectors
        run(height, lanes, depth, 1, &rows, a_row, a_k, &last, edge.data(), lanes, false);
        for (Int y = 0; y < height; ++y)
          for (Int x = 0; x < rest; ++x) {
            T& to = out[y * ldc + whole + x];
            to = (adds ? to : T(0)) + edge[y * lanes + x];
          }
      }
    }
  }
}

template <typename T>
void put_zeros(T* c, Int ldc, Int m, Int n) {
  for (Int i = 0; i < m; ++i) std::fill_n(c + i * ldc, n, T(0));
}

// The same by all threads: each takes rows, or columns, or terms of the sums, whichever are the most.
template <typename T>
void multiply_wide(T* c, Int ldc, const Matrix<T>& a, const Matrix<T>& b, Int m, Int n, Int k, bool adds) {
  if (m * n * k < 500000) return multiply_panels(c, ldc, a, b, m, n, k, adds);
  const Int n_threads = at::get_num_threads();
  if (n_threads < 2) return multiply_panels(c, ldc, a, b, m, n, k, adds);
  const auto start_of = [&](Int part, Int size) { return part == n_threads ? size : part * size / n_threads / 24 * 24; };
  const auto moved = [](const Matrix<T>& x, Int rows, Int columns) {
    return Matrix<T>{x.data + (x.transposed ? columns * x.row + rows : rows * x.row + columns), x.row, x.transposed};
  };
  Buffer<T> sums(k >= std::max(m, n) ? (n_threads - 1) * m * n : 0);
  on_threads(n_threads, 1, true, [&](Int first, Int last) {
    for (Int part = first; part < last; ++part) {
      if (k >= std::max(m, n)) {
        const Int from = start_of(part, k), to = start_of(part + 1, k);
        T* const out = part ? sums.data() + (part - 1) * m * n : c;
        if (from == to) put_zeros(out, part ? n : ldc, m, part == 0 && adds ? 0 : n);
        multiply_panels(out, part ? n : ldc, moved(a, 0, from), moved(b, from, 0), m, n, to - from, part == 0 && adds);
      } else if (m >= n) {
        const Int from = start_of(part, m), to = start_of(part + 1, m);
        multiply_panels(c + from * ldc, ldc, moved(a, from, 0), b, to - from, n, k, adds);
      } else {
        const Int from = start_of(part, n), to = start_of(part + 1, n);
        multiply_panels(c + from, ldc, a, moved(b, 0, from), m, to - from, k, adds);
      }
    }
  });
  for (size_t part = 0; part < sums.size(); part += m * n)
    for (Int i = 0; i < m; ++i)
      for (Int j = 0; j < n; ++j) c[i * ldc + j] += sums[part + i * n + j];
}

// c (m, n) = or += a (m, k) b (k, n), by whoever is faster at it.
template <typename T>
void put_product(T* c, Int ldc, const Matrix<T>& a, const Matrix<T>& b, Int m, Int n, Int k, bool adds = false) {
  constexpr Int most = 128;  // of the second largest side
  const Int middle = std::max(std::min(m, n), std::min(std::max(m, n), k));
  if (m > 1 && n > 1 && k > 0 && middle <= most && has_wide_products())
    return multiply_wide(c, ldc, a, b, m, n, k, adds);
  multiply_into(c, ldc, a, b, m, n, k, T(adds));
}

}  // namespace tensortrain::chain
