// Walks along a chain of cores in one call: inner products, norms, orthonormal cores. What Python does core by core
// (cores/environments.py, cores/canonical.py, cores/scaling.py) takes some tens of torch calls for each.
//
// Numbers are walked through as they are first, with one power of two beside them. Where entries lie so far apart that
// products might leave the range, the walk is made once more with an exponent for every index of a bond: cores/scales.py
// tells why, and what follows its `Kept` to the letter has its names here.
#pragma once

#include "wide.h"

#include <atomic>
#include <limits>
#include <mutex>
#include <numeric>
#include <optional>
#include <utility>

namespace tensortrain::chain {

using lapack::multiply;
using lapack::turn;

// (r, n, s), row by row; `turned` column by column, as QR leaves it: (s, r, n) in memory.
template <typename T>
struct Core {
  const T* data;
  Int r, n, s;
  bool turned = false;
  Int size() const { return r * n * s; }
};

template <typename T>
using Cores = std::vector<Core<T>>;

// A core that the walk has made.
template <typename T>
struct Made {
  Buffer<T> data;
  Int r = 1, n = 1, s = 1;
  Core<T> view() const { return {data.data(), r, n, s}; }
};

// Whether no core has so much to multiply that several threads would gain by it.
template <typename T>
bool are_small(const Cores<T>& cores) {
  constexpr Int most = 300000;
  const auto is_small = [](const auto& core) { return core.size() * std::max(core.r, core.s) <= most; };
  return std::all_of(cores.begin(), cores.end(), is_small);
}

// -- sizes of entries ---------------------------------------------------------------------------------

inline int exponent_of(double x) {
  int e = 0;
  std::frexp(x, &e);
  return x == 0 ? 0 : e;
}

template <typename T>
constexpr int top_exponent() {
  return std::numeric_limits<T>::max_exponent;
}

struct Ends {
  double low = std::numeric_limits<double>::infinity(), high = 0;  // smallest modulus but zero, largest
  bool finite = true;
  int bits() const { return high == 0 ? 0 : std::max(std::abs(exponent_of(low)), std::abs(exponent_of(high))); }
};

template <typename T>
TENSORTRAIN_LOOPS Ends ends_of(const T* x, Int n) {
  constexpr Int lanes = 8;
  constexpr T inf = std::numeric_limits<T>::infinity();
  T low[lanes], high[lanes], wrong[lanes];
  for (Int j = 0; j < lanes; ++j) low[j] = inf, high[j] = 0, wrong[j] = 0;
  Int i = 0;
  for (; i + lanes <= n; i += lanes)
    for (Int j = 0; j < lanes; ++j) {
      const T a = std::abs(x[i + j]), b = a == 0 ? inf : a;
      low[j] = b < low[j] ? b : low[j];
      high[j] = a > high[j] ? a : high[j];
      wrong[j] += a - a;  // NaN where it is not finite
    }
  for (; i < n; ++i) {
    const T a = std::abs(x[i]), b = a == 0 ? inf : a;
    low[0] = b < low[0] ? b : low[0];
    high[0] = a > high[0] ? a : high[0];
    wrong[0] += a - a;
  }
  Ends ends;
  for (Int j = 0; j < lanes; ++j) {
    ends.low = std::min<double>(ends.low, low[j]);
    ends.high = std::max<double>(ends.high, high[j]);
    ends.finite = ends.finite && wrong[j] == 0;
  }
  return ends;
}

// Calls work(first, last) for rows of this size, on several threads where they are many: one alone takes as long to
// read a core as all of them to multiply it.
template <typename Work>
void on_rows(Int rows, Int size, const Work& work) {
  constexpr Int many = 1 << 16;
  on_threads(rows, std::max<Int>(1, many / 2 / std::max<Int>(size, 1)), rows * size > many, work);
}

template <typename T>
Ends all_ends_of(const T* x, Int n) {
  if (n < 1 << 16) return ends_of(x, n);
  Ends all;
  std::mutex lock;
  on_rows(n, 1, [&](Int from, Int to) {
    const auto ends = ends_of(x + from, to - from);
    const std::lock_guard<std::mutex> held(lock);
    all.low = std::min(all.low, ends.low), all.high = std::max(all.high, ends.high);
    all.finite = all.finite && ends.finite;
  });
  return all;
}

// The exponents that a product of so many factors may use: see `guarded` in cores/scales.py.
template <typename T>
double limit_of(int factors) {
  return 0.9 * top_exponent<T>() / (1 + factors);
}

template <typename T>
TENSORTRAIN_LOOPS void scale(T* x, Int n, int exponent) {
  const T factor = std::ldexp(T(1), exponent);
  for (Int i = 0; i < n; ++i) x[i] *= factor;
}

// Whether what is carried stays within the limit, once its own power of two has gone to `exponent`.
template <typename T>
bool settle(Buffer<T>& x, Int n, double limit, int64_t& exponent) {
  const auto ends = all_ends_of(x.data(), n);
  if (!ends.finite) return false;
  if (ends.high == 0) return true;
  const int high = exponent_of(ends.high);
  if (std::abs(exponent_of(ends.low) - high) > limit) return false;
  if (std::abs(high) > 16) {
    if (high < 3 - top_exponent<T>()) return false;
    scale(x.data(), n, -high);
    exponent += high;
  }
  return true;
}

// Whether every entry is zero or of a modulus from `low` to `high`. Cores are read once before they are multiplied, and
// at small ranks that must not take as long as the product.
template <typename T, typename Bits>
inline __attribute__((always_inline)) bool holds_within(const T* x, Int n, T low, T high) {
  Bits outside = 0;
  for (Int i = 0; i < n; ++i) {
    const T a = std::abs(x[i]);
    outside |= Bits(!(a <= high)) | (Bits(a < low) & Bits(a > 0));
  }
  return outside == 0;
}

TENSORTRAIN_WIDE inline bool lies_between(const double* x, Int n, double low, double high) {
  return holds_within<double, int64_t>(x, n, low, high);
}

TENSORTRAIN_WIDE inline bool lies_between(const float* x, Int n, float low, float high) {
  return holds_within<float, int32_t>(x, n, low, high);
}

template <typename T>
bool is_moderate(const Core<T>& core, double limit) {
  const int most = static_cast<int>(limit);
  const T low = std::ldexp(T(1), -most), high = std::ldexp(T(1), most);
  std::atomic<bool> holds{true};
  on_rows(core.size(), 1, [&](Int from, Int to) {
    if (!lies_between(core.data + from, to - from, low, high)) holds = false;
  });
  return holds;
}

template <typename T>
bool is_finite(const Cores<T>& cores) {
  return std::all_of(cores.begin(), cores.end(), [](const auto& core) { return ends_of(core.data, core.size()).finite; });
}

// -- an exponent for every index of a bond ------------------------------------------------------------

using Exponents = std::vector<int32_t>;
constexpr int32_t zero_mark = -(1 << 27);

inline int32_t plain(int32_t e) { return ((e - zero_mark / 2) & (-zero_mark - 1)) + zero_mark / 2; }

// x * 2**e in two halves, since 2**e alone may leave the range.
template <typename T>
T times_pow2(T x, int32_t e) {
  const int most = 4 * top_exponent<T>();
  return std::ldexp(x, std::clamp(e, -most, most));
}

// `core[r, .., s] 2**waiting[r] = made[r, .., s] 2**after[s]`; waiting becomes after.
template <typename T>
Made<T> weighed(const Core<T>& core, Exponents& waiting) {
  const T* const data = core.data;
  const Int r = core.r, n = core.n, s = core.s;
  Buffer<T> largest(r * s, 0);
  for (Int i = 0; i < r; ++i)
    for (Int j = 0; j < n; ++j)
      for (Int k = 0; k < s; ++k)
        largest[i * s + k] = std::max(largest[i * s + k], std::abs(data[(i * n + j) * s + k]));
  if (waiting.empty()) waiting.assign(r, 0);
  Exponents after(s, std::numeric_limits<int32_t>::min()), own(r * s);
  for (Int i = 0; i < r; ++i)
    for (Int k = 0; k < s; ++k) {
      own[i * s + k] = exponent_of(largest[i * s + k]);
      after[k] = std::max(after[k], waiting[i] + (largest[i * s + k] > 0 ? own[i * s + k] : zero_mark));
    }
  for (auto& e : after) e = plain(e);
  Made<T> made{Buffer<T>(core.size()), r, n, s};
  for (Int i = 0; i < r; ++i)
    for (Int k = 0; k < s; ++k) {
      int32_t shift = plain(waiting[i]) - after[k];
      if (largest[i * s + k] > 0 && shift > -own[i * s + k]) shift = -own[i * s + k];
      for (Int j = 0; j < n; ++j) made.data[(i * n + j) * s + k] = times_pow2(data[(i * n + j) * s + k], shift);
    }
  waiting = std::move(after);
  return made;
}

// Powers of two of every column (or row) of x (m, n) go to `exponents`, which adds them up.
template <typename T>
Exponents split(T* x, Int m, Int n, bool of_columns) {
  const Int count = of_columns ? n : m;
  Buffer<T> largest(count, 0);
  for (Int i = 0; i < m; ++i)
    for (Int j = 0; j < n; ++j) {
      auto& most = largest[of_columns ? j : i];
      most = std::max(most, std::abs(x[i * n + j]));
    }
  Exponents exponents(count);
  Buffer<T> factors(count);
  for (Int k = 0; k < count; ++k) {
    const int e = std::max(exponent_of(largest[k]), 3 - top_exponent<T>());
    factors[k] = std::ldexp(T(1), -e);
    exponents[k] = largest[k] > 0 ? e : zero_mark;
  }
  for (Int i = 0; i < m; ++i)
    for (Int j = 0; j < n; ++j) x[i * n + j] *= factors[of_columns ? j : i];
  return exponents;
}

inline void add(Exponents& waiting, const Exponents& step) {
  for (size_t k = 0; k < waiting.size(); ++k) waiting[k] += step[k];
}

// One exponent for all of x (m, s), whose columns have exponents of their own.
template <typename T>
int32_t common(T* x, Int m, Int s, const Exponents& waiting) {
  const int32_t most = plain(*std::max_element(waiting.begin(), waiting.end()));
  for (Int k = 0; k < s; ++k) {
    const int32_t shift = std::min(plain(waiting[k]) - most, 0);
    if (shift)
      for (Int i = 0; i < m; ++i) x[i * s + k] = times_pow2(x[i * s + k], shift);
  }
  return most;
}

// Largest entry in [1/2, 1): `split_pow2` in cores/scaling.py.
template <typename T>
int32_t split_whole(T* x, Int n) {
  T largest = 0;
  for (Int k = 0; k < n; ++k) largest = std::max(largest, std::abs(x[k]));
  const int e = std::max(exponent_of(largest), 3 - top_exponent<T>());
  scale(x, n, -e);
  return e;
}

// -- inner products -----------------------------------------------------------------------------------

template <typename T>
struct Value {
  T mantissa;
  int64_t exponent;
};

// Rows from .. to of a core (r n, s) that lies column by column.
template <typename T>
TENSORTRAIN_LOOPS void turn_rows(const Core<T>& core, Int from, Int to, T* __restrict out) {
  constexpr Int block = 16;
  const Int rows = core.r * core.n, s = core.s;
  const T* const __restrict data = core.data;
  for (Int i = from; i < to; i += block)
    for (Int k = 0; k < s; k += block) {
      const Int i_end = std::min(i + block, to), k_end = std::min(k + block, s);
      for (Int y = i; y < i_end; ++y)
        for (Int x = k; x < k_end; ++x) out[y * s + x] = data[x * rows + y];
    }
}

// What products of a pair of cores are made in.
template <typename T>
struct PairRoom {
  Buffer<T> half, next, rows;
};

// (r n, s) of a core, however it lies.
template <typename T>
Matrix<T> unfolded(const Core<T>& core) {
  return core.turned ? Matrix<T>{core.data, core.r * core.n, true} : Matrix<T>{core.data, core.s};
}

// One core of a pair is multiplied by its rows, which a core that lies column by column does not have: the ket of two
// such cores is turned.
template <typename T>
Core<T> beside(const Core<T>& bra, const Core<T>& ket, PairRoom<T>& room) {
  if (!bra.turned || !ket.turned) return ket;
  room.rows.resize(ket.size());
  on_rows(ket.r * ket.n, ket.s, [&](Int from, Int to) { turn_rows(ket, from, to, room.rows.data()); });
  return {room.rows.data(), ket.r, ket.n, ket.s};
}

// env (t, r) past bra (t, n, u) and ket (r, n, s) to (u, s).
template <typename T>
void past_pair(Buffer<T>& env, const Core<T>& bra, const Core<T>& given, PairRoom<T>& room) {
  const auto ket = beside(bra, given, room);
  const Int t = bra.r, r = ket.r, n = ket.n, u = bra.s, s = ket.s;
  room.next.resize(u * s);
  if (ket.turned) {
    room.half.resize(r * n * u);
    put_product(room.half.data(), n * u, {env.data(), r, true}, {bra.data, n * u}, r, n * u, t);
    put_product(room.next.data(), s, {room.half.data(), u, true}, unfolded(ket), u, s, r * n);
  } else {
    room.half.resize(t * n * s);
    put_product(room.half.data(), n * s, {env.data(), r}, {ket.data, n * s}, t, n * s, r);
    auto left = unfolded(bra);
    left.transposed = !left.transposed;
    put_product(room.next.data(), s, left, {room.half.data(), s}, u, s, t * n);
  }
  env.swap(room.next);
}

// env (u, s) past bra (t, n, u) and ket (r, n, s) to (t, r): the same from the right.
template <typename T>
void before_pair(Buffer<T>& env, const Core<T>& bra, const Core<T>& given, PairRoom<T>& room) {
  const auto ket = beside(bra, given, room);
  const Int t = bra.r, r = ket.r, n = ket.n, u = bra.s, s = ket.s;
  room.next.resize(t * r);
  if (ket.turned) {
    room.half.resize(r * n * u);
    put_product(room.half.data(), u, unfolded(ket), {env.data(), s, true}, r * n, u, s);
    put_product(room.next.data(), r, {bra.data, n * u}, {room.half.data(), n * u, true}, t, r, n * u);
  } else {
    room.half.resize(t * n * s);
    put_product(room.half.data(), s, unfolded(bra), {env.data(), s}, t * n, s, u);
    put_product(room.next.data(), r, {room.half.data(), n * s}, {ket.data, n * s, true}, t, r, n * s);
  }
  env.swap(room.next);
}

// What one half of two chains comes to: an inner product from its end to the middle.
template <typename T>
struct Half {
  Buffer<T> env{T(1)};
  int64_t exponent = 0;
  bool holds = true;

  void run(const Cores<T>& bra, const Cores<T>& ket, Int from, Int to) {
    const double limit = limit_of<T>(2);
    const Int step = from <= to ? 1 : -1;
    PairRoom<T> room;
    for (Int k = from; k != to && holds; k += step) {
      holds = is_moderate(bra[k], limit) && (bra[k].data == ket[k].data || is_moderate(ket[k], limit));
      if (!holds) return;
      step > 0 ? past_pair(env, bra[k], ket[k], room) : before_pair(env, bra[k], ket[k], room);
      holds = settle(env, static_cast<Int>(env.size()), limit, exponent);
    }
  }
};

// Multiplications at each core.
template <typename T>
std::vector<double> work_of(const Cores<T>& bra, const Cores<T>& ket) {
  std::vector<double> found;
  for (size_t k = 0; k < bra.size(); ++k)
    found.push_back(static_cast<double>(bra[k].size()) * ket[k].r + static_cast<double>(ket[k].size()) * bra[k].s);
  return found;
}

// Whether two threads do a half each sooner than both of them one product after the other.
inline bool gain_by_halves(const std::vector<double>& work, bool are_all_small) {
  constexpr double least = 4e5, most = 4e6;  // in all; of one product, by two threads
  const double all = std::accumulate(work.begin(), work.end(), 0.0);
  const bool are_limited = at::get_num_threads() == 2 && *std::max_element(work.begin(), work.end()) <= most;
  return all > least && (are_all_small || are_limited);
}

template <typename T>
std::optional<Value<T>> dot_plainly(const Cores<T>& bra, const Cores<T>& ket, bool are_all_small) {
  const Int d = static_cast<Int>(bra.size());
  const auto work = work_of(bra, ket);
  const double all = std::accumulate(work.begin(), work.end(), 0.0);
  const bool at_once = gain_by_halves(work, are_all_small);
  Int middle = at_once ? 0 : d;
  for (double before = 0; middle < d && before + work[middle] / 2 < all / 2; ++middle) before += work[middle];
  Half<T> halves[2];
  on_threads(2, 1, at_once, [&](int64_t from, int64_t to) {
    const OneThread alone(at_once);
    for (; from < to; ++from) from == 0 ? halves[0].run(bra, ket, 0, middle) : halves[1].run(bra, ket, d - 1, middle - 1);
  });
  if (!halves[0].holds || !halves[1].holds) return std::nullopt;
  double sum = 0;
  for (size_t k = 0; k < halves[0].env.size(); ++k) sum += static_cast<double>(halves[0].env[k]) * halves[1].env[k];
  const int64_t exponent = halves[0].exponent + halves[1].exponent + split_whole(&sum, 1);
  return Value<T>{static_cast<T>(sum), exponent};
}

template <typename T>
Made<T> in_rows(const Core<T>& core) {
  Made<T> out{Buffer<T>(core.size()), core.r, core.n, core.s};
  if (core.turned)
    turn_rows(core, 0, core.r * core.n, out.data.data());
  else
    std::copy_n(core.data, core.size(), out.data.data());
  return out;
}

template <typename T>
Value<T> dot_keeping(const Cores<T>& bra, const Cores<T>& ket) {
  Buffer<T> env{T(1)};
  PairRoom<T> room;
  Exponents of_bra, of_ket;
  for (size_t k = 0; k < bra.size(); ++k) {
    if (k) {
      add(of_bra, split(env.data(), bra[k].r, ket[k].r, false));
      add(of_ket, split(env.data(), bra[k].r, ket[k].r, true));
    }
    const auto left = weighed(in_rows(bra[k]).view(), of_bra), right = weighed(in_rows(ket[k]).view(), of_ket);
    past_pair(env, left.view(), right.view(), room);
  }
  const int64_t exponent = split_whole(env.data(), 1);
  return Value<T>{env[0], exponent + plain(of_bra[0]) + plain(of_ket[0])};
}

// <bra, ket> = mantissa 2**exponent; nothing where an entry is not finite.
template <typename T>
std::optional<Value<T>> dot(const Cores<T>& bra, const Cores<T>& ket) {
  const bool are_all_small = are_small(bra) && are_small(ket);
  const OneThread alone(are_all_small);
  if (auto found = dot_plainly(bra, ket, are_all_small)) return found;
  if (!is_finite(bra) || !is_finite(ket)) return std::nullopt;
  return dot_keeping(bra, ket);
}

// -- walks with a triangle ----------------------------------------------------------------------------

// What a walk to the right carries: all before a bond as a matrix (t, s) of the same products.
template <typename T>
class Walk {
 public:
  // Whether exponents are kept for every index of a bond.
  explicit Walk(bool keeps) : keeps_(keeps) {}

  // The next core behind what is carried, (t n, s) row by row; whether its numbers stay in the range.
  bool take(const Core<T>& core) {
    Made<T> own;
    auto view = core;
    if (keeps_) {
      own = weighed(core, waiting);
      view = own.view();
    } else if (!is_moderate(core, limit_of<T>(1))) {
      return false;
    }
    t = has_carry_ ? t_carried_ : core.r, n = core.n, s = core.s;
    state.resize(t * n * s);
    if (has_carry_)
      multiply(false, false, t, n * s, core.r, carry_.data(), view.data, state.data());
    else
      std::copy(view.data, view.data + view.size(), state.begin());
    weighed_core = std::move(own);
    return true;
  }

  // Takes powers of two out of the state; for `keeps`, `step` holds those of its columns.
  bool settle_state() {
    if (!keeps_) return settle(state, t * n * s, limit_of<T>(1), exponent);
    step = split(state.data(), t * n, s, true);
    add(waiting, step);
    return true;
  }

  // The triangle of the state is carried on.
  void factor() {
    t_carried_ = std::min(t * n, s);
    columns_.resize(t * n * s);
    turn(t * n, s, state.data(), columns_.data());
    desk_.qr(t * n, s, columns_.data());
    carry_.resize(t_carried_ * s);
    lapack::triangle_rows(t * n, s, columns_.data(), carry_.data());
    has_carry_ = true;
  }

  // After `factor`: its orthonormal factor (t, n, min(t n, s)), row by row.
  void basis(T* out) {
    desk_.q(t * n, t_carried_, columns_.data());
    turn(t_carried_, t * n, columns_.data(), out);
  }

  Int width() const { return t_carried_; }
  const Buffer<T>* carry() const { return has_carry_ ? &carry_ : nullptr; }

  Buffer<T> state;
  Int t = 1, n = 1, s = 1;
  int64_t exponent = 0;
  Exponents waiting, step;
  Made<T> weighed_core;

 private:
  bool keeps_, has_carry_ = false;
  Int t_carried_ = 1;
  Buffer<T> carry_, columns_;
  lapack::Desk<T> desk_;
};

template <typename T>
T norm_of(const T* x, Int n) {
  double sum = 0;
  for (Int k = 0; k < n; ++k) sum += double(x[k]) * double(x[k]);
  return std::sqrt(sum);
}

// The Frobenius norm of a chain, by triangles.
template <typename T>
std::optional<Value<T>> norm_with(const Cores<T>& cores, bool keeps) {
  Walk<T> walk(keeps);
  for (size_t k = 0; k < cores.size(); ++k) {
    if (k && !walk.settle_state()) return std::nullopt;
    if (k) walk.factor();
    if (!walk.take(cores[k])) return std::nullopt;
  }
  const Int rows = walk.t * walk.n, size = rows * walk.s;
  int64_t exponent = walk.exponent;
  if (keeps) exponent += common(walk.state.data(), rows, walk.s, walk.waiting);
  exponent += split_whole(walk.state.data(), size);
  return Value<T>{norm_of(walk.state.data(), size), exponent};
}

template <typename T>
std::optional<Value<T>> norm(const Cores<T>& cores) {
  if (auto found = norm_with(cores, false)) return found;
  if (!is_finite(cores)) return std::nullopt;
  return norm_with(cores, true);
}

// -- orthonormal cores --------------------------------------------------------------------------------

// Left-orthogonal cores, and what is left over: a matrix (t, s), and exponents.
template <typename T>
struct Bases {
  std::vector<Made<T>> cores;
  Buffer<T> carry;
  Int t = 0;  // 0: nothing was carried
  int64_t exponent = 0;
  Exponents waiting;
};

template <typename T>
std::optional<Bases<T>> bases(const Cores<T>& cores, bool keeps) {
  Bases<T> out;
  Walk<T> walk(keeps);
  for (const auto& core : cores) {
    if (!walk.take(core) || !walk.settle_state()) return std::nullopt;
    walk.factor();
    Made<T> made{Buffer<T>(walk.t * walk.n * walk.width()), walk.t, walk.n, walk.width()};
    walk.basis(made.data.data());
    out.cores.push_back(std::move(made));
  }
  if (walk.carry()) out.carry = *walk.carry(), out.t = walk.width();
  out.exponent = walk.exponent, out.waiting = walk.waiting;
  return out;
}

template <typename T>
Made<T> mirrored(const Core<T>& core) {
  Made<T> out{Buffer<T>(core.size()), core.s, core.n, core.r};
  for (Int i = 0; i < core.r; ++i)
    for (Int j = 0; j < core.n; ++j)
      for (Int k = 0; k < core.s; ++k)
        out.data[(k * core.n + j) * core.r + i] = core.data[(i * core.n + j) * core.s + k];
  return out;
}

template <typename T>
struct Orthogonal {
  std::vector<Made<T>> cores;
  int64_t exponent = 0;
};

// The chain with all cores but core k orthonormal; its largest entry is near 1.
template <typename T>
std::optional<Orthogonal<T>> orthogonal_with(const Cores<T>& cores, Int k, bool keeps) {
  std::vector<Made<T>> turned;
  for (Int at = static_cast<Int>(cores.size()) - 1; at > k; --at) turned.push_back(mirrored(cores[at]));
  Cores<T> after;
  for (const auto& core : turned) after.push_back(core.view());
  auto left = bases(Cores<T>(cores.begin(), cores.begin() + k), keeps);
  auto right = left ? bases(after, keeps) : std::nullopt;
  if (!right) return std::nullopt;
  Core<T> core = cores[k];
  if (!keeps && !is_moderate(core, limit_of<T>(1))) return std::nullopt;
  Made<T> middle{Buffer<T>(core.data, core.data + core.size()), core.r, core.n, core.s};
  Orthogonal<T> out;
  out.exponent = left->exponent + right->exponent;
  if (keeps) {
    auto waiting = left->waiting;
    middle = weighed(core, waiting);
    if (!right->waiting.empty()) add(waiting, right->waiting);
    out.exponent += common(middle.data.data(), core.r * core.n, core.s, waiting);
  }
  if (left->t) {
    Buffer<T> next(left->t * core.n * core.s);
    multiply(false, false, left->t, core.n * core.s, core.r, left->carry.data(), middle.data.data(), next.data());
    middle = {std::move(next), left->t, core.n, core.s};
  }
  if (right->t) {
    Buffer<T> next(middle.r * middle.n * right->t);
    multiply(false, true, middle.r * middle.n, right->t, middle.s, middle.data.data(), right->carry.data(), next.data());
    middle = {std::move(next), middle.r, middle.n, right->t};
  }
  out.exponent += split_whole(middle.data.data(), static_cast<Int>(middle.data.size()));
  out.cores = std::move(left->cores);
  out.cores.push_back(std::move(middle));
  for (auto it = right->cores.rbegin(); it != right->cores.rend(); ++it) out.cores.push_back(mirrored(it->view()));
  return out;
}

template <typename T>
std::optional<Orthogonal<T>> orthogonal(const Cores<T>& cores, Int k) {
  if (auto found = orthogonal_with(cores, k, false)) return found;
  if (!is_finite(cores)) return std::nullopt;
  return orthogonal_with(cores, k, true);
}

// -- bonds of like size -------------------------------------------------------------------------------

// The same train with bonds scaled by powers of two, where terms go through sizes that lie far apart.
template <typename T>
std::vector<Made<T>> balanced(const Cores<T>& cores) {
  std::vector<Made<T>> out;
  const auto walked = [&](bool keeps) {
    Walk<T> walk(keeps);
    out.clear();
    for (const auto& core : cores) {
      if (!walk.take(core)) return false;
      auto made = std::move(walk.weighed_core);
      if (!walk.settle_state()) return false;
      if (keeps) {
        for (Int k = 0; k < made.s; ++k) {
          const auto e = plain(walk.step[k]);
          walk.waiting[k] = plain(walk.waiting[k]);
          for (Int i = 0; i < made.r * made.n; ++i) made.data[i * made.s + k] = times_pow2(made.data[i * made.s + k], -e);
        }
        out.push_back(std::move(made));
      }
      walk.factor();
    }
    if (!keeps) return true;
    const int32_t total = plain(walk.waiting[0]), d = static_cast<int32_t>(out.size());
    const int32_t each = total >= 0 ? total / d : -((-total + d - 1) / d), extra = total - each * d;
    for (int32_t k = 0; k < d; ++k)
      for (auto& x : out[k].data) x = times_pow2(x, each + (extra > k));
    return true;
  };
  if (walked(false)) {
    for (const auto& core : cores)
      out.push_back({Buffer<T>(core.data, core.data + core.size()), core.r, core.n, core.s});
  } else {
    walked(true);
  }
  return out;
}

// Rows of about 1 in all cores but the first: `balanced_pow2` in cores/scaling.py. Returns the exponent of the whole.
template <typename T>
int64_t balance_rows(std::vector<Made<T>>& cores) {
  int64_t total = 0;
  for (size_t at = cores.size() - 1; at > 0; --at) {
    auto &core = cores[at], &before = cores[at - 1];
    const auto rows = split(core.data.data(), core.r, core.n * core.s, false);
    const auto columns = split(before.data.data(), before.r * before.n, before.s, true);
    bool any = false;
    int32_t most = 0;
    for (Int k = 0; k < core.r; ++k)
      if (rows[k] != zero_mark && columns[k] != zero_mark) {
        most = any ? std::max(most, rows[k] + columns[k]) : rows[k] + columns[k];
        any = true;
      }
    for (Int k = 0; k < core.r; ++k) {
      const bool gone = rows[k] == zero_mark || columns[k] == zero_mark;
      for (Int i = 0; i < before.r * before.n; ++i) {
        auto& x = before.data[i * before.s + k];
        x = gone ? T(0) : times_pow2(x, rows[k] + columns[k] - most);
      }
    }
    total += most;
  }
  return total + split_whole(cores[0].data.data(), static_cast<Int>(cores[0].data.size()));
}

}  // namespace tensortrain::chain
