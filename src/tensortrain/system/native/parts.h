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
  explicit CoreParts(bool may_split) : may_split_(may_split) {}

  const std::vector<Part>& all() const { return parts_; }

  // The parts can be read from here on: from the core, or from the room, where several lie one after the other. False
  // where the exponent of an entry goes beyond the limit, which is looked at once.
  bool load(const Core<double>& core, Buffer<double>& room, double limit) {
    const bool is_new = parts_.empty();
    if (is_new) split(core);
    const double most = is_new ? std::ldexp(1.0, static_cast<int>(limit)) : 0.0;
    if (parts_.size() > 1) return pack(core, room, most);
    parts_[0].data = core.data;
    return !is_new || is_moderate(core, limit);
  }

 private:
  static constexpr Int least = 16;  // below this a product takes no less time than that of the whole

  // The first and last column of every row that holds anything.
  static void find_rows(const Core<double>& core, std::vector<Int>& first, std::vector<Int>& last) {
    const Int n = core.n, s = core.s;
    first.assign(core.r, s), last.assign(core.r, -1);
    on_rows(core.r, n * s, [&](Int from, Int to) {
      for (Int i = from; i < to; ++i)
        for (Int j = 0; j < n; ++j) {
          const double* const row = core.data + (i * n + j) * s;
          Int k = 0;
          while (k < first[i] && row[k] == 0) ++k;
          first[i] = k;
          for (k = s - 1; k > last[i] && row[k] == 0;) --k;
          last[i] = k;
        }
    });
  }

  void split(const Core<double>& core) {
    const Int r = core.r, s = core.s;
    std::vector<Int> first, last;
    if (may_split_ && r >= 2 * least && s >= 2 * least) find_rows(core, first, last);
    Int from_r = 0, from_s = 0, end = 0;
    std::vector<Int> later(first);  // the first column of this row and all after it
    for (Int i = static_cast<Int>(later.size()) - 1; i-- > 0;) later[i] = std::min(later[i], later[i + 1]);
    for (Int i = 0; i < static_cast<Int>(first.size()); ++i) {
      const bool is_apart = end <= later[i] && i - from_r >= least && end - from_s >= least;
      if (is_apart && r - i >= least && s - end >= least) {
        parts_.push_back({nullptr, from_r, i - from_r, from_s, end - from_s});
        from_r = i, from_s = end;
      }
      end = std::max(end, last[i] + 1);
    }
    parts_.push_back({nullptr, from_r, r - from_r, from_s, s - from_s});
  }

  // The parts one after the other; with `most` above zero whether all entries but zeros lie within it and its inverse.
  bool pack(const Core<double>& core, Buffer<double>& room, double most) {
    std::atomic<bool> holds{true};
    Int size = 0;
    for (const auto& part : parts_) size += part.r * core.n * part.s;
    room.resize(size);
    double* out = room.data();
    for (auto& part : parts_) {
      part.data = out;
      on_rows(part.r, core.n * part.s, [&](Int from, Int to) {
        for (Int row = from * core.n; row < to * core.n; ++row)
          std::copy_n(core.data + (part.from_r * core.n + row) * core.s + part.from_s, part.s, out + row * part.s);
        const Int each = core.n * part.s;
        if (most > 0 && !lies_between(out + from * each, (to - from) * each, 1.0 / most, most)) holds = false;
      });
      out += part.r * core.n * part.s;
    }
    return holds;
  }

  bool may_split_;
  std::vector<Part> parts_;
};

}  // namespace tensortrain::chain
