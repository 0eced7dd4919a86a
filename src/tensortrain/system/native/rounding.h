// Rounding of a chain in one call: triangles from the right, cuts from the left. See `_round_svd` in cores/rounding.py,
// which does the same core by core and stays the reference; all in double precision.
#pragma once

#include "chain.h"

#ifndef TENSORTRAIN_WITHOUT_BLAS
extern "C" TENSORTRAIN_WEAK void dormqr_(const char*, const char*, const int*, const int*, const int*, const double*,
                                         const int*, const double*, double*, const int*, double*, const int*, int*);
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

// What one cut leaves: the transpose of an orthonormal basis, (rank, p) row by row, and how much was left out.
struct Cut {
  Buffer<double> basis, values, carry;  // carry: the basis times what was cut, where it is known already
  Int rank = 0;
  double tail = 0, smallest = 0;
  bool is_identity = false;
};

// What is not zero of a core: a part (r, n, s) of it, row by row, that begins at these indices of its bonds.
struct Part {
  const double* data;
  Int from_r, r, from_s, s;
};

// A core of a sum is zero but for its blocks, and half of every product with it need not be made.
class CoreParts {
 public:
  CoreParts(const Core<double>& core, bool may_split) : core_(core) {
    if (may_split && core.r >= 2 * least && core.s >= 2 * least) find_rows();
    split();
  }

  const std::vector<Part>& all() const { return parts_; }

 private:
  static constexpr Int least = 16;  // below this a product takes no less time than that of the whole

  // The first and last column of every row that holds anything.
  void find_rows() {
    const auto [data, r, n, s] = core_;
    first_.assign(r, s), last_.assign(r, -1);
    for (Int i = 0; i < r; ++i)
      for (Int j = 0; j < n; ++j) {
        const double* const row = data + (i * n + j) * s;
        Int k = 0;
        while (k < first_[i] && row[k] == 0) ++k;
        first_[i] = k;
        for (k = s - 1; k > last_[i] && row[k] == 0;) --k;
        last_[i] = k;
      }
  }

  void split() {
    const Int r = core_.r, s = core_.s;
    Int from_r = 0, from_s = 0, end = 0;
    std::vector<Int> later(first_);  // the first column of this row and all after it
    for (Int i = static_cast<Int>(later.size()) - 1; i-- > 0;) later[i] = std::min(later[i], later[i + 1]);
    for (Int i = 0; i < static_cast<Int>(first_.size()); ++i) {
      const bool is_apart = end <= later[i] && i - from_r >= least && end - from_s >= least;
      if (is_apart && r - i >= least && s - end >= least) {
        parts_.push_back({nullptr, from_r, i - from_r, from_s, end - from_s});
        from_r = i, from_s = end;
      }
      end = std::max(end, last_[i] + 1);
    }
    parts_.push_back({core_.data, from_r, r - from_r, from_s, s - from_s});
    if (parts_.size() > 1) pack();
  }

  void pack() {
    Int size = 0;
    for (const auto& part : parts_) size += part.r * core_.n * part.s;
    packed_.resize(size);
    double* out = packed_.data();
    for (auto& part : parts_) {
      part.data = out;
      for (Int row = part.from_r * core_.n; row < (part.from_r + part.r) * core_.n; ++row, out += part.s)
        std::copy_n(core_.data + row * core_.s + part.from_s, part.s, out);
    }
  }

  Core<double> core_;
  std::vector<Part> parts_;
  std::vector<Int> first_, last_;
  Buffer<double> packed_;
};

class Rounding {
 public:
  // Cores after `hi` are right-orthogonal. With `squares` triangles come from Gram matrices, which is several times
  // faster and shows nothing below some 1e-8 of the whole.
  Rounding(Cores<double> cores, Int hi, bool squares) : cores_(std::move(cores)), hi_(hi), squares_(squares && can_square()) {
    for (const auto& core : cores_) is_safe = is_safe && is_moderate(core, limit);
    if (!is_safe) return;
    const Int last = static_cast<Int>(cores_.size()) - 1;
    parts_.reserve(cores_.size());
    for (Int k = 0; k <= last; ++k) parts_.emplace_back(cores_[k], k > 0 && k < last);
    find_roots();
  }

  double norm = 0;
  int64_t exponent = 0;
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
    current_.assign(cores_[0].data, cores_[0].data + cores_[0].size());
    Buffer<double> left{1.0};
    Int t = cores_[0].r;
    int64_t shift = 0, before = 0;
    std::vector<double> ends, inner;
    const double scale = norm > 0 ? norm : 1.0;
    for (Int k = 0; k < d; ++k) {
      inner.push_back(size_of(passed(left, k), right_sizes(k + 1), before + right_exponent(k + 1)));
      if (k == d - 1) break;
      const Int p = t * cores_[k].n;
      left = current_norms(k, p), before = shift;
      ends.push_back(size_of(left, right_sizes(k + 1), shift + right_exponent(k + 1)));
      const double whole = std::ldexp(scale, static_cast<int>(exponent - shift - right_exponent(k + 1)));
      auto found = cut_at(k, p, share * whole, caps[k + 1], needs_values);
      out.tails.push_back(found.tail / whole), out.smallest.push_back(found.smallest / whole);
      for (auto& x : found.values) x /= whole;
      out.cores.push_back({Buffer<double>(p * found.rank), t, cores_[k].n, found.rank});
      turn(found.rank, p, found.basis.data(), out.cores.back().data.data());
      out.values.push_back(std::move(found.values));
      advance(k, p, found);
      t = found.rank;
      if (!settle(current_, t * cores_[k + 1].n * cores_[k + 1].s, limit, shift)) is_safe = false;
    }
    const int64_t rest = shift - exponent;
    for (auto& x : current_) x = times_pow2(x, static_cast<int32_t>(std::clamp<int64_t>(rest, -1 << 20, 1 << 20)));
    out.cores.push_back({std::move(current_), t, cores_[d - 1].n, cores_[d - 1].s});
    for (Int k = 0; k + 1 < d; ++k) out.growth.push_back(growth_of(std::max({ends[k], inner[k], inner[k + 1]})));
    return out;
  }

 private:
  static constexpr double limit = 0.9 * std::numeric_limits<double>::max_exponent / 3;  // squares are taken, too

  // -- roots, from the right ----------------------------------------------------------------------------

  void find_roots() {
    roots_.resize(cores_.size() + 1);
    Buffer<double> carried(cores_[hi_].data, cores_[hi_].data + cores_[hi_].size());
    Int width = cores_[hi_].s;  // carried is (r, n, width)
    for (Int at = hi_; at > 0; --at) {
      const auto& core = cores_[at];
      auto& root = roots_[at];
      const Int rows = core.n * width;
      if (squares_) {
        root_by_squares(root, core.r, rows, carried.data());
      } else {
        root_by_reflections(root, core.r, rows, carried.data(), parts_[at].all()[0].r);
      }
      if (!settle(root.rows, root.rank * core.r, limit, exponent)) is_safe = false;
      root.exponent = exponent;
      root.sizes = column_norms(root.rows.data(), root.rank, core.r);
      if (!squares_) drop(root, core.r);
      carry_left(at - 1, root, carried);
      width = root.rank;
    }
    if (!settle(carried, static_cast<Int>(carried.size()), limit, exponent)) is_safe = false;
    double sum = 0;
    for (const double x : carried) sum += x * x;
    norm = std::sqrt(sum);
  }

  // carried (r, n, rank) = core root^T. BLAS is twice as fast at its transpose, which is then turned.
  void carry_left(Int at, const Root& root, Buffer<double>& carried) {
    const Int n = cores_[at].n, s = cores_[at].s, q = root.rank;
    carried.resize(cores_[at].r * n * q);
    for (const auto& part : parts_[at].all()) {
      const Int rows = part.r * n;
      double* const out = carried.data() + part.from_r * n * q;
      const Matrix<double> of_core{part.data, part.s}, of_root{root.rows.data() + part.from_s, s};
      if (rows * q < 4096) {
        multiply_into(out, q, of_core, Matrix<double>{of_root.data, s, true}, rows, q, part.s);
      } else {
        turned_.resize(rows * q);
        multiply_into(turned_.data(), rows, of_root, Matrix<double>{part.data, part.s, true}, q, rows, part.s);
        turn(q, rows, turned_.data(), out);
      }
    }
  }

  // The triangle of a matrix (rows, r) in columns, which it destroys. Where rows of a sum depend on those of its first
  // term, `first`, nothing is left of them once its reflections are done.
  void root_by_reflections(Root& root, Int r, Int rows, double* columns, Int first) {
    const Int rest = r - first;
    if (rest == 0 || rows <= first || !can_reflect() || !terms_depend_) {
      desk_.qr(rows, r, columns);
    } else {
      const auto before = norms_of_rows(columns + first * rows, rest, rows, rows);
      desk_.qr(rows, first, columns);
      reflect_rest(rows, first, rest, columns);
      const auto after = norms_of_rows(columns + first * rows + first, rest, rows - first, rows);
      const double share = 2.0 * unit * std::sqrt(static_cast<double>(first));
      bool counts = false;
      for (Int j = 0; j < rest; ++j) counts = counts || after[j] > share * before[j];
      if (!counts) {
        root.rank = first, root.rows.resize(first * r);
        for (Int k = 0; k < first; ++k)
          for (Int j = 0; j < r; ++j) root.rows[k * r + j] = j < k ? 0.0 : columns[j * rows + k];
        return;
      }
      terms_depend_ = false;  // nor will those of the cores before, as a rule
      small_desk_.qr(rows - first, rest, columns + first * rows + first, rows);
    }
    root.rank = std::min(rows, r);
    root.rows.resize(root.rank * r);
    lapack::triangle_rows(rows, r, columns, root.rows.data());
  }

#ifndef TENSORTRAIN_WITHOUT_BLAS
  static bool can_reflect() { return dormqr_ != nullptr; }

  // What `desk_` holds the reflections of, the first columns, on the ones after them.
  void reflect_rest(Int rows, Int first, Int rest, double* columns) {
    const int m = rows, n = rest, k = first, most = std::max<Int>(64 * rest, 64 * 65);
    int info = 0;
    double* const tau = desk_.tau.data();
    dormqr_("L", "T", &m, &n, &k, columns, &m, tau, columns + first * rows, &m, desk_.room(most), &most, &info);
  }
#else
  static bool can_reflect() { return false; }
  void reflect_rest(Int, Int, Int, double*) {}
#endif

  static Buffer<double> norms_of_rows(const double* a, Int m, Int n, Int row) {
    Buffer<double> out(m);
    for (Int i = 0; i < m; ++i) out[i] = std::sqrt(squares(a + i * row, n));
    return out;
  }

  // A root from the products of rows (r, n) with each other.
  void root_by_squares(Root& root, Int r, Int n, const double* rows) {
    gram_of(rows, r, n);
    const Int rank = factor_gram(r);
    if (is_triangle_) {
      root.rows.resize(r * r);
      for (Int k = 0; k < r; ++k)
        for (Int j = 0; j < r; ++j) root.rows[k * r + j] = j < k ? 0.0 : square_[j * r + k] * scales_[j];
    } else {
      root.rows.assign(factor_.begin(), factor_.begin() + rank * r);
      for (Int k = 0; k < rank; ++k)
        for (Int j = 0; j < r; ++j) root.rows[k * r + j] *= scales_[j];
    }
    root.rank = rank;
  }

  // gram_ (r, r) of rows (r, n), of which half is made twice.
  void gram_of(const double* rows, Int r, Int n) {
    gram_.resize(r * r);
    gram_part(rows, r, n, 0, r);
    for (Int i = 0; i < r; ++i)
      for (Int j = 0; j < i; ++j) gram_[j * r + i] = gram_[i * r + j];
  }

  // The lower triangle of rows from .. from + m, in squares and what lies left of them.
  void gram_part(const double* rows, Int r, Int n, Int from, Int m) {
    const Int half = m <= 64 ? m : (m / 2 + 7) / 8 * 8;
    const double* const mine = rows + from * n;
    if (half == m)
      return multiply_into(gram_.data() + from * r + from, r, {mine, n}, {mine, n, true}, m, m, n);
    gram_part(rows, r, n, from, half);
    gram_part(rows, r, n, from + half, m - half);
    multiply_into(gram_.data() + (from + half) * r + from, r, {mine + half * n, n}, {mine, n, true}, m - half, half, n);
  }

  // gram_ = D F^T F D with the diagonal D in scales_: F is the upper triangle in square_, by columns, and what lies
  // below it is of no use. Where rows are hardly independent F has rows in factor_, no triangle, as many as are more
  // than rounding.
  Int factor_gram(Int r) {
    scales_.resize(r);
    for (Int i = 0; i < r; ++i) scales_[i] = std::sqrt(std::max(0.0, gram_[i * r + i]));
    unit_gram_.resize(r * r);
    for (Int i = 0; i < r; ++i)
      for (Int j = 0; j < r; ++j) {
        const double size = scales_[i] * scales_[j];
        unit_gram_[i * r + j] = size > 0 ? gram_[i * r + j] / size : 0.0;
      }
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

  // -- cuts, from the left ------------------------------------------------------------------------------

  // What is carried is kept in the parts of its core: (p, s) each, one after the other.
  const double* current_part(Int p, const Part& part) const { return current_.data() + p * part.from_s; }

  Buffer<double> current_norms(Int k, Int p) const {
    Buffer<double> out;
    for (const auto& part : parts_[k].all()) {
      const auto found = column_norms(current_part(p, part), p, part.s);
      out.insert(out.end(), found.begin(), found.end());
    }
    return out;
  }

  // current_ of core k + 1, behind the basis that was found.
  void advance(Int k, Int p, Cut& found) {
    const Int s = cores_[k].s, n = cores_[k + 1].n, t = found.rank;
    const bool is_known = !found.carry.empty();
    if (is_known) carry_.swap(found.carry);
    carry_.resize(t * s);
    for (const auto& part : parts_[k].all()) {
      const double* const mine = current_part(p, part);
      if (is_known) break;
      if (found.is_identity)
        for (Int i = 0; i < p; ++i) std::copy_n(mine + i * part.s, part.s, carry_.data() + i * s + part.from_s);
      else
        multiply_into(carry_.data() + part.from_s, s, {found.basis.data(), p}, {mine, part.s}, t, part.s, p);
    }
    current_.resize(t * n * cores_[k + 1].s);
    for (const auto& part : parts_[k + 1].all())
      multiply_into(current_.data() + t * n * part.from_s, n * part.s, {carry_.data() + part.from_r, s},
                    {part.data, n * part.s}, t, n * part.s, part.r);
  }

  // At the bond behind core k.
  Cut cut_at(Int k, Int p, double delta, Int cap, bool needs_values) {
    const Root* const root = k + 1 <= hi_ ? &roots_[k + 1] : nullptr;
    const Int s = cores_[k].s, q = root ? root->rank : s;
    if (!squares_ && p >= s && q == s) return cut_unfolding(k, root, p, s, delta, cap, needs_values);
    matrix_.resize(p * q);  // (q, p): the transpose of what is cut
    double beta = 0;
    for (const auto& part : parts_[k].all()) {
      const double* const mine = current_part(p, part);
      if (root)
        multiply_into(matrix_.data(), p, {root->rows.data() + part.from_s, s}, {mine, part.s, true}, q, p, part.s, beta);
      else
        turn(p, part.s, mine, matrix_.data() + part.from_s * p);
      beta = 1;
    }
    return q <= p ? cut_tall(p, q, delta, cap, needs_values) : cut_wide(p, q, delta, cap, needs_values);
  }

  // Where a root is square, a QR of what was carried, (p, s), leaves a small matrix for all the rest.
  Cut cut_unfolding(Int k, const Root* root, Int p, Int s, double delta, Int cap, bool needs_values) {
    triangle_.resize(p * s);
    for (const auto& part : parts_[k].all())
      turn(p, part.s, current_part(p, part), triangle_.data() + part.from_s * p);
    desk_.qr(p, s, triangle_.data());
    Buffer<double> carry(s * s);
    lapack::triangle_rows(p, s, triangle_.data(), carry.data());
    reduced_ = carry;  // columns of its transpose, times the root
    if (root) multiply(false, true, s, s, s, carry.data(), root->rows.data(), reduced_.data());
    small_desk_.qr(s, s, reduced_.data());
    square_.assign(s * s, 0.0), is_triangle_ = true;
    for (Int j = 0; j < s; ++j) std::copy_n(reduced_.data() + j * s, j + 1, square_.data() + j * s);
    desk_.q(p, s, triangle_.data());
    Cut out;
    if (!needs_values && cap >= s && (out.smallest = least_value(s)) > delta) {
      out.rank = s, out.basis.swap(triangle_), out.carry = std::move(carry);
      return out;
    }
    decompose_square(s, delta);  // as in `cut_wide`
    choose(out, delta, cap);
    out.basis.resize(p * out.rank), out.carry.resize(out.rank * s);
    multiply(false, false, out.rank, p, s, u_.data(), triangle_.data(), out.basis.data());
    multiply(false, false, out.rank, s, s, u_.data(), carry.data(), out.carry.data());
    return out;
  }

  // matrix_ (p, q) by columns, p >= q.
  Cut cut_tall(Int p, Int q, double delta, Int cap, bool needs_values) {
    const bool may_keep_all = !needs_values && cap >= q, shows_all = may_keep_all && (squares_ || keeps_by_squares_);
    Cut out;
    if (squares_ || shows_all) gram_of(matrix_.data(), q, p);
    if (shows_all) {
      triangle_of_gram(q);
      if (keeps_all(out, p, q, delta)) return out;
      keeps_by_squares_ = false;  // nor at the bonds behind, as a rule
    }
    if (squares_) {
      decompose_gram(q, delta);
      choose(out, delta, cap);
      map_of_gram(out.rank, q, 2);
    } else {
      triangle_ = matrix_, is_triangle_ = true;
      desk_.qr(p, q, triangle_.data());
      square_.assign(q * q, 0.0);  // its columns
      for (Int j = 0; j < q; ++j) std::copy_n(triangle_.data() + j * p, j + 1, square_.data() + j * q);
      if (may_keep_all && (out.smallest = least_value(q)) > delta) {
        desk_.q(p, q, triangle_.data());
        out.rank = q, out.basis.swap(triangle_);
        return out;
      }
      decompose_square(q, delta);
      choose(out, delta, cap);
      if (s_[out.rank - 1] <= 1e-12 * s_[0]) return cut_whole(out, p, q);
      scaled_.resize(out.rank * q);
      for (Int i = 0; i < out.rank; ++i)
        for (Int j = 0; j < q; ++j) scaled_[i * q + j] = u_[i * q + j] / s_[i];
    }
    // u = a v / s, and a second such step
    out.basis.resize(p * out.rank);
    multiply(false, false, out.rank, p, q, scaled_.data(), matrix_.data(), out.basis.data());
    orthonormalize(out.basis, p, out.rank);
    return out;
  }

  // Singular values of what gram_ (q, q) is the square of, f^T f = v s^2 v^T, but for what is far below `delta`, from
  // f f^T = w s^2 w^T; w is left in columns of u_, the last one first.
  void decompose_gram(Int q, double delta) {
    double whole = 0;
    for (Int j = 0; j < q; ++j) whole += gram_[j * q + j];
    const Int k = factor_largest_first(gram_, q, 0.0, std::max(0.0025 * delta * delta, 4 * unit * whole));
    u_.resize(k * k), s_.resize(k);
    multiply(false, true, k, k, q, factor_.data(), factor_.data(), u_.data());
    if (!eigen(k)) is_safe = false;
    std::reverse(s_.begin(), s_.end());
    for (auto& x : s_) x = std::sqrt(std::max(x, 0.0));
  }

  // After `decompose_gram`: the leading rows of v^T, by the values to one power less, in scaled_.
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

  // Where no singular value of the matrix is small a triangle of its Gram matrix shows that nothing is to be cut, and
  // two steps with such triangles make it orthonormal.
  bool keeps_all(Cut& out, Int p, Int q, double delta) {
    const double least = least_value(q);
    double whole = 0;
    for (Int j = 0; j < q; ++j) whole += squares(square_.data() + j * q, j + 1);
    if (least <= delta || least <= 1e-6 * std::sqrt(whole)) return false;
    out.smallest = least, out.rank = q, out.basis.resize(p * q);
    // inverse_ holds columns: its rows are those of the transpose
    multiply(false, false, q, p, q, inverse_.data(), matrix_.data(), out.basis.data());
    orthonormalize(out.basis, p, q);
    return true;
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

  // matrix_ (p, q) by columns, p < q: the transpose has a triangle of side p.
  Cut cut_wide(Int p, Int q, double delta, Int cap, bool needs_values) {
    const bool may_keep_all = !needs_values && cap >= p;
    if (squares_) {
      gram_.resize(p * p);
      multiply(true, false, p, p, q, matrix_.data(), matrix_.data(), gram_.data());
      if (may_keep_all) triangle_of_gram(p);
    } else {
      triangle_.resize(p * q);
      turn(q, p, matrix_.data(), triangle_.data());
      desk_.qr(q, p, triangle_.data());
      square_.assign(p * p, 0.0);
      for (Int j = 0; j < p; ++j) std::copy_n(triangle_.data() + j * q, j + 1, square_.data() + j * p);
      is_triangle_ = true;
    }
    Cut out;
    if (may_keep_all && (out.smallest = least_value(p)) > delta) {
      out.rank = p, out.is_identity = true;
      out.basis.assign(p * p, 0.0);
      for (Int i = 0; i < p; ++i) out.basis[i * p + i] = 1.0;
      return out;
    }
    if (squares_) {
      decompose_gram(p, delta);
      choose(out, delta, cap);
      map_of_gram(out.rank, p, 1);
      out.basis = scaled_;
      orthonormalize(out.basis, p, out.rank);
      return out;
    }
    decompose_square(p, delta);  // r = w s v^T, and a = r^T q^T: v are its left singular vectors
    choose(out, delta, cap);
    out.basis.assign(u_.begin(), u_.begin() + out.rank * p);
    return out;
  }

  // By an SVD of the whole, at the rank that was found.
  Cut cut_whole(Cut out, Int p, Int q) {
    decompose(p, q, matrix_);
    out.basis.assign(u_.begin(), u_.begin() + p * out.rank);
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
    inverse_.assign(q * q, 0.0);
    for (Int j = 0; j < q; ++j) inverse_[j * q + j] = 1.0;
    const int side = q;
    const double one = 1.0;
    lapack::Of<double>::trsm_of("L", "U", "N", "N", &side, &side, &one, square_.data(), &side, inverse_.data(), &side);
    double sum = 0;
    for (const double x : inverse_) sum += x * x;
    return std::isfinite(sum) && sum > 0 ? 1.0 / std::sqrt(sum) : 0.0;
  }

  // Rows of u (k, p) that are nearly orthonormal: orthonormal to rounding, and not turned.
  void orthonormalize(Buffer<double>& u, Int p, Int k) {
    gram_of(u.data(), k, p);
    double deviation = 0;
    for (Int i = 0; i < k; ++i)
      for (Int j = 0; j < k; ++j) deviation += (gram_[i * k + j] - (i == j)) * (gram_[i * k + j] - (i == j));
    const int side = k;
    int info = 0;
    if (deviation < 0.25) {
      lapack::Of<double>::potrf_of("U", &side, gram_.data(), &side, &info);
      if (info == 0) return solve_rows(u, p, k);
    }
    desk_.qr(p, k, u.data());
    std::vector<bool> turned(k);
    for (Int j = 0; j < k; ++j) turned[j] = u[j * p + j] < 0;
    desk_.q(p, k, u.data());
    for (Int j = 0; j < k; ++j)
      if (turned[j])
        for (Int i = 0; i < p; ++i) u[j * p + i] = -u[j * p + i];
  }

  // Rows u (k, p) by the transposed inverse of the triangle in gram_, which lies near the identity. BLAS multiplies
  // four times as fast as it solves.
  void solve_rows(Buffer<double>& u, Int p, Int k) {
    const int side = k, rows = p;
    const double one = 1.0;
    const auto solve = [&](const int* m, double* b) {
      lapack::Of<double>::trsm_of("R", "U", "N", "N", m, &side, &one, gram_.data(), &side, b, m);
    };
    if (p < 4 * k || k < 16) return solve(&rows, u.data());
    inverse_.assign(k * k, 0.0);
    for (Int j = 0; j < k; ++j) inverse_[j * k + j] = 1.0;
    solve(&side, inverse_.data());
    turned_.swap(u);
    u.resize(k * p);
    multiply(false, false, k, p, k, inverse_.data(), turned_.data(), u.data());
  }

  // -- growth: `growths` in cores/tolerance.py ----------------------------------------------------------

  // Norms of the rows of what lies right of a bond.
  const Buffer<double>& right_sizes(Int bond) {
    if (bond <= hi_) return roots_[bond].sizes;
    ones_.assign(bond < static_cast<Int>(cores_.size()) ? cores_[bond].r : 1, 1.0);
    return ones_;
  }

  int64_t right_exponent(Int bond) const { return bond <= hi_ ? roots_[bond].exponent : 0; }

  Buffer<double> passed(const Buffer<double>& left, Int at) const {
    Buffer<double> squares(cores_[at].s, 0);
    for (const auto& part : parts_[at].all())
      pass(left.data() + part.from_r, part, cores_[at].n, squares.data() + part.from_s);
    for (auto& x : squares) x = std::sqrt(x);
    return squares;
  }

  TENSORTRAIN_LOOPS static void pass(const double* left, const Part& part, Int n, double* __restrict out) {
    const double* x = part.data;
    for (Int i = 0; i < part.r; ++i) {
      const double weight = left[i] * left[i];
      for (Int j = 0; j < n; ++j, x += part.s)
        for (Int k = 0; k < part.s; ++k) out[k] += weight * (x[k] * x[k]);
    }
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
  std::vector<CoreParts> parts_;
  Int hi_;
  bool squares_, is_triangle_ = true;
  bool terms_depend_ = true, keeps_by_squares_ = true;  // until a bond shows otherwise
  std::vector<Root> roots_;
  lapack::Desk<double> desk_, small_desk_;
  Buffer<double> matrix_, triangle_, square_, inverse_, scaled_, gram_, s_, u_, vt_, ones_, reduced_,
      current_, carry_, turned_, scales_, factor_, unit_gram_;
  double dropped_ = 0;
};

}  // namespace tensortrain::chain
