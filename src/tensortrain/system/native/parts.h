// What is not zero of the cores of a chain, and what is read of all their entries once.
#pragma once

#include "chain.h"

#include <atomic>

namespace tensortrain::chain {

TENSORTRAIN_LOOPS inline Buffer<double> column_norms(const double* a, Int m, Int n) {
  Buffer<double> squares(n, 0);
  double* const out = squares.data();
  for (Int i = 0; i < m; ++i)
    for (Int j = 0; j < n; ++j) out[j] += a[i * n + j] * a[i * n + j];
  for (auto& x : squares) x = std::sqrt(x);
  return squares;
}

// What is not zero of a core: a part (r, n, s) of it, row by row, that begins at these indices of its bonds.
struct Part {
  const double* data;
  Int from_r, r, from_s, s;
};

// A core of a sum is zero but for its blocks, and half of every product with it need not be made.
class CoreParts {
 public:
  CoreParts(const Core<double>& core, bool may_split, double limit) : core_(core) {
    if (may_split && core.r >= 2 * least && core.s >= 2 * least) find_rows();
    split(limit);
  }

  const std::vector<Part>& all() const { return parts_; }

  // Whether the exponents of all entries stay within the limit.
  bool is_moderate() const { return is_moderate_; }

 private:
  static constexpr Int least = 16;  // below this a product takes no less time than that of the whole

  // The first and last column of every row that holds anything.
  void find_rows() {
    const Int n = core_.n, s = core_.s;
    first_.assign(core_.r, s), last_.assign(core_.r, -1);
    on_rows(core_.r, n * s, [&](Int from, Int to) {
      for (Int i = from; i < to; ++i)
        for (Int j = 0; j < n; ++j) {
          const double* const row = core_.data + (i * n + j) * s;
          Int k = 0;
          while (k < first_[i] && row[k] == 0) ++k;
          first_[i] = k;
          for (k = s - 1; k > last_[i] && row[k] == 0;) --k;
          last_[i] = k;
        }
    });
  }

  void split(double limit) {
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
    const double most = std::ldexp(1.0, static_cast<int>(limit));
    for (const auto& part : parts_)
      on_rows(part.r, core_.n * part.s, [&](Int from, Int to) {
        const Int size = core_.n * part.s;
        if (!lies_between(part.data + from * size, (to - from) * size, 1.0 / most, most)) is_moderate_ = false;
      });
  }

  void pack() {
    Int size = 0;
    const Int n = core_.n;
    for (const auto& part : parts_) size += part.r * n * part.s;
    packed_.resize(size);
    double* out = packed_.data();
    for (auto& part : parts_) {
      part.data = out;
      on_rows(part.r * n, part.s, [&](Int from, Int to) {
        for (Int row = from; row < to; ++row)
          std::copy_n(core_.data + (part.from_r * n + row) * core_.s + part.from_s, part.s, out + row * part.s);
      });
      out += part.r * n * part.s;
    }
  }

  Core<double> core_;
  std::atomic<bool> is_moderate_{true};
  std::vector<Part> parts_;
  std::vector<Int> first_, last_;
  Buffer<double> packed_;
};

}  // namespace tensortrain::chain
