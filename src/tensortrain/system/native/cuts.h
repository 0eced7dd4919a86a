// Small matrices behind a cut: their roots, singular values and orthonormal bases, all in double precision.
#pragma once

#include "chain.h"

#ifndef TENSORTRAIN_WITHOUT_BLAS
extern "C" TENSORTRAIN_WEAK void dsyevd_(const char*, const char*, const int*, double*, const int*, double*, double*,
                                         const int*, int*, const int*, int*);
#endif

namespace tensortrain::chain {

constexpr double unit = 1.2e-16;  // of rounding

TENSORTRAIN_WIDE inline double squares(const double* x, Int n) {
  double sums[8] = {};
  Int i = 0;
  for (; i + 8 <= n; i += 8)
    for (Int j = 0; j < 8; ++j) sums[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) sums[0] += x[i] * x[i];
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// x - scale v (v . x)
TENSORTRAIN_WIDE inline void reflect(const double* __restrict v, double* __restrict x, Int n, double scale) {
  double sums[8] = {};
  Int i = 0;
  for (; i + 8 <= n; i += 8)
    for (Int j = 0; j < 8; ++j) sums[j] += v[i + j] * x[i + j];
  for (; i < n; ++i) sums[0] += v[i] * x[i];
  const double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  const double factor = scale * sum;
  for (i = 0; i < n; ++i) x[i] -= factor * v[i];
}

// Takes the rows of a (m, n), times the factors that begin at f and lie n apart, away from x.
TENSORTRAIN_WIDE inline void take_away(const double* __restrict a, const double* __restrict f, Int m, Int n,
                                       double* __restrict x) {
  Int k = 0;
  for (; k + 4 <= m; k += 4) {
    const double f0 = f[k * n], f1 = f[(k + 1) * n], f2 = f[(k + 2) * n], f3 = f[(k + 3) * n];
    const double *a0 = a + k * n, *a1 = a0 + n, *a2 = a1 + n, *a3 = a2 + n;
    for (Int i = 0; i < n; ++i) x[i] -= (f0 * a0[i] + f1 * a1[i]) + (f2 * a2[i] + f3 * a3[i]);
  }
  for (; k < m; ++k)
    for (Int i = 0; i < n; ++i) x[i] -= f[k * n] * a[k * n + i];
}

// out = row weights factor, entry by entry.
TENSORTRAIN_WIDE inline void put_weighed(const double* __restrict row, const double* __restrict weights, double factor,
                                         Int n, double* __restrict out) {
  for (Int i = 0; i < n; ++i) out[i] = row[i] * (weights[i] * factor);
}

// What one cut leaves: the transpose of an orthonormal basis, (rank, p) row by row, and how much was left out.
struct Cut {
  Buffer<double> basis, values, carry;  // carry: the basis times what was cut, where it is known already
  Int rank = 0;
  double tail = 0, smallest = 0;
  bool is_identity = false, is_turned = false;  // the basis itself, (p, rank), and no transpose
};

class Cuts {
 public:
  bool is_safe = true;  // no number may have left the range, no factorization failed

 protected:
  // gram_ (r, r) of rows (r, n), of which half is made twice.
  void gram_of(const double* rows, Int r, Int n) {
    gram_.resize(r * r);
    half_product(gram_.data(), r, rows, rows, 0, r, n);
    mirror(gram_, r);
  }

  // What lies above the diagonal becomes what lies below it.
  static void mirror(Buffer<double>& square, Int r) {
    for (Int i = 0; i < r; ++i)
      for (Int j = 0; j < i; ++j) square[j * r + i] = square[i * r + j];
  }

  // The lower triangle of the products of rows from .. from + m of a and b, in squares and what lies left of them.
  static void half_product(double* out, Int row, const double* a, const double* b, Int from, Int m, Int n) {
    const Int half = m <= 64 ? m : (m / 2 + 7) / 8 * 8;
    const double *const left = a + from * n, *const right = b + from * n;
    if (half == m)
      return put_product(out + from * row + from, row, {left, n}, {right, n, true}, m, m, n);
    half_product(out, row, a, b, from, half, n);
    half_product(out, row, a, b, from + half, m - half, n);
    put_product(out + (from + half) * row + from, row, {left + half * n, n}, {right, n, true}, m - half, half, n);
  }

  // gram_ = D F^T F D with the diagonal D in scales_: F is the upper triangle in square_, by columns, and what lies
  // below it is of no use. Where rows are hardly independent F has rows in factor_, no triangle, as many as are more
  // than rounding.
  Int factor_gram(Int r) {
    scales_.resize(r);
    for (Int i = 0; i < r; ++i) scales_[i] = std::sqrt(std::max(0.0, gram_[i * r + i]));
    unit_gram_.resize(r * r), inverse_.resize(r);
    for (Int i = 0; i < r; ++i) inverse_[i] = scales_[i] > 1e-150 ? 1.0 / scales_[i] : 0.0;
    for (Int i = 0; i < r; ++i)
      put_weighed(gram_.data() + i * r, inverse_.data(), inverse_[i], r, unit_gram_.data() + i * r);
    square_ = unit_gram_;
    const int side = r;
    int info = 0;
    lapack::Of<double>::potrf_of("U", &side, square_.data(), &side, &info);
    double least = 1;
    for (Int j = 0; j < r && info == 0; ++j) least = std::min(least, square_[j * r + j]);
    is_triangle_ = info == 0 && least * least > 64 * unit;
    return is_triangle_ ? r : factor_largest_first(unit_gram_, r, 20 * unit, 0.0);
  }

  // Rows of factor_ whose products are a Gram matrix, by its largest remaining diagonal entry, until the largest is at
  // most `each`, or all that is left at most `all`, which goes to dropped_ as a norm.
  Int factor_largest_first(const Buffer<double>& gram, Int r, double each, double all) {
    factor_.resize(r * r);
    Buffer<double> rest(r);
    std::vector<bool> is_used(r, false);
    for (Int j = 0; j < r; ++j) rest[j] = gram[j * r + j];
    dropped_ = 0;
    for (Int k = 0; k < r; ++k) {
      const Int pivot = std::max_element(rest.begin(), rest.end()) - rest.begin();
      double left = 0;
      for (const double x : rest) left += std::max(x, 0.0);
      if (k && (rest[pivot] <= each || left <= all)) {
        dropped_ = std::sqrt(left);
        return k;
      }
      double* const row = factor_.data() + k * r;
      std::copy_n(gram.data() + pivot * r, r, row);
      take_away(factor_.data(), factor_.data() + pivot, k, r, row);
      const double head = std::sqrt(std::max(rest[pivot], 0.0));
      is_used[pivot] = true;
      for (Int j = 0; j < r; ++j) {
        row[j] = is_used[j] || head == 0 ? 0.0 : row[j] / head;
        rest[j] = is_used[j] ? -1.0 : rest[j] - row[j] * row[j];
      }
      row[pivot] = head;
    }
    return r;
  }

  // square_ from gram_: a triangle if it can be one.
  void triangle_of_gram(Int side) {
    const Int rank = factor_gram(side);
    if (is_triangle_) {
      for (Int j = 0; j < side; ++j) {
        for (Int i = 0; i <= j; ++i) square_[j * side + i] *= scales_[j];
        std::fill(square_.data() + j * side + j + 1, square_.data() + (j + 1) * side, 0.0);
      }
    } else {
      square_.assign(side * side, 0.0);
      for (Int j = 0; j < side; ++j)
        for (Int i = 0; i < rank; ++i) square_[j * side + i] = factor_[i * side + j] * scales_[j];
    }
  }

  // Rows of factor_ (k, q) whose products are gram_ (q, q), but for what is far below `delta`.
  Int reveal_gram(Int q, double delta) {
    double whole = 0;
    for (Int j = 0; j < q; ++j) whole += gram_[j * q + j];
    return factor_largest_first(gram_, q, 0.0, std::max(0.0025 * delta * delta, 16 * unit * whole));
  }

  // After `reveal_gram`: whether none of the values of its k rows f is to be cut. Then they are a basis once they are
  // orthonormal, in scaled_: by the inverse of their triangle, or of its square.
  bool keeps_revealed(Cut& out, Int k, Int q, double delta, int power) {
    if (k == q) return false;  // that none of all is cut was looked for before
    small_gram_.resize(k * k);
    multiply(false, true, k, k, q, factor_.data(), factor_.data(), small_gram_.data());
    double whole = 0;
    for (Int j = 0; j < k; ++j) whole += small_gram_[j * (k + 1)];
    const int side = k;
    int info = 0;
    lapack::Of<double>::potrf_of("U", &side, small_gram_.data(), &side, &info);
    if (info != 0) return false;
    const double least = 1.0 / norm_of_inverse(small_gram_, k);
    if (!(least > delta && least > 1e-6 * std::sqrt(whole))) return false;
    scaled_.resize(k * q);  // BLAS multiplies faster than it solves; inverse_ holds columns
    multiply(false, false, k, q, k, inverse_.data(), factor_.data(), scaled_.data());
    if (power == 2) {
      turned_.resize(k * q);
      multiply(true, false, k, q, k, inverse_.data(), scaled_.data(), turned_.data());
      scaled_.swap(turned_);
    }
    out.rank = k, out.tail = dropped_, out.smallest = least;
    return true;
  }

  // Singular values of what gram_ (q, q) is the square of, f^T f = v s^2 v^T with k rows from `reveal_gram`, from
  // f f^T = w s^2 w^T; w is left in columns of u_, the last one first.
  void decompose_revealed(Int k, Int q) {
    u_.resize(k * k), s_.resize(k);
    multiply(false, true, k, k, q, factor_.data(), factor_.data(), u_.data());
    if (!eigen(k)) is_safe = false;
    std::reverse(s_.begin(), s_.end());
    for (auto& x : s_) x = std::sqrt(std::max(x, 0.0));
  }

  // After `decompose_revealed`: the leading rows of v^T, by the values to one power less, in scaled_.
  void map_of_gram(Int rank, Int q, int power) {
    const Int k = static_cast<Int>(s_.size());
    Buffer<double> turns(rank * k);
    for (Int i = 0; i < rank; ++i) {
      const double size = s_[i] > 0 ? 1.0 / (power == 2 ? s_[i] * s_[i] : s_[i]) : 0.0;
      for (Int j = 0; j < k; ++j) turns[i * k + j] = u_[(k - 1 - i) * k + j] * size;
    }
    scaled_.resize(rank * q);
    multiply(false, false, rank, q, k, turns.data(), factor_.data(), scaled_.data());
  }

#ifndef TENSORTRAIN_WITHOUT_BLAS
  // Eigenvalues of u_ (k, k), ascending, to s_; the vectors take its place.
  bool eigen(Int k) {
    const int side = k, most = 1 + 6 * k + 2 * k * k, most_integers = 3 + 5 * k;
    if (static_cast<Int>(desk_.integers.size()) < most_integers) desk_.integers.resize(most_integers);
    int info = 0;
    dsyevd_("V", "U", &side, u_.data(), &side, s_.data(), desk_.room(most), &most, desk_.integers.data(),
            &most_integers, &info);
    for (const double x : s_) info = std::isfinite(x) ? info : 1;
    return info == 0;
  }

  static bool can_square() { return dsyevd_ != nullptr; }
#else
  bool eigen(Int) { return false; }
  static bool can_square() { return false; }
#endif

  void decompose(Int m, Int n, Buffer<double>& columns) {
    const Int t = std::min(m, n);
    s_.resize(t), u_.resize(m * t), vt_.resize(t * n);
    if (!desk_.svd(m, n, columns.data(), s_.data(), u_.data(), vt_.data())) is_safe = false;
  }

  // The triangle r in square_ = w s v^T: s_ and v, in columns of u_. What is far below `delta` is left out before the
  // SVD, which costs ten times as much as finding it; dropped_ is its norm.
  void decompose_square(Int q, double delta) {
    const Int rank = reveal(q, 0.05 * delta);
    reduced_.resize(q * rank);
    for (Int i = 0; i < rank; ++i)
      for (Int j = 0; j < q; ++j) reduced_[i * q + j] = square_[j * q + i];
    decompose(q, rank, reduced_);
  }

  // A QR factorization of square_ by its largest columns, until the rest has at most this norm: the rows found, which
  // take the place of the first ones; those of the rest are of no use any more.
  Int reveal(Int q, double most) {
    Buffer<double> rest(q), reflection(q);
    std::vector<bool> is_used(q, false);
    for (Int j = 0; j < q; ++j) rest[j] = squares(square_.data() + j * q, q);
    double measured = total(rest, is_used), now = measured;
    dropped_ = 0;
    for (Int k = 0; k < q; ++k) {
      if (now < 1e-6 * measured || now <= 2 * most * most) {  // differences have lost their digits
        for (Int j = 0; j < q; ++j)
          if (!is_used[j]) rest[j] = squares(square_.data() + j * q + k, q - k);
        measured = now = total(rest, is_used);
      }
      if (k && now <= most * most) {
        dropped_ = std::sqrt(now);
        return k;
      }
      Int pivot = 0;
      double largest = -1;
      for (Int j = 0; j < q; ++j)
        if (!is_used[j] && rest[j] > largest) largest = rest[j], pivot = j;
      is_used[pivot] = true;
      reflect(q, k, pivot, is_used, reflection);
      now = 0;
      for (Int j = 0; j < q; ++j)
        if (!is_used[j]) now += rest[j] = std::max(0.0, rest[j] - square_[j * q + k] * square_[j * q + k]);
    }
    return q;
  }

  // The reflection that leaves of column `pivot` nothing below row k, on all columns that are not used.
  void reflect(Int q, Int k, Int pivot, const std::vector<bool>& is_used, Buffer<double>& v) {
    double* const column = square_.data() + pivot * q;
    const double norm = std::sqrt(squares(column + k, q - k));
    if (norm == 0) return;
    const double head = column[k] > 0 ? -norm : norm;
    std::copy(column + k, column + q, v.begin());
    v[0] -= head;
    const double scale = 2.0 / squares(v.data(), q - k);
    column[k] = head;
    std::fill(column + k + 1, column + q, 0.0);
    for (Int j = 0; j < q; ++j)
      if (!is_used[j]) chain::reflect(v.data(), square_.data() + j * q + k, q - k, scale);
  }

  static double total(const Buffer<double>& rest, const std::vector<bool>& is_used) {
    double sum = 0;
    for (size_t j = 0; j < rest.size(); ++j) sum += is_used[j] ? 0.0 : rest[j];
    return sum;
  }

  // `choose_rank` in cores/linalg.py, with what was dropped behind the smallest value.
  void choose(Cut& out, double delta, Int cap) {
    const Int q = static_cast<Int>(s_.size());
    Buffer<double> tails(q);
    double sum = dropped_ * dropped_;
    for (Int k = q; k-- > 0;) tails[k] = std::sqrt(sum += s_[k] * s_[k]);
    Int rank = 0;
    while (rank < q && tails[rank] > delta) ++rank;
    out.rank = std::max<Int>(1, std::min({rank, cap, q}));
    out.tail = out.rank < q ? tails[out.rank] : dropped_;
    out.smallest = s_[out.rank - 1];
    out.values.assign(s_.begin(), s_.begin() + out.rank);
  }

  // Below the least singular value of the upper triangle in square_: 1 / ||inverse||.
  double least_value(Int q) {
    if (!is_triangle_) return 0.0;
    for (Int j = 0; j < q; ++j)
      if (square_[j * q + j] == 0) return 0.0;
    const double norm = norm_of_inverse(square_, q);
    return std::isfinite(norm) && norm > 0 ? 1.0 / norm : 0.0;
  }

  // Of an upper triangle (q, q) in columns, whose inverse stays in inverse_.
  double norm_of_inverse(const Buffer<double>& triangle, Int q) {
    inverse_.assign(q * q, 0.0);
    for (Int j = 0; j < q; ++j) inverse_[j * q + j] = 1.0;
    const int side = q;
    const double one = 1.0;
    lapack::Of<double>::trsm_of("L", "U", "N", "N", &side, &side, &one, triangle.data(), &side, inverse_.data(), &side);
    return std::sqrt(squares(inverse_.data(), q * q));
  }

  // Rows of u (k, p) that are nearly orthonormal: orthonormal to rounding, and not turned.
  void orthonormalize(Buffer<double>& u, Int p, Int k) {
    gram_of(u.data(), k, p);
    const int side = k;
    int info = 0;
    if (deviation_of(k) < 0.5) {
      lapack::Of<double>::potrf_of("U", &side, gram_.data(), &side, &info);
      if (info == 0) return solve_rows(u, p, k);
    }
    reflect_rows(u, p, k);
  }

  // How far gram_ (k, k) is from the identity.
  double deviation_of(Int k) const {
    double deviation = 0;
    for (Int i = 0; i < k; ++i)
      for (Int j = 0; j < k; ++j) deviation += (gram_[i * k + j] - (i == j)) * (gram_[i * k + j] - (i == j));
    return std::sqrt(deviation);
  }

  // Rows of u (k, p) orthonormal by reflections, and not turned.
  void reflect_rows(Buffer<double>& u, Int p, Int k) {
    desk_.qr(p, k, u.data());
    std::vector<bool> turned(k);
    for (Int j = 0; j < k; ++j) turned[j] = u[j * p + j] < 0;
    desk_.q(p, k, u.data());
    for (Int j = 0; j < k; ++j)
      if (turned[j])
        for (Int i = 0; i < p; ++i) u[j * p + i] = -u[j * p + i];
  }

  // Columns of u (p, k), row by row, orthonormal to rounding: one step where they nearly are, two or three where squares
  // could hardly tell the last of them from each other.
  void orthonormalize_columns(Buffer<double>& u, Int p, Int k) {
    const int side = k;
    for (Int step = 0; step < 3; ++step) {
      gram_.resize(k * k);
      put_product(gram_.data(), k, {u.data(), k, true}, {u.data(), k}, k, k, p);
      const bool is_near = deviation_of(k) < 0.5;
      int info = 0;
      lapack::Of<double>::potrf_of("U", &side, gram_.data(), &side, &info);
      for (Int j = 0; j < k && info == 0; ++j) info = gram_[j * k + j] < 1e-3;
      if (info != 0) break;
      invert_triangle(k);
      turned_.swap(u);
      u.resize(p * k);
      put_product(u.data(), k, {turned_.data(), k}, {inverse_.data(), k, true}, p, k, k);
      if (is_near) return;
    }
    turned_.resize(p * k);
    turn(p, k, u.data(), turned_.data());
    reflect_rows(turned_, p, k);
    turn(k, p, turned_.data(), u.data());
  }

  // inverse_ (k, k), by columns, of the upper triangle in gram_.
  void invert_triangle(Int k) {
    const int side = k;
    const double one = 1.0;
    inverse_.assign(k * k, 0.0);
    for (Int j = 0; j < k; ++j) inverse_[j * k + j] = 1.0;
    lapack::Of<double>::trsm_of("R", "U", "N", "N", &side, &side, &one, gram_.data(), &side, inverse_.data(), &side);
  }

  // Rows u (k, p) by the transposed inverse of the triangle in gram_, which lies near the identity. BLAS multiplies
  // four times as fast as it solves.
  void solve_rows(Buffer<double>& u, Int p, Int k) {
    const int side = k, rows = p;
    const double one = 1.0;
    if (p < 4 * k || k < 16)
      return lapack::Of<double>::trsm_of("R", "U", "N", "N", &rows, &side, &one, gram_.data(), &side, u.data(), &rows);
    invert_triangle(k);
    turned_.swap(u);
    u.resize(k * p);
    multiply(false, false, k, p, k, inverse_.data(), turned_.data(), u.data());
  }

  lapack::Desk<double> desk_;
  Buffer<double> triangle_, square_, inverse_, scaled_, gram_, s_, u_, vt_, reduced_, turned_, scales_, factor_,
      unit_gram_, small_gram_;
  bool is_triangle_ = true;
  double dropped_ = 0;
};

}  // namespace tensortrain::chain
