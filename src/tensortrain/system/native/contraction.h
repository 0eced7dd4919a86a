// Tensors contracted pair by pair to one or several, in a given order, and the way back of gradients. Where a matrix
// does not lie in memory as BLAS takes it, it is sorted first; products without sums, and tiny ones, are plain loops.
#pragma once

#include "blas.h"
#include "lapack.h"
#include "room.h"
#include "threads.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <vector>

namespace tensortrain::contraction {

using Sizes = std::vector<int64_t>;

// A leg of a product: its size, and how far apart its entries lie in both operands and in the result; zero where it is
// none of theirs.
struct Leg {
  int64_t size;
  std::array<int64_t, 3> at;
};
using Legs = std::vector<Leg>;
enum Place { left = 0, right = 1, result = 2 };

// Neighbours that lie one within the other wherever they are become one leg.
inline Legs fused(const Legs& legs) {
  Legs found;
  for (const auto& leg : legs) {
    const auto lies_within = [&](const Leg& outer) {
      for (int p = 0; p < 3; ++p)
        if (outer.at[p] != leg.at[p] * leg.size) return false;
      return true;
    };
    if (!found.empty() && lies_within(found.back()))
      found.back() = {found.back().size * leg.size, leg.at};
    else
      found.push_back(leg);
  }
  return found;
}

inline Legs sorted_by(Legs legs, int place) {
  std::stable_sort(legs.begin(), legs.end(), [place](const Leg& a, const Leg& b) { return a.at[place] > b.at[place]; });
  return legs;
}

inline int64_t numel(const Legs& legs) {
  int64_t n = 1;
  for (const auto& leg : legs) n *= leg.size;
  return n;
}

// Work for every entry of the first n legs, by where it lies in all three places.
template <typename Work>
void each(const Legs& legs, size_t n, std::array<int64_t, 3> at, const Work& work, size_t k = 0) {
  if (k == n) return work(at);
  const auto& leg = legs[k];
  for (int64_t i = 0; i < leg.size; ++i) {
    each(legs, n, at, work, k + 1);
    for (int p = 0; p < 3; ++p) at[p] += leg.at[p];
  }
}

constexpr int64_t many_entries = 1 << 17;  // of which threads take parts

// The same, with the first leg divided among threads where there are many entries in all.
template <typename Work>
void each_on_threads(const Legs& legs, size_t n, int64_t entries, const Work& work) {
  if (n == 0 || entries < many_entries) return each(legs, n, {0, 0, 0}, work);
  on_threads(legs[0].size, 1, true, [&](int64_t first, int64_t last) {
    for (auto i = first; i < last; ++i)
      each(legs, n, {i * legs[0].at[0], i * legs[0].at[1], i * legs[0].at[2]}, work, 1);
  });
}

// -- sorting ----------------------------------------------------------------------------------------

// A short run: a call of memcpy would take longer.
template <typename T>
inline void copy_run(const T* from, T* to, int64_t n) {
  constexpr int64_t lanes = 16 / sizeof(T);
  int64_t k = 0;
  for (; k + lanes <= n; k += lanes) __builtin_memcpy(to + k, from + k, 16);
  for (; k < n; ++k) to[k] = from[k];
}

// rows x columns, each with its steps.
template <typename T>
TENSORTRAIN_LOOPS inline void copy_plane(const T* from, int64_t from_row, int64_t from_column, T* to, int64_t to_row,
                                         int64_t to_column, int64_t rows, int64_t columns) {
  if (from_column == 1 && to_column == 1) {
    for (int64_t i = 0; i < rows; ++i) copy_run(from + i * from_row, to + i * to_row, columns);
  } else if (to_column == 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * to_row + j] = from[i * from_row + j * from_column];
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) to[i * to_row + j * to_column] = from[i * from_row + j * from_column];
  }
}

// The same entries in another order: from the left place to that of the result.
class Sorting {
 public:
  Sorting() = default;
  explicit Sorting(const Legs& given) : legs_(fused(sorted_by(given, result))) {
    // Next to the innermost leg of the result comes that of the source: lines of memory that are read serve again.
    const auto least = [](const Leg& a, const Leg& b) { return a.at[left] < b.at[left]; };
    if (legs_.size() > 2) {
      const auto found = std::min_element(legs_.begin(), legs_.end() - 1, least);
      if (found->at[left] < legs_.back().at[left]) std::rotate(found, found + 1, legs_.end() - 1);
    }
  }

  template <typename T>
  void run(const T* from, T* to) const {
    const size_t n = legs_.size(), outer = n > 2 ? n - 2 : 0;
    static constexpr Leg none{1, {0, 0, 0}};
    const Leg row = n > 1 ? legs_[n - 2] : none, column = n > 0 ? legs_[n - 1] : none;
    each_on_threads(legs_, outer, numel(legs_), [&](const std::array<int64_t, 3>& at) {
      copy_plane(from + at[left], row.at[left], column.at[left], to + at[result], row.at[result], column.at[result],
                 row.size, column.size);
    });
  }

 private:
  Legs legs_;
};

// -- plain loops ------------------------------------------------------------------------------------

// c += a b along one leg, in the order that its steps ask for.
template <typename T>
TENSORTRAIN_LOOPS inline void add_products(const T* a, int64_t at_a, const T* b, int64_t at_b, T* c, int64_t at_c,
                                           int64_t n) {
  if (at_c == 1 && at_a == 1 && at_b == 0) {
    const T factor = *b;
    for (int64_t i = 0; i < n; ++i) c[i] += a[i] * factor;
  } else if (at_c == 1 && at_a == 0 && at_b == 1) {
    const T factor = *a;
    for (int64_t i = 0; i < n; ++i) c[i] += factor * b[i];
  } else if (at_c == 1 && at_a == 1 && at_b == 1) {
    for (int64_t i = 0; i < n; ++i) c[i] += a[i] * b[i];
  } else if (at_c == 0) {
    T sums[4] = {0, 0, 0, 0};
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
      for (int64_t k = 0; k < 4; ++k) sums[k] += a[(i + k) * at_a] * b[(i + k) * at_b];
    for (; i < n; ++i) sums[0] += a[i * at_a] * b[i * at_b];
    *c += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  } else {
    for (int64_t i = 0; i < n; ++i) c[i * at_c] += a[i * at_a] * b[i * at_b];
  }
}

class Loops {
 public:
  Loops() = default;
  explicit Loops(const Legs& given) : legs_(fused(sorted_by(given, result))), size_(1) {
    for (const auto& leg : given)
      if (leg.at[result] > 0) size_ *= leg.size;
    const auto gain = [](const Leg& leg) {  // of this leg innermost
      const auto ones = std::count(leg.at.begin(), leg.at.end(), 1), zeros = std::count(leg.at.begin(), leg.at.end(), 0);
      return (ones + zeros == 3 ? 4 : ones) * std::min<int64_t>(leg.size, 16);
    };
    const auto best = std::max_element(legs_.begin(), legs_.end(),
                                       [&](const Leg& a, const Leg& b) { return gain(a) < gain(b); });
    if (best != legs_.end()) std::rotate(best, best + 1, legs_.end());
    is_lined_ = !legs_.empty() && gain(legs_.back()) >= 4 * 4;
  }

  // Seconds in a billion.
  double cost() const { return static_cast<double>(numel(legs_)) * (is_lined_ ? 0.5 : 1.3) + 20; }

  template <typename T>
  void run(const T* a, const T* b, T* c) const {
    std::fill(c, c + size_, T(0));
    static constexpr Leg none{1, {0, 0, 0}};
    const Leg last = legs_.empty() ? none : legs_.back();
    each(legs_, legs_.empty() ? 0 : legs_.size() - 1, {0, 0, 0}, [&](const std::array<int64_t, 3>& at) {
      add_products(a + at[left], last.at[left], b + at[right], last.at[right], c + at[result], last.at[result],
                   last.size);
    });
  }

 private:
  Legs legs_;
  int64_t size_ = 1;
  bool is_lined_ = false;
};

// -- products of matrices ---------------------------------------------------------------------------

template <typename T>
Matrix<T> turned(Matrix<T> matrix) {
  matrix.transposed = !matrix.transposed;
  return matrix;
}

// One of the three matrices of a product: as it lies, or sorted on its way.
class Side {
 public:
  Side() = default;
  Side(const Legs& rows, const Legs& columns, int place) {
    const auto one = [place](const Legs& legs) {  // the legs as this place sees them
      Legs found;
      for (const auto& leg : legs) found.push_back({leg.size, {leg.at[place], 0, 0}});
      return fused(found);
    };
    const auto r = one(rows), c = one(columns);
    n_rows_ = numel(r), n_columns_ = numel(c);
    const auto row = r.empty() ? n_columns_ : r[0].at[0], column = c.empty() ? 1 : c[0].at[0];
    if (r.size() <= 1 && c.size() <= 1 && (column == 1 || (row == 1 && !r.empty()))) {
      is_direct_ = true, is_turned_ = column != 1, step_ = is_turned_ ? column : row;
      return;
    }
    // Sorted so that the innermost leg stays the innermost one.
    const auto innermost = [](const Legs& legs) {
      int64_t least = INT64_MAX;
      for (const auto& leg : legs) least = std::min(least, leg.at[0]);
      return least;
    };
    is_turned_ = innermost(r) < innermost(c);
    step_ = is_turned_ ? n_rows_ : n_columns_;
    Legs both;
    int64_t at = 1;
    for (const auto* some : {is_turned_ ? &r : &c, is_turned_ ? &c : &r})
      for (auto leg = some->rbegin(); leg != some->rend(); at *= leg->size, ++leg)
        both.push_back({leg->size, {leg->at[0], 0, at}});
    in_ = Sorting(both);
    for (auto& leg : both) std::swap(leg.at[left], leg.at[result]);
    out_ = Sorting(both);
  }

  bool is_direct() const { return is_direct_; }
  int64_t size() const { return n_rows_ * n_columns_; }

  template <typename T>
  Matrix<T> taken(const T* data, T* room) const {
    if (!is_direct_) in_.run(data, room);
    return {is_direct_ ? data : room, step_, is_turned_};
  }
  // Where a product is to be written, and afterwards sorted from.
  template <typename T>
  T* place(T* data, T* room) const { return is_direct_ ? data : room; }
  template <typename T>
  void put(const T* room, T* data) const {
    if (!is_direct_) out_.run(room, data);
  }
  // A product with k sums, written to such a place.
  template <typename T>
  void multiply(T* out, const Matrix<T>& x, const Matrix<T>& y, int64_t k) const {
    if (is_turned_)
      multiply_into(out, step_, turned(y), turned(x), n_columns_, n_rows_, k);
    else
      multiply_into(out, step_, x, y, n_rows_, n_columns_, k);
  }

 private:
  bool is_direct_ = false, is_turned_ = false;
  int64_t step_ = 1, n_rows_ = 1, n_columns_ = 1;
  Sorting in_, out_;
};

class Gemm {
 public:
  Gemm() = default;
  // Every order of the legs within rows, columns and sums that one of the matrices has, the one with least to sort.
  Gemm(const Legs& batch, const Legs& m, const Legs& n, const Legs& k) : batch_(fused(sorted_by(batch, result))) {
    m_ = numel(m), n_ = numel(n), k_ = numel(k);
    int64_t least = INT64_MAX;
    for (int way = 0; way < 8; ++way) {
      const auto rows = sorted_by(m, way & 1 ? left : result), columns = sorted_by(n, way & 2 ? right : result);
      const auto sums = sorted_by(k, way & 4 ? left : right);
      const Side a(rows, sums, left), b(sums, columns, right), c(rows, columns, result);
      int64_t sorted = 0;
      for (const auto* side : {&a, &b, &c}) sorted += side->is_direct() ? 0 : side->size();
      if (sorted < least) least = sorted, a_ = a, b_ = b, c_ = c;
    }
    sorted_ = least;
  }

  // Seconds in a billion.
  double cost() const {
    const auto flops = 2.0 * static_cast<double>(m_ * n_ * k_);
    return static_cast<double>(numel(batch_)) * (500 + flops / 25 + static_cast<double>(sorted_) * 1.0);
  }

  template <typename T>
  void run(const T* a, const T* b, T* c) const {
    Room room;
    T* const own_a = a_.is_direct() ? nullptr : room.take<T>(a_.size());
    T* const own_b = b_.is_direct() ? nullptr : room.take<T>(b_.size());
    T* const own_c = c_.is_direct() ? nullptr : room.take<T>(c_.size());
    each(batch_, batch_.size(), {0, 0, 0}, [&](const std::array<int64_t, 3>& at) {
      const auto x = a_.taken(a + at[left], own_a), y = b_.taken(b + at[right], own_b);
      T* const out = c_.place(c + at[result], own_c);
      c_.multiply(out, x, y, k_);
      c_.put(own_c, c + at[result]);
    });
  }

  // Gradients of both operands, or of one where the other's place is null. Each matrix is sorted once.
  template <typename T>
  void back(const T* a, const T* b, const T* grad, T* to_a, T* to_b) const {
    Room room;
    const auto own = [&](const Side& side, bool is_used) {
      return side.is_direct() || !is_used ? nullptr : room.take<T>(side.size());
    };
    T *const own_a = own(a_, to_b), *const own_b = own(b_, to_a), *const own_c = own(c_, true);
    T *const made_a = own(a_, to_a), *const made_b = own(b_, to_b);
    each(batch_, batch_.size(), {0, 0, 0}, [&](const std::array<int64_t, 3>& at) {
      const auto z = c_.taken(grad + at[result], own_c);
      if (to_a != nullptr) {
        a_.multiply(a_.place(to_a + at[left], made_a), z, turned(b_.taken(b + at[right], own_b)), n_);
        a_.put(made_a, to_a + at[left]);
      }
      if (to_b != nullptr) {
        b_.multiply(b_.place(to_b + at[right], made_b), turned(a_.taken(a + at[left], own_a)), z, m_);
        b_.put(made_b, to_b + at[right]);
      }
    });
  }

 private:
  Legs batch_;
  int64_t m_ = 1, n_ = 1, k_ = 1, sorted_ = 0;
  Side a_, b_, c_;
};

// -- one product ------------------------------------------------------------------------------------

// result = left right, summed over the legs that the result does not have; or the left one sorted, without a right one.
class Product {
 public:
  Product() = default;
  Product(const Legs& legs, bool has_right) : is_sorting_(!has_right) {
    if (is_sorting_) {
      sorting_ = Sorting(legs);
      return;
    }
    Legs batch, m, n, k;
    for (const auto& leg : legs) {
      const bool a = leg.at[left] > 0, b = leg.at[right] > 0, c = leg.at[result] > 0;
      (a && b && c ? batch : a && c ? m : b && c ? n : k).push_back(leg);
    }
    loops_ = Loops(legs);
    gemm_ = Gemm(batch, m, n, k);
    is_gemm_ = has_blas() && gemm_.cost() < loops_.cost();
  }

  template <typename T>
  void run(const T* a, const T* b, T* c) const {
    if (is_sorting_)
      sorting_.run(a, c);
    else if (is_gemm_)
      gemm_.run(a, b, c);
    else
      loops_.run(a, b, c);
  }

  // Null where it is none.
  const Gemm* as_gemm() const { return is_gemm_ ? &gemm_ : nullptr; }

 private:
  bool is_sorting_ = false, is_gemm_ = false;
  Sorting sorting_;
  Loops loops_;
  Gemm gemm_;
};

// One step of a contraction, and its gradients.
class Step {
 public:
  const int64_t a, b, c;  // numbers of tensors; b is -1 where a is but sorted

  Step(int64_t a, int64_t b, int64_t c, const Legs& legs) : a(a), b(b), c(c), forward_(legs, b >= 0) {
    const auto placed = [&legs](int x, int y, int z) {
      Legs found;
      for (const auto& leg : legs) found.push_back({leg.size, {leg.at[x], leg.at[y], leg.at[z]}});
      return found;
    };
    to_a_ = Product(placed(result, right, left), b >= 0);
    if (b >= 0) to_b_ = Product(placed(left, result, right), true);
  }

  template <typename T>
  void run(const T* left, const T* right, T* out) const { forward_.run(left, right, out); }

  // Null where nobody wants a gradient.
  template <typename T>
  void back(const T* left, const T* right, const T* grad, T* to_left, T* to_right) const {
    if (const auto* const gemm = forward_.as_gemm()) return gemm->back(left, right, grad, to_left, to_right);
    if (to_left != nullptr) to_a_.run(grad, right, to_left);
    if (to_right != nullptr) to_b_.run(left, grad, to_right);
  }

 private:
  Product forward_, to_a_, to_b_;
};

}  // namespace tensortrain::contraction
