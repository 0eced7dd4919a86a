// Rounding of a chain in one call: triangles from the right, cuts from the left. See `_round_svd` in cores/rounding.py,
// which does the same core by core and stays the reference; all in double precision.
#pragma once

#include "cuts.h"
#include "parts.h"


#ifndef TENSORTRAIN_WITHOUT_BLAS
extern "C" TENSORTRAIN_WEAK void dormqr_(const char*, const char*, const int*, const int*, const int*, const double*,
                                         const int*, const double*, double*, const int*, double*, const int*, int*);
#endif

namespace tensortrain::chain {

// A matrix known to have the products of what lies right of a bond: root root^T, rows (rank, r) of its transpose. Of a
// walk by squares these products themselves, (r, r).
struct Root {
  Buffer<double> rows;
  Int rank = 0;
  int64_t exponent = 0;
  Buffer<double> sizes;  // norms of its r columns
};

class Rounding : public Cuts {
 public:
  // Cores after `hi` are right-orthogonal. With `squares` Gram matrices take the place of triangles and of what is cut:
  // products of matrices alone meet the cores, which is several times faster and shows nothing below some 1e-8 of the
  // whole. See Al Daas, Ballard, Benner, "Parallel algorithms for tensor train arithmetic", 2022.
  Rounding(Cores<double> cores, Int hi, bool squares)
      : cores_(std::move(cores)), hi_(hi), squares_(squares && can_square()) {
    roots_.resize(cores_.size() + 1);
    const Int last = static_cast<Int>(cores_.size()) - 1;
    for (Int k = 0; k <= last; ++k) parts_.emplace_back(k > 0 && k < last);
    const OneThread alone(is_small());
    const LoneLoops loops(is_small());
    if (!is_small()) rouse();
    for (Int k = last; k > hi_ && is_safe; --k) load(k);
    if (is_safe) squares_ ? find_squares() : find_roots();
  }

  double norm = 0;
  int64_t exponent = 0;

  struct Result {
    std::vector<Made<double>> cores;
    std::vector<Buffer<double>> values;
    Buffer<double> tails, smallest, growth;
  };

  // Cuts to tails of `share` of the norm each. With `needs_values` every basis is one of singular vectors, whose
  // values come along; else a bond at which nothing is to be cut, or nothing but rounding, gets any basis.
  Result cut(double share, const std::vector<Int>& caps, bool needs_values) {
    const Int d = static_cast<Int>(cores_.size());
    const OneThread alone(is_small());
    const LoneLoops loops(is_small());
    if (!is_small()) rouse();
    Result out;
    load(0);
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
      if (squares_ && p >= cores_[k].s) multiply_current(k, p);
      left = current_norms(k, p), before = shift;
      ends.push_back(size_of(left, right_sizes(k + 1), shift + right_exponent(k + 1)));
      const double whole = std::ldexp(scale, static_cast<int>(exponent - shift - right_exponent(k + 1)));
      auto found = cut_at(k, p, share * whole, caps[k + 1], needs_values);
      out.tails.push_back(found.tail / whole), out.smallest.push_back(found.smallest / whole);
      for (auto& x : found.values) x /= whole;
      advance(k, p, found);
      out.values.push_back(std::move(found.values));
      if (!found.is_turned) {
        turned_.resize(p * found.rank);
        turn(found.rank, p, found.basis.data(), turned_.data());
        found.basis.swap(turned_);
      }
      out.cores.push_back({std::move(found.basis), t, cores_[k].n, found.rank});
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

  // Whether all products together take less time than it takes to wake another thread, or none is worth sharing.
  bool is_small() const {
    constexpr double most = 6e6;
    double all = 0;
    for (const auto& core : cores_) all += static_cast<double>(core.size() * std::max(core.r, core.s));
    return all <= most || are_small(cores_);
  }

  // The parts of core k can be read from here on, until another is loaded.
  void load(Int k) {
    if (!parts_[k].load(cores_[k], packed_, limit)) is_safe = false;
  }

  // -- roots, from the right ----------------------------------------------------------------------------

  void find_roots() {
    load(hi_);
    if (!is_safe) return;
    Buffer<double> carried(cores_[hi_].data, cores_[hi_].data + cores_[hi_].size());
    Int width = cores_[hi_].s;  // carried is (r, n, width)
    for (Int at = hi_; at > 0; --at) {
      const auto& core = cores_[at];
      auto& root = roots_[at];
      const Int rows = core.n * width;
      root_by_reflections(root, core.r, rows, carried.data(), parts_[at].all()[0].r);
      if (!settle(root.rows, root.rank * core.r, limit, exponent)) is_safe = false;
      root.exponent = exponent;
      root.sizes = column_norms(root.rows.data(), root.rank, core.r);
      drop(root, core.r);
      load(at - 1);
      if (!is_safe) return;
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
    const Int s = cores_[k].s;
    if (squares_ && p >= s) {
      for (Int j = 0; j < s; ++j) out.push_back(std::sqrt(std::max(products_[j * s + j], 0.0)));
      return out;
    }
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
        put_product(carry_.data() + part.from_s, s, {found.basis.data(), found.is_turned ? t : p, found.is_turned},
                      {mine, part.s}, t, part.s, p);
    }
    load(k + 1);
    current_.resize(t * n * cores_[k + 1].s);
    for (const auto& part : parts_[k + 1].all())
      put_product(current_.data() + t * n * part.from_s, n * part.s, {carry_.data() + part.from_r, s},
                    {part.data, n * part.s}, t, n * part.s, part.r);
  }

  // At the bond behind core k.
  Cut cut_at(Int k, Int p, double delta, Int cap, bool needs_values) {
    const Root* const root = k + 1 <= hi_ ? &roots_[k + 1] : nullptr;
    const Int s = cores_[k].s, q = root ? root->rank : s;
    if (squares_ && p >= s) return cut_products(k, root, p, delta, cap, needs_values);
    if (squares_) return cut_rows(k, root, p, delta, cap, needs_values);
    if (p >= s && q == s) return cut_unfolding(k, root, p, s, delta, cap, needs_values);
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
    const bool may_keep_all = !needs_values && cap >= q;
    Cut out;
    if (may_keep_all && keeps_by_squares_) {
      gram_of(matrix_.data(), q, p);
      triangle_of_gram(q);
      if (keeps_all(out, p, q, delta)) return out;
      keeps_by_squares_ = false;  // nor at the bonds behind, as a rule
    }
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
    // u = a v / s, and a second such step
    out.basis.resize(p * out.rank);
    multiply(false, false, out.rank, p, q, scaled_.data(), matrix_.data(), out.basis.data());
    orthonormalize(out.basis, p, out.rank);
    return out;
  }




  // Where no singular value of a matrix is small a triangle of its Gram matrix, in square_, shows that nothing is to be
  // cut.
  bool shows_all(Cut& out, Int q, double delta) {
    const double least = least_value(q);
    double whole = 0;
    for (Int j = 0; j < q; ++j) whole += squares(square_.data() + j * q, j + 1);
    if (least <= delta || least <= 1e-6 * std::sqrt(whole)) return false;
    out.smallest = least, out.rank = q;
    return true;
  }

  // Then two steps with such triangles make it orthonormal.
  bool keeps_all(Cut& out, Int p, Int q, double delta) {
    if (!shows_all(out, q, delta)) return false;
    out.basis.resize(p * q);
    // inverse_ holds columns: its rows are those of the transpose
    multiply(false, false, q, p, q, inverse_.data(), matrix_.data(), out.basis.data());
    orthonormalize(out.basis, p, q);
    return true;
  }


  // matrix_ (p, q) by columns, p < q: the transpose has a triangle of side p.
  Cut cut_wide(Int p, Int q, double delta, Int cap, bool needs_values) {
    triangle_.resize(p * q);
    turn(q, p, matrix_.data(), triangle_.data());
    desk_.qr(q, p, triangle_.data());
    square_.assign(p * p, 0.0);
    for (Int j = 0; j < p; ++j) std::copy_n(triangle_.data() + j * q, j + 1, square_.data() + j * p);
    is_triangle_ = true;
    Cut out;
    if (!needs_values && cap >= p && keeps_rows(out, p, delta)) return out;
    decompose_square(p, delta);  // r = w s v^T, and a = r^T q^T: v are its left singular vectors
    choose(out, delta, cap);
    out.basis.assign(u_.begin(), u_.begin() + out.rank * p);
    return out;
  }

  // Whether none of p rows, whose triangle is in square_, is to be cut: then they stay as they are.
  bool keeps_rows(Cut& out, Int p, double delta) {
    if ((out.smallest = least_value(p)) <= delta) return false;
    out.rank = p, out.is_identity = true;
    out.basis.assign(p * p, 0.0);
    for (Int i = 0; i < p; ++i) out.basis[i * p + i] = 1.0;
    return true;
  }

  // By an SVD of the whole, at the rank that was found.
  Cut cut_whole(Cut out, Int p, Int q) {
    decompose(p, q, matrix_);
    out.basis.assign(u_.begin(), u_.begin() + p * out.rank);
    for (Int k = 0; k < out.rank; ++k) out.values[k] = s_[k];
    return out;
  }










  // -- by squares -----------------------------------------------------------------------------------------

  void find_squares() {
    for (Int at = hi_; at > 0; --at) {
      auto& root = roots_[at];
      load(at);
      if (!is_safe) return;
      square_past(at, at < hi_ ? &roots_[at + 1] : nullptr, root.rows);
      root.rank = cores_[at].r;
      if (!settle_square(root.rows, root.rank * root.rank)) is_safe = false;
      root.exponent = exponent;
      for (Int i = 0; i < root.rank; ++i) root.sizes.push_back(std::sqrt(std::max(0.0, root.rows[i * (root.rank + 1)])));
    }
    Buffer<double> whole;
    load(0);
    if (!is_safe) return;
    square_past(0, hi_ > 0 ? &roots_[1] : nullptr, whole);
    double sum = 0;  // of all rows of the first core: there may be several
    for (Int i = 0; i < cores_[0].r; ++i) sum += std::max(0.0, whole[i * (cores_[0].r + 1)]);
    norm = std::sqrt(sum);
    // Where terms cancel, squares may show nothing of what is left: only triangles tell that from zero.
    if (!std::isfinite(norm) || norm == 0) is_safe = false;
  }

  // As `settle`, of numbers that are squares of those whose power of two goes to `exponent`.
  bool settle_square(Buffer<double>& x, Int n) {
    int64_t twice = 0;
    if (!settle(x, n, limit, twice)) return false;
    if (twice % 2) scale(x.data(), n, 1), twice -= 1;
    exponent += twice / 2;
    return true;
  }

  // gram (r, r) of what lies right of core `at` and with it, from that behind it: by blocks of what is not zero. Threads
  // take rows of it, cut the same way however many there are.
  void square_past(Int at, const Root* behind, Buffer<double>& gram) {
    const Int r = cores_[at].r, n = cores_[at].n, s = cores_[at].s;
    gram.assign(r * r, 0.0);
    struct Rows {
      const Part* part;
      Int first, last;
    };
    std::vector<Rows> rows;
    for (const auto& part : parts_[at].all()) {
      const Int middle = part.r < 24 ? 0 : (part.r * 9 / 16 + 3) / 4 * 4;  // the first rows need fewer columns
      if (middle) rows.push_back({&part, 0, middle});
      rows.push_back({&part, middle, part.r});
    }
    std::reverse(rows.begin(), rows.end());  // the longest first
    on_threads(static_cast<Int>(rows.size()), 1, !is_small() && r * n * s * s > 100000, [&](Int from, Int to) {
      const OneThread alone(true);
      Buffer<double> state;
      for (; from < to; ++from) square_rows(at, behind, *rows[from].part, rows[from].first, rows[from].last, state, gram);
    });
    mirror(gram, r);
  }

  // Rows first .. last of a part, of the lower triangle of gram.
  void square_rows(Int at, const Root* behind, const Part& a, Int first, Int last, Buffer<double>& state,
                   Buffer<double>& gram) const {
    const Int r = cores_[at].r, n = cores_[at].n, s = cores_[at].s, m = last - first;
    for (const auto& b : parts_[at].all()) {
      if (&b > &a || (!behind && &a != &b)) continue;
      const double* rows = a.data + first * n * a.s;
      if (behind) {
        state.resize(m * n * b.s);
        put_product(state.data(), b.s, {rows, a.s}, {behind->rows.data() + a.from_s * s + b.from_s, s}, m * n, b.s, a.s);
        rows = state.data();
      }
      put_product(gram.data() + (a.from_r + first) * r + b.from_r, r, {rows, n * b.s}, {b.data, n * b.s, true}, m,
                  &a == &b ? last : b.r, n * b.s);
    }
  }

  // products_ (s, s) of the columns of what is carried.
  void multiply_current(Int k, Int p) {
    const Int s = cores_[k].s;
    products_.assign(s * s, 0.0);
    const auto& parts = parts_[k].all();
    for (const auto& a : parts)
      for (const auto& b : parts) {
        if (&b > &a) continue;
        put_product(products_.data() + a.from_s * s + b.from_s, s, {current_part(p, a), a.s, true},
                      {current_part(p, b), b.s}, a.s, b.s, p);
      }
    mirror(products_, s);
  }

  // What is carried, (p, s) with p >= s, by its products.
  Cut cut_products(Int k, const Root* root, Int p, double delta, Int cap, bool needs_values) {
    const Int s = cores_[k].s;
    Int q = s;
    if (root) {
      q = factor_root(root->rows, s);
      half_.resize(q * s), gram_.resize(q * q);
      multiply(false, false, q, s, s, right_.data(), products_.data(), half_.data());
      multiply(false, true, q, q, s, half_.data(), right_.data(), gram_.data());
      mirror(gram_, q);
    } else {
      gram_ = products_;
    }
    Cut out;
    if (!map_all(out, q, delta, !needs_values && cap >= q)) map_kept(out, q, delta, cap, needs_values, 2);
    if (root) {
      half_.resize(out.rank * s);
      multiply(false, false, out.rank, s, q, scaled_.data(), right_.data(), half_.data());
      half_.swap(scaled_);
    }
    place_columns(out, k, p);
    return out;
  }

  // right_ (q, s): a root of what lies right of a bond.
  Int factor_root(const Buffer<double>& gram, Int s) {
    gram_ = gram;
    const Int q = factor_gram(s);
    right_.resize(q * s);
    for (Int i = 0; i < q; ++i)
      for (Int j = 0; j < s; ++j)
        right_[i * s + j] = !is_triangle_ ? factor_[i * s + j] * scales_[j] : j < i ? 0.0 : square_[j * s + i] * scales_[j];
    return q;
  }

  // Whether nothing is to be cut; then scaled_ (q, q) makes what gram_ is of orthonormal.
  bool map_all(Cut& out, Int q, double delta, bool may_keep_all) {
    if (!may_keep_all || !keeps_by_squares_) return false;
    triangle_of_gram(q);
    keeps_by_squares_ = shows_all(out, q, delta);  // nor at the bonds behind, as a rule
    if (keeps_by_squares_) scaled_ = inverse_;     // it holds columns: its rows are those of the transpose
    return keeps_by_squares_;
  }

  // What is kept of gram_ (q, q): rows in scaled_, by singular values to one power less where these are needed.
  void map_kept(Cut& out, Int q, double delta, Int cap, bool needs_values, int power) {
    const Int k = reveal_gram(q, delta);
    if (!needs_values && cap >= k && keeps_revealed(out, k, q, delta, power)) return;
    decompose_revealed(k, q);
    choose(out, delta, cap);
    map_of_gram(out.rank, q, power);
  }

  // The basis (p, rank), row by row, of what is carried times the transpose of scaled_ (rank, s).
  void place_columns(Cut& out, Int k, Int p) {
    const Int s = cores_[k].s, rank = out.rank;
    out.basis.resize(p * rank);
    bool adds = false;
    for (const auto& part : parts_[k].all()) {
      put_product(out.basis.data(), rank, {current_part(p, part), part.s}, {scaled_.data() + part.from_s, s, true}, p,
                    rank, part.s, adds);
      adds = true;
    }
    orthonormalize_columns(out.basis, p, rank);
    out.is_turned = true;
  }

  // What is carried, (p, s) with p < s: few rows, whose products take the place of those of its columns.
  Cut cut_rows(Int k, const Root* root, Int p, double delta, Int cap, bool needs_values) {
    const Int s = cores_[k].s;
    gram_.resize(p * p);
    bool sums = false;
    for (const auto& b : parts_[k].all()) {
      const double* state = current_part(p, b);
      bool adds = false;
      if (root) half_.resize(p * b.s), state = half_.data();
      for (const auto& a : parts_[k].all()) {
        if (!root) break;
        put_product(half_.data(), b.s, {current_part(p, a), a.s},
                      {root->rows.data() + a.from_s * s + b.from_s, s}, p, b.s, a.s, adds);
        adds = true;
      }
      put_product(gram_.data(), p, {state, b.s}, {current_part(p, b), b.s, true}, p, p, b.s, sums);
      sums = true;
    }
    mirror(gram_, p);
    Cut out;
    if (!needs_values && cap >= p) {
      triangle_of_gram(p);
      if (keeps_rows(out, p, delta)) return out;
    }
    map_kept(out, p, delta, cap, needs_values, 1);
    out.basis = scaled_;
    orthonormalize(out.basis, p, out.rank);
    return out;
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
    const Int n = cores_[at].n;
    for (const auto& part : parts_[at].all()) {
      // In blocks that do not depend on how many threads there are, nor does the sum.
      const Int n_blocks = std::min<Int>(part.r, 8), size = n * part.s;
      Buffer<double> sums(n_blocks * part.s, 0);
      on_rows(n_blocks, part.r * size / n_blocks, [&](Int first, Int last) {
        for (Int i = first; i < last; ++i) {
          const Int from = i * part.r / n_blocks, to = (i + 1) * part.r / n_blocks;
          pass(left.data() + part.from_r + from, part.data + from * size, to - from, n, part.s, sums.data() + i * part.s);
        }
      });
      for (Int i = 0; i < n_blocks; ++i)
        for (Int k = 0; k < part.s; ++k) squares[part.from_s + k] += sums[i * part.s + k];
    }
    for (auto& x : squares) x = std::sqrt(x);
    return squares;
  }

  TENSORTRAIN_LOOPS static void pass(const double* left, const double* x, Int r, Int n, Int s, double* __restrict out) {
    for (Int i = 0; i < r; ++i) {
      const double weight = left[i] * left[i];
      for (Int j = 0; j < n; ++j, x += s)
        for (Int k = 0; k < s; ++k) out[k] += weight * (x[k] * x[k]);
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
  bool squares_;
  bool terms_depend_ = true, keeps_by_squares_ = true;  // until a bond shows otherwise
  std::vector<Root> roots_;
  lapack::Desk<double> small_desk_;
  Buffer<double> matrix_, ones_, current_, carry_, products_, right_, half_, packed_;
};

}  // namespace tensortrain::chain
