// Rounding of a chain in one call: triangles from the right, cuts from the left. See `_round_svd` in cores/rounding.py,
// which does the same core by core and stays the reference; all in double precision.
#pragma once

#include "chain.h"

namespace tensortrain::chain {

constexpr double unit = 1.2e-16;  // of rounding

// A matrix known to have the products of what lies right of a bond: root root^T, rows (rank, r) of its transpose.
struct Root {
  Buffer<double> rows;
  Int rank = 0;
  int64_t exponent = 0;
  Buffer<double> sizes;  // norms of its r columns
};

TENSORTRAIN_LOOPS inline Buffer<double> column_norms(const double* a, Int m, Int n) {
  Buffer<double> squares(n, 0);
  double* const out = squares.data();
  for (Int i = 0; i < m; ++i)
    for (Int j = 0; j < n; ++j) out[j] += a[i * n + j] * a[i * n + j];
  for (auto& x : squares) x = std::sqrt(x);
  return squares;
}

// What one cut leaves: an orthonormal basis (p, rank), row by row, and how much was left out.
struct Cut {
  Buffer<double> basis, values;
  Int rank = 0;
  double tail = 0, smallest = 0;
  bool is_identity = false;
};

class Rounding {
 public:
  // Cores after `hi` are right-orthogonal.
  Rounding(Cores<double> cores, Int hi, double tolerance) : cores_(std::move(cores)), hi_(hi), tolerance_(tolerance) {
    for (const auto& core : cores_) is_safe = is_safe && is_moderate(core, limit);
    if (is_safe) find_roots();
  }

  double norm = 0;
  int64_t exponent = 0;
  double before = 0;    // relative size of what was dropped on the way
  bool is_safe = true;  // no number may have left the range, no factorization failed

  struct Result {
    std::vector<Made<double>> cores;
    std::vector<Buffer<double>> values;
    Buffer<double> tails, smallest, growth;
  };

  // Cuts to tails of `share` of the norm each. With `needs_values` every basis is one of singular vectors, whose
  // values come along; else a bond at which nothing is to be cut gets any basis.
  Result cut(double share, const std::vector<Int>& caps, bool needs_values) {
    const Int d = static_cast<Int>(cores_.size());
    Result out;
    Buffer<double> current(cores_[0].data, cores_[0].data + cores_[0].size());
    Buffer<double> left{1.0}, carry;
    Int t = cores_[0].r;
    int64_t shift = 0, before = 0;
    std::vector<double> ends, inner;
    const double scale = norm > 0 ? norm : 1.0;
    for (Int k = 0; k < d; ++k) {
      inner.push_back(size_of(passed(left, cores_[k]), right_sizes(k + 1), before + right_exponent(k + 1)));
      if (k == d - 1) break;
      const Int p = t * cores_[k].n, s = cores_[k].s;
      left = column_norms(current.data(), p, s), before = shift;
      ends.push_back(size_of(left, right_sizes(k + 1), shift + right_exponent(k + 1)));
      const double whole = std::ldexp(scale, static_cast<int>(exponent - shift - right_exponent(k + 1)));
      auto found = cut_at(k + 1, current, p, s, share * whole, caps[k + 1], needs_values);
      out.tails.push_back(found.tail / whole), out.smallest.push_back(found.smallest / whole);
      for (auto& x : found.values) x /= whole;
      const auto& next = cores_[k + 1];
      if (found.is_identity) {
        carry = current;
        found.basis.assign(p * p, 0.0);
        for (Int i = 0; i < p; ++i) found.basis[i * p + i] = 1.0;
      } else {
        carry.resize(found.rank * s);
        multiply(true, false, found.rank, s, p, found.basis.data(), current.data(), carry.data());
      }
      current.resize(found.rank * next.n * next.s);
      multiply(false, false, found.rank, next.n * next.s, s, carry.data(), next.data, current.data());
      if (!settle(current, found.rank * next.n * next.s, limit, shift)) is_safe = false;
      out.cores.push_back({std::move(found.basis), t, cores_[k].n, found.rank});
      out.values.push_back(std::move(found.values));
      t = found.rank;
    }
    const int64_t rest = shift - exponent;
    for (auto& x : current) x = times_pow2(x, static_cast<int32_t>(std::clamp<int64_t>(rest, -1 << 20, 1 << 20)));
    out.cores.push_back({std::move(current), t, cores_[d - 1].n, cores_[d - 1].s});
    for (Int k = 0; k + 1 < d; ++k) out.growth.push_back(growth_of(std::max({ends[k], inner[k], inner[k + 1]})));
    return out;
  }

 private:
  static constexpr double limit = 0.9 * std::numeric_limits<double>::max_exponent / 3;  // squares are taken, too

  void find_roots() {
    roots_.resize(cores_.size() + 1);
    Buffer<double> carried(cores_[hi_].data, cores_[hi_].data + cores_[hi_].size());
    Int width = cores_[hi_].s;  // carried is (r, n, width)
    for (Int at = hi_; at > 0; --at) {
      const auto& core = cores_[at];
      auto& root = roots_[at];
      const Int rows = core.n * width;
      desk_.qr(rows, core.r, carried.data());
      root.rank = std::min(rows, core.r);
      root.rows.resize(root.rank * core.r);
      lapack::triangle_rows(rows, core.r, carried.data(), root.rows.data());
      if (!settle(root.rows, root.rank * core.r, limit, exponent)) is_safe = false;
      root.exponent = exponent;
      root.sizes = column_norms(root.rows.data(), root.rank, core.r);
      drop(root, core.r);
      const auto& next = cores_[at - 1];
      carried.resize(next.r * next.n * root.rank);
      multiply(false, true, next.r * next.n, root.rank, next.s, next.data, root.rows.data(), carried.data());
      width = root.rank;
    }
    if (!settle(carried, static_cast<Int>(carried.size()), limit, exponent)) is_safe = false;
    double sum = 0;
    for (const double x : carried) sum += x * x;
    norm = std::sqrt(sum);
  }

  // Where rows of a core depend on others, their triangle has rows of nothing but rounding: smaller than what `qr`
  // itself gets wrong of every column. Then the root has a lower rank, and all that follows is smaller.
  void drop(Root& root, Int r) {
    const double share = 2.0 * unit * std::sqrt(static_cast<double>(root.rank));
    Buffer<double> left_out(r, 0);
    Int kept = 0;
    for (Int k = 0; k < root.rank; ++k) {
      const double* const row = root.rows.data() + k * r;
      bool counts = false;
      for (Int j = k; j < r && !counts; ++j)
        counts = left_out[j] + row[j] * row[j] > share * share * root.sizes[j] * root.sizes[j];
      if (counts) {
        if (kept != k) std::copy(row, row + r, root.rows.data() + kept * r);
        ++kept;
      } else {
        for (Int j = k; j < r; ++j) left_out[j] += row[j] * row[j];
      }
    }
    root.rank = std::max<Int>(kept, 1);
    root.rows.resize(root.rank * r);
  }

  Cut cut_at(Int bond, const Buffer<double>& current, Int p, Int s, double delta, Int cap, bool needs_values) {
    const Root* const root = bond <= hi_ ? &roots_[bond] : nullptr;
    const Int q = root ? root->rank : s;
    matrix_.resize(p * q);  // columns one after the other: the rows of its transpose
    if (root)
      multiply(false, true, q, p, s, root->rows.data(), current.data(), matrix_.data());
    else
      turn(p, s, current.data(), matrix_.data());
    return q <= p ? cut_tall(p, q, delta, cap, needs_values) : cut_wide(p, q, delta, cap, needs_values);
  }

  // matrix_ (p, q) by columns, p >= q.
  Cut cut_tall(Int p, Int q, double delta, Int cap, bool needs_values) {
    triangle_ = matrix_;
    desk_.qr(p, q, triangle_.data());
    square_.assign(q * q, 0.0);  // its columns
    for (Int j = 0; j < q; ++j) std::copy_n(triangle_.data() + j * p, j + 1, square_.data() + j * q);
    Cut out;
    if (!needs_values && cap >= q && (out.smallest = least_value(q)) > delta) {
      desk_.q(p, q, triangle_.data());
      out.rank = q, out.basis.resize(p * q);
      turn(q, p, triangle_.data(), out.basis.data());
      return out;
    }
    decompose_square(q, delta);
    choose(out, delta, cap);
    if (s_[out.rank - 1] <= 1e-12 * s_[0]) return cut_whole(out, p, q);
    // u = a v / s, rows (p, rank), and a second such step
    scaled_.resize(out.rank * q);
    for (Int i = 0; i < out.rank; ++i)
      for (Int j = 0; j < q; ++j) scaled_[i * q + j] = u_[i * q + j] / s_[i];
    out.basis.resize(p * out.rank);
    multiply(true, true, p, out.rank, q, matrix_.data(), scaled_.data(), out.basis.data());
    orthonormalize(out.basis, p, out.rank);
    return out;
  }

  // matrix_ (p, q) by columns, p < q: the transpose has a triangle of side p.
  Cut cut_wide(Int p, Int q, double delta, Int cap, bool needs_values) {
    triangle_.resize(p * q);
    turn(q, p, matrix_.data(), triangle_.data());
    desk_.qr(q, p, triangle_.data());
    square_.assign(p * p, 0.0);
    for (Int j = 0; j < p; ++j) std::copy_n(triangle_.data() + j * q, j + 1, square_.data() + j * p);
    Cut out;
    if (!needs_values && cap >= p && (out.smallest = least_value(p)) > delta) {
      out.rank = p, out.is_identity = true;
      return out;
    }
    decompose_square(p, delta);  // r = w s v^T, and a = r^T q^T: v are its left singular vectors
    choose(out, delta, cap);
    out.basis.resize(p * out.rank);
    turn(out.rank, p, u_.data(), out.basis.data());
    return out;
  }

  // By an SVD of the whole, at the rank that was found.
  Cut cut_whole(Cut out, Int p, Int q) {
    decompose(p, q, matrix_);
    out.basis.resize(p * out.rank);
    turn(out.rank, p, u_.data(), out.basis.data());
    for (Int k = 0; k < out.rank; ++k) out.values[k] = s_[k];
    return out;
  }

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
      if (!is_used[j]) subtract(v.data(), square_.data() + j * q + k, q - k, scale);
  }

  TENSORTRAIN_LOOPS static double squares(const double* x, Int n) {
    double sums[4] = {};
    Int i = 0;
    for (; i + 4 <= n; i += 4)
      for (Int j = 0; j < 4; ++j) sums[j] += x[i + j] * x[i + j];
    for (; i < n; ++i) sums[0] += x[i] * x[i];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // x - scale v (v . x)
  TENSORTRAIN_LOOPS static void subtract(const double* __restrict v, double* __restrict x, Int n, double scale) {
    double sums[4] = {};
    Int i = 0;
    for (; i + 4 <= n; i += 4)
      for (Int j = 0; j < 4; ++j) sums[j] += v[i + j] * x[i + j];
    for (; i < n; ++i) sums[0] += v[i] * x[i];
    const double factor = scale * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (i = 0; i < n; ++i) x[i] -= factor * v[i];
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
    for (Int j = 0; j < q; ++j)
      if (square_[j * q + j] == 0) return 0.0;
    inverse_.assign(q * q, 0.0);
    for (Int j = 0; j < q; ++j) inverse_[j * q + j] = 1.0;
    const int side = q;
    const double one = 1.0;
    lapack::Of<double>::trsm_of("L", "U", "N", "N", &side, &side, &one, square_.data(), &side, inverse_.data(), &side);
    double sum = 0;
    for (const double x : inverse_) sum += x * x;
    return std::isfinite(sum) && sum > 0 ? 1.0 / std::sqrt(sum) : 0.0;
  }

  // Columns of u (p, k), row by row, that are nearly orthonormal: orthonormal to rounding, and not turned.
  void orthonormalize(Buffer<double>& u, Int p, Int k) {
    gram_.resize(k * k);
    multiply(true, false, k, k, p, u.data(), u.data(), gram_.data());
    double deviation = 0;
    for (Int i = 0; i < k; ++i)
      for (Int j = 0; j < k; ++j) deviation += std::pow(gram_[i * k + j] - (i == j), 2);
    const int side = k, rows = p;
    int info = 0;
    const double one = 1.0;
    if (deviation < 0.25) {
      lapack::Of<double>::potrf_of("U", &side, gram_.data(), &side, &info);
      if (info == 0) {
        lapack::Of<double>::trsm_of("L", "U", "T", "N", &side, &rows, &one, gram_.data(), &side, u.data(), &side);
        return;
      }
    }
    Buffer<double> columns(p * k);
    turn(p, k, u.data(), columns.data());
    desk_.qr(p, k, columns.data());
    std::vector<bool> turned(k);
    for (Int j = 0; j < k; ++j) turned[j] = columns[j * p + j] < 0;
    desk_.q(p, k, columns.data());
    for (Int j = 0; j < k; ++j)
      for (Int i = 0; i < p; ++i) u[i * k + j] = turned[j] ? -columns[j * p + i] : columns[j * p + i];
  }

  // -- growth: `growths` in cores/tolerance.py ----------------------------------------------------------

  // Norms of the rows of what lies right of a bond.
  const Buffer<double>& right_sizes(Int bond) {
    if (bond <= hi_) return roots_[bond].sizes;
    ones_.assign(bond < static_cast<Int>(cores_.size()) ? cores_[bond].r : 1, 1.0);
    return ones_;
  }

  int64_t right_exponent(Int bond) const { return bond <= hi_ ? roots_[bond].exponent : 0; }

  TENSORTRAIN_LOOPS Buffer<double> passed(const Buffer<double>& left, const Core<double>& core) const {
    Buffer<double> squares(core.s, 0);
    double* const out = squares.data();
    for (Int i = 0; i < core.r; ++i) {
      const double weight = left[i] * left[i];
      const double* x = core.data + i * core.n * core.s;
      for (Int j = 0; j < core.n; ++j, x += core.s)
        for (Int k = 0; k < core.s; ++k) out[k] += weight * (x[k] * x[k]);
    }
    for (auto& x : squares) x = std::sqrt(x);
    return squares;
  }

  double size_of(const Buffer<double>& left, const Buffer<double>& right, int64_t power) const {
    double sum = 0;
    for (size_t k = 0; k < left.size(); ++k) sum += left[k] * right[k] * left[k] * right[k];
    const auto e = std::clamp<int64_t>(power - exponent, -4096, 4096);
    return std::ldexp(std::sqrt(sum), static_cast<int>(e)) / norm;
  }

  double growth_of(double found) const {
    constexpr double inf = std::numeric_limits<double>::infinity();
    if (std::isnan(found)) return norm > 0 ? inf : 1.0;
    return std::max(found, 1.0);
  }

  Cores<double> cores_;
  Int hi_;
  double tolerance_;
  std::vector<Root> roots_;
  lapack::Desk<double> desk_;
  Buffer<double> matrix_, triangle_, square_, inverse_, scaled_, gram_, s_, u_, vt_, ones_, reduced_;
  double dropped_ = 0;
};

}  // namespace tensortrain::chain
