// A chain of cores meets a batch of rank-one data: the state past every site, and the way back to all cores at once.
//
// From the left the state of a sample, r numbers, becomes sum_n f_n (state A_n), s numbers: `expand`. From the right it
// is `shrink`, and the way back of one is the other. `values` stand for vectors with a 1 at one place: samples of equal
// value share a product with one slice of the core, and a value below 0 stands for ones, the sum over the site.
#pragma once

#include "blas.h"
#include "room.h"
#include "threads.h"
#include "views.h"

#include <torch/extension.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

namespace tensortrain::data_walk {

using at::Tensor;
using Int = int64_t;
using Tensors = std::vector<Tensor>;

template <typename T>
struct Site {
  const T* core;       // (r, n, s)
  T* grad;             // of the core, or null
  const T* vectors;    // (b, n), or null
  T* vector_grad;      // (b, n), or null
  const Int* values;   // of sample i at values[i * apart], or null
  Int apart;
  Int r, n, s;
};

// The rows `first .. last` of a batch that take the same value, packed one after the other.
struct Groups {
  std::vector<Int> order, starts;  // starts of groups 0 .. n, the last one of values below 0

  void sort(const Int* values, Int apart, Int first, Int last, Int n) {
    starts.assign(static_cast<size_t>(n + 2), 0);
    order.resize(static_cast<size_t>(last - first));
    const auto group = [&](Int i) { return values[i * apart] < 0 ? n : values[i * apart]; };
    for (Int i = first; i < last; ++i) ++starts[static_cast<size_t>(group(i) + 1)];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    auto at = starts;
    for (Int i = first; i < last; ++i) order[static_cast<size_t>(at[static_cast<size_t>(group(i))]++)] = i;
  }
};

template <typename T>
void gather(const T* from, Int width, const Int* rows, Int n_rows, T* to) {
  for (Int i = 0; i < n_rows; ++i) std::memcpy(to + i * width, from + rows[i] * width, static_cast<size_t>(width) * sizeof(T));
}

template <typename T>
void scatter(const T* from, Int width, const Int* rows, Int n_rows, T* to) {
  for (Int i = 0; i < n_rows; ++i) std::memcpy(to + rows[i] * width, from + i * width, static_cast<size_t>(width) * sizeof(T));
}

// The sum of the slices of a core, (r, s).
template <typename T>
void summed(const Site<T>& site, T* out) {
  for (Int r = 0; r < site.r; ++r) {
    T* const row = out + r * site.s;
    std::memcpy(row, site.core + r * site.n * site.s, static_cast<size_t>(site.s) * sizeof(T));
    for (Int n = 1; n < site.n; ++n)
      for (Int s = 0; s < site.s; ++s) row[s] += site.core[(r * site.n + n) * site.s + s];
  }
}

template <typename T>
void outer(const T* p, const T* f, Int r, Int n, Int n_rows, T* out) {
  for (Int i = 0; i < n_rows; ++i)
    for (Int a = 0; a < r; ++a)
      for (Int k = 0; k < n; ++k) *out++ = p[i * r + a] * f[i * n + k];
}

template <typename T>
T* at_row(T* data, Int row, Int width) {
  return data == nullptr ? nullptr : data + row * width;
}

// One value's slice of a core as a matrix (r, s), or the sum of all.
template <typename T>
Matrix<T> slice_of(const Site<T>& site, Int value, Room& room) {
  if (value < site.n) return {site.core + value * site.s, site.n * site.s};
  T* const all = room.take<T>(site.r * site.s);
  summed(site, all);
  return {all, site.s};
}

// q (b, s) from p (b, r), for the rows `first .. last` of both.
template <typename T>
void expand(const Site<T>& site, Groups& groups, const T* p, T* q, Int first, Int last) {
  const Int rows = last - first;
  Room room;
  if (site.vectors != nullptr) {
    T* const wide = room.take<T>(rows * site.r * site.n);
    outer(p + first * site.r, site.vectors + first * site.n, site.r, site.n, rows, wide);
    multiply_into(q + first * site.s, site.s, Matrix<T>{wide, site.r * site.n}, Matrix<T>{site.core, site.s}, rows, site.s,
                  site.r * site.n);
    return;
  }
  groups.sort(site.values, site.apart, first, last, site.n);
  T* const in = room.take<T>(rows * site.r);
  T* const out = room.take<T>(rows * site.s);
  for (Int value = 0; value <= site.n; ++value) {
    const Int start = groups.starts[static_cast<size_t>(value)], n = groups.starts[static_cast<size_t>(value + 1)] - start;
    if (n == 0) continue;
    const Int* const chosen = groups.order.data() + start;
    gather(p, site.r, chosen, n, in);
    multiply_into(out, site.s, Matrix<T>{in, site.r}, slice_of(site, value, room), n, site.s, site.r);
    scatter(out, site.s, chosen, n, q);
  }
}

// p (b, r) from q (b, s); with `mate` (b, r) also the gradient of the vectors, which is mate . (q A^T).
template <typename T>
void shrink(const Site<T>& site, Groups& groups, const T* q, T* p, const T* mate, Int first, Int last) {
  const Int rows = last - first;
  Room room;
  if (site.vectors != nullptr) {
    const Int wide_r = site.r * site.n;
    T* const wide = room.take<T>(rows * wide_r);
    multiply_into(wide, wide_r, Matrix<T>{q + first * site.s, site.s}, Matrix<T>{site.core, site.s, true}, rows, wide_r,
                  site.s);
    const T* const f = site.vectors + first * site.n;
    for (Int i = 0; i < rows; ++i) {
      const T* const here = wide + i * wide_r;
      if (p != nullptr)
        for (Int a = 0; a < site.r; ++a) {
          T sum = 0;
          for (Int k = 0; k < site.n; ++k) sum += here[a * site.n + k] * f[i * site.n + k];
          p[(first + i) * site.r + a] = sum;
        }
      if (site.vector_grad != nullptr && mate != nullptr)
        for (Int k = 0; k < site.n; ++k) {
          T sum = 0;
          for (Int a = 0; a < site.r; ++a) sum += here[a * site.n + k] * mate[(first + i) * site.r + a];
          site.vector_grad[(first + i) * site.n + k] = sum;
        }
    }
    return;
  }
  groups.sort(site.values, site.apart, first, last, site.n);
  T* const in = room.take<T>(rows * site.s);
  T* const out = room.take<T>(rows * site.r);
  for (Int value = 0; value <= site.n; ++value) {
    const Int start = groups.starts[static_cast<size_t>(value)], n = groups.starts[static_cast<size_t>(value + 1)] - start;
    if (n == 0) continue;
    const Int* const chosen = groups.order.data() + start;
    gather(q, site.s, chosen, n, in);
    auto slice = slice_of(site, value, room);
    slice.transposed = true;
    multiply_into(out, site.r, Matrix<T>{in, site.s}, slice, n, site.r, site.s);
    scatter(out, site.r, chosen, n, p);
  }
}

// Adds sum_b p_b f_b q_b to the gradient of a core.
template <typename T>
void add_grad(const Site<T>& site, Groups& groups, const T* p, const T* q, Int first, Int last) {
  const Int rows = last - first;
  Room room;
  if (site.vectors != nullptr) {
    const Int wide_r = site.r * site.n;
    T* const wide = room.take<T>(rows * wide_r);
    outer(p + first * site.r, site.vectors + first * site.n, site.r, site.n, rows, wide);
    multiply_into(site.grad, site.s, Matrix<T>{wide, wide_r, true}, Matrix<T>{q + first * site.s, site.s}, wide_r, site.s,
                  rows, T(1));
    return;
  }
  groups.sort(site.values, site.apart, first, last, site.n);
  T* const ps = room.take<T>(rows * site.r);
  T* const qs = room.take<T>(rows * site.s);
  for (Int value = 0; value <= site.n; ++value) {
    const Int start = groups.starts[static_cast<size_t>(value)], n = groups.starts[static_cast<size_t>(value + 1)] - start;
    if (n == 0) continue;
    const Int* const chosen = groups.order.data() + start;
    gather(p, site.r, chosen, n, ps);
    gather(q, site.s, chosen, n, qs);
    const bool is_one = value < site.n;  // else the sample meets all slices
    for (Int slice = is_one ? value : 0; slice < (is_one ? value + 1 : site.n); ++slice)
      multiply_into(site.grad + slice * site.s, site.n * site.s, Matrix<T>{ps, site.r, true}, Matrix<T>{qs, site.s}, site.r,
                    site.s, n, T(1));
  }
}

// Powers of two out of rows, so that the largest entry of each lies in [1/2, 1).
template <typename T>
void scale_rows(T* q, Int width, Int first, Int last, T* factors, int32_t* exponents) {
  constexpr int lowest = 3 - std::numeric_limits<T>::max_exponent;
  for (Int i = first; i < last; ++i) {
    T* const row = q + i * width;
    T most = 0;
    for (Int j = 0; j < width; ++j) most = std::max(most, std::abs(row[j]));
    int e = 0;
    if (std::isfinite(most)) std::frexp(most, &e);
    e = most == 0 ? 0 : std::max(e, lowest);
    const T factor = std::ldexp(T(1), -e);
    for (Int j = 0; j < width; ++j) row[j] *= factor;
    factors[i] = factor;
    exponents[i] += e;
  }
}

template <typename T>
void times_rows(T* q, Int width, Int first, Int last, const T* factors) {
  for (Int i = first; i < last; ++i)
    for (Int j = 0; j < width; ++j) q[i * width + j] *= factors[i];
}

// Cores of a chain in the order of the chain: the first n_left are walked from the left, the others from the right. Rows
// of data between them, of cores that are missing, are passed over.
struct Chain {
  Tensors cores;
  Int n_left;
  std::optional<Tensor> values;  // (b, d)
  Tensors vectors;               // d of (b, n), or one (d, b, n)

  Int size() const { return static_cast<Int>(cores.size()); }
  bool is_stacked() const { return !values && vectors.size() == 1 && vectors.front().dim() == 3; }
  Int batch() const { return values ? values->size(0) : vectors.front().size(is_stacked() ? 1 : 0); }
  Int n_rows() const {
    return values ? values->size(1) : is_stacked() ? vectors.front().size(0) : static_cast<Int>(vectors.size());
  }
  Int row(Int k) const { return k < n_left ? k : k + n_rows() - size(); }

  // Where the vectors of core k begin among such tensors.
  template <typename T>
  T* vectors_of(Int k, const Tensors& from) const {
    if (!is_stacked()) return from[static_cast<size_t>(row(k))].template data_ptr<T>();
    return from.front().template data_ptr<T>() + row(k) * from.front().stride(0);
  }

  template <typename T>
  Site<T> site(Int k) const {
    const auto& core = cores[static_cast<size_t>(k)];
    Site<T> out{core.const_data_ptr<T>(), nullptr, nullptr, nullptr, nullptr, 0, core.size(0), core.size(1), core.size(2)};
    if (values) {
      out.values = values->const_data_ptr<Int>() + row(k), out.apart = n_rows();
    } else {
      out.vectors = vectors_of<T>(k, vectors);
    }
    return out;
  }

  // Numbers of a state behind core k, on the side that the walk leaves it.
  Int width(Int k) const { return cores[static_cast<size_t>(k)].size(k < n_left ? 2 : 0); }
  bool is_large() const {
    Int work = 0;
    for (const auto& core : cores) work += core.numel();
    return work * batch() > 200'000;
  }
};

// States behind every core, one after the other; parts of them may be asked for.
struct States {
  Tensor data, factors;  // flat; (d, b)
  std::vector<Int> starts;

  States(const Chain& chain, const at::TensorOptions& options) {
    Int total = 0;
    for (Int k = 0; k < chain.size(); ++k) starts.push_back(total), total += chain.batch() * chain.width(k);
    data = at::empty({total}, options);
    factors = at::empty({chain.size(), chain.batch()}, options);
  }
  States(const Chain& chain, Tensor kept, Tensor kept_factors) : data(std::move(kept)), factors(std::move(kept_factors)) {
    Int total = 0;
    for (Int k = 0; k < chain.size(); ++k) starts.push_back(total), total += chain.batch() * chain.width(k);
  }
  template <typename T>
  T* state(Int k) const {
    return data.data_ptr<T>() + starts[static_cast<size_t>(k)];
  }
  template <typename T>
  T* factor(Int k) const {
    return factors.data_ptr<T>() + k * factors.size(1);
  }
};

inline Int part_of(const Chain& chain) {
  constexpr Int least = 16;
  const Int parts = std::max<Int>(1, std::min<Int>(at::get_num_threads(), chain.batch() / least));
  return (chain.batch() + parts - 1) / parts;
}

template <typename T>
void walk_there(const Chain& chain, const States& states, int32_t* exponents) {
  const Int d = chain.size(), batch = chain.batch();
  const std::vector<T> ones(static_cast<size_t>(batch), T(1));
  on_threads(batch, part_of(chain), chain.is_large(), [&](Int first, Int last) {
    Groups groups;
    const T* before = ones.data();
    for (Int k = 0; k < chain.n_left; ++k) {
      T* const here = states.state<T>(k);
      expand(chain.site<T>(k), groups, before, here, first, last);
      scale_rows(here, chain.width(k), first, last, states.factor<T>(k), exponents);
      before = here;
    }
    before = ones.data();
    for (Int k = d - 1; k >= chain.n_left; --k) {
      T* const here = states.state<T>(k);
      shrink<T>(chain.site<T>(k), groups, before, here, nullptr, first, last);
      scale_rows(here, chain.width(k), first, last, states.factor<T>(k), exponents);
      before = here;
    }
  });
}

// Where the gradients of cores begin in one piece of memory.
inline std::vector<Int> starts_of(const Chain& chain) {
  std::vector<Int> starts{0};
  for (const auto& core : chain.cores) starts.push_back(starts.back() + core.numel());
  return starts;
}

template <typename T>
void walk_back(const Chain& chain, const States& states, const Tensor& left, const Tensor& right, T* grads,
               const Tensors& vector_grads) {
  const Int d = chain.size(), batch = chain.batch(), part = part_of(chain);
  const auto starts = starts_of(chain);
  const Int n_parts = batch == 0 ? 0 : (batch + part - 1) / part;
  std::vector<Tensor> more;  // gradients of the later parts, added in order: the same bits every time
  for (Int i = 1; i < n_parts; ++i) more.push_back(at::zeros({starts.back()}, left.options()));
  const std::vector<T> ones(static_cast<size_t>(batch), T(1));
  Int widest = 1;
  for (const auto& core : chain.cores) widest = std::max({widest, core.size(0), core.size(2)});
  const auto run = [&](Int first, Int last) {
    Groups groups;
    Room room;
    T* const mine = first == 0 ? grads : more[static_cast<size_t>(first / part - 1)].template data_ptr<T>();
    T* here = room.take<T>(batch * widest);
    T* next = room.take<T>(batch * widest);
    const auto site_of = [&](Int k) {
      auto site = chain.site<T>(k);
      site.grad = mine + starts[static_cast<size_t>(k)];
      if (!vector_grads.empty()) site.vector_grad = chain.vectors_of<T>(k, vector_grads);
      return site;
    };
    const auto begin = [&](const Tensor& grad, Int width) {
      std::memcpy(here + first * width, grad.const_data_ptr<T>() + first * width,
                  static_cast<size_t>((last - first) * width) * sizeof(T));
    };
    if (chain.n_left > 0) begin(left, chain.width(chain.n_left - 1));
    for (Int k = chain.n_left - 1; k >= 0; --k) {
      const auto site = site_of(k);
      const T* const before = k == 0 ? ones.data() : states.state<T>(k - 1);
      times_rows(here, site.s, first, last, states.factor<T>(k));
      add_grad(site, groups, before, here, first, last);
      if (k > 0 || site.vector_grad != nullptr) shrink(site, groups, here, next, before, first, last);
      std::swap(here, next);
    }
    if (chain.n_left < d) begin(right, chain.width(chain.n_left));
    for (Int k = chain.n_left; k < d; ++k) {
      const auto site = site_of(k);
      const T* const before = k == d - 1 ? ones.data() : states.state<T>(k + 1);
      times_rows(here, site.r, first, last, states.factor<T>(k));
      add_grad(site, groups, here, before, first, last);
      if (site.vector_grad != nullptr) shrink<T>(site, groups, before, nullptr, here, first, last);
      if (k < d - 1) expand(site, groups, here, next, first, last);
      std::swap(here, next);
    }
  };
  // Parts begin at multiples of `part` whether one thread takes them or several.
  on_threads(n_parts, 1, chain.is_large(), [&](Int from, Int to) {
    for (Int i = from; i < to; ++i) run(i * part, std::min((i + 1) * part, batch));
  });
  for (const auto& other : more) {
    const T* const from = other.const_data_ptr<T>();
    for (Int i = 0; i < starts.back(); ++i) grads[i] += from[i];
  }
}

inline bool is_plain(const Tensor& x, at::ScalarType dtype) {
  return x.device().is_cpu() && x.scalar_type() == dtype && x.is_contiguous() && !x.is_conj() && !x.is_neg();
}

// Whether these are what the walks are written for; what is not goes through Python.
inline bool fits(const Chain& chain) {
  if (chain.cores.empty()) return false;
  const auto dtype = chain.cores.front().scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble) return false;
  for (const auto& core : chain.cores)
    if (core.dim() != 3 || !is_plain(core, dtype)) return false;
  if (chain.values && (!is_plain(*chain.values, at::kLong) || chain.values->dim() != 2)) return false;
  if (!chain.values && chain.vectors.empty()) return false;
  for (const auto& f : chain.vectors)
    if (!is_plain(f, dtype) || f.dim() != (chain.is_stacked() ? 3 : 2)) return false;
  if (chain.n_rows() < chain.size()) return false;
  for (Int k = 0; k < chain.size() && !chain.values; ++k) {
    const auto& f = chain.vectors[static_cast<size_t>(chain.is_stacked() ? 0 : chain.row(k))];
    if (f.size(-2) != chain.batch() || f.size(-1) != chain.cores[static_cast<size_t>(k)].size(1)) return false;
  }
  return true;
}

using There = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// (left state, right state, exponents, states, factors); nothing where the walk is not for these.
inline std::optional<There> there(Tensors cores, Int n_left, std::optional<Tensor> values, Tensors vectors) {
  const Chain chain{std::move(cores), n_left, std::move(values), std::move(vectors)};
  if (!fits(chain)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  const auto options = chain.cores.front().options().requires_grad(false);
  const States states(chain, options);
  auto exponents = at::zeros({chain.batch()}, options.dtype(at::kInt));
  const auto last = [&](Int k) {
    const Int width = chain.width(k);
    return states.data.narrow(0, states.starts[static_cast<size_t>(k)], chain.batch() * width).view({chain.batch(), width}).clone();
  };
  const auto run = [&](auto zero) { walk_there<decltype(zero)>(chain, states, exponents.data_ptr<int32_t>()); };
  chain.cores.front().scalar_type() == at::kFloat ? run(0.0f) : run(0.0);
  const auto one = at::ones({chain.batch(), 1}, options);
  return There{n_left > 0 ? last(n_left - 1) : one, n_left < chain.size() ? last(n_left) : one, exponents, states.data,
               states.factors};
}

// Gradients of all cores, and those of the vectors where these are asked for.
inline std::pair<Tensors, Tensors> back(Tensors cores, Int n_left, std::optional<Tensor> values, Tensors vectors,
                                        Tensor kept, Tensor factors, const Tensor& left, const Tensor& right,
                                        bool with_vectors) {
  const Chain chain{std::move(cores), n_left, std::move(values), std::move(vectors)};
  const pybind11::gil_scoped_release unlocked;
  const States states(chain, std::move(kept), std::move(factors));
  const auto starts = starts_of(chain);
  const auto flat = at::zeros({starts.back()}, states.data.options());
  Tensors grads, vector_grads;
  if (with_vectors)
    for (const auto& f : chain.vectors) vector_grads.push_back(at::zeros_like(f));
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    walk_back<T>(chain, states, left.contiguous(), right.contiguous(), flat.data_ptr<T>(), vector_grads);
  };
  flat.scalar_type() == at::kFloat ? run(0.0f) : run(0.0);
  for (size_t k = 0; k < chain.cores.size(); ++k)
    grads.push_back(flat.narrow(0, starts[k], starts[k + 1] - starts[k]).view(chain.cores[k].sizes()));
  return {std::move(grads), std::move(vector_grads)};
}

// -- the norm -----------------------------------------------------------------------------------------

// x and its largest entry taken to about 1 by a power of two.
template <typename T>
void near_one(T* x, Int n) {
  T factor = 1;
  int32_t e = 0;
  scale_rows(x, n, 0, 1, &factor, &e);
}

// The gradient of ln <chain, chain> with respect to every core: 2 X / <X, core> for X = L core R, whatever the sizes of
// what lies left and right of it.
template <typename T>
void norm_grad(const Tensors& cores, T* grads) {
  const auto d = cores.size();
  std::vector<std::vector<T>> lefts{{T(1)}};  // (r, r) before every core
  Int most = 1;
  for (const auto& core : cores) most = std::max(most, core.numel());
  Room room;
  T* const half = room.take<T>(most);
  for (size_t k = 0; k + 1 < d; ++k) {
    const Int r = cores[k].size(0), ns = cores[k].size(1) * cores[k].size(2), s = cores[k].size(2), rn = r * cores[k].size(1);
    const T* const core = cores[k].template const_data_ptr<T>();
    std::vector<T> left(static_cast<size_t>(s * s));
    multiply_into(half, ns, Matrix<T>{lefts.back().data(), r}, Matrix<T>{core, ns}, r, ns, r);
    multiply_into(left.data(), s, Matrix<T>{core, s, true}, Matrix<T>{half, s}, s, s, rn);
    near_one(left.data(), s * s);
    lefts.push_back(std::move(left));
  }
  std::vector<T> right{T(1)};
  T* end = grads;
  for (const auto& core : cores) end += core.numel();
  for (size_t k = d; k-- > 0;) {
    const Int r = cores[k].size(0), ns = cores[k].size(1) * cores[k].size(2), s = cores[k].size(2), rn = r * cores[k].size(1);
    const T* const core = cores[k].template const_data_ptr<T>();
    T* const grad = end -= cores[k].numel();
    multiply_into(half, s, Matrix<T>{core, s}, Matrix<T>{right.data(), s}, rn, s, s);
    multiply_into(grad, ns, Matrix<T>{lefts[k].data(), r}, Matrix<T>{half, ns}, r, ns, r);
    T whole = 0;
    for (Int i = 0; i < rn * s; ++i) whole += grad[i] * core[i];
    for (Int i = 0; i < rn * s; ++i) grad[i] *= 2 / whole;
    right.assign(static_cast<size_t>(r * r), T(0));
    multiply_into(right.data(), r, Matrix<T>{half, ns}, Matrix<T>{core, ns, true}, r, r, ns);
    near_one(right.data(), r * r);
  }
}

inline std::optional<Tensors> norm_grads(Tensors cores) {
  const Int d = static_cast<Int>(cores.size());
  if (d == 0) return std::nullopt;
  const auto dtype = cores.front().scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble) return std::nullopt;
  for (const auto& core : cores)
    if (core.dim() != 3 || !is_plain(core, dtype)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  Int total = 0;
  for (const auto& core : cores) total += core.numel();
  const auto flat = at::empty({total}, cores.front().options().requires_grad(false));
  dtype == at::kFloat ? norm_grad<float>(cores, flat.data_ptr<float>()) : norm_grad<double>(cores, flat.data_ptr<double>());
  Tensors grads;
  Int at = 0;
  for (const auto& core : cores) grads.push_back(flat.narrow(0, at, core.numel()).view(core.sizes())), at += core.numel();
  return grads;
}

// -- samples of squared amplitudes --------------------------------------------------------------------

// One value for each of the rows `first .. last` at a site behind which all cores are right-orthonormal: the weight of a
// value is the squared norm of what the state becomes by it. `next` gets that state, of norm 1.
template <typename T>
void draw_site(const Site<T>& site, const T* state, T* ahead, T* next, const double* draws, Int apart, Int* values,
               T least, Int first, Int last) {
  const Int wide = site.n * site.s;
  multiply_into(ahead, wide, Matrix<T>{state + first * site.r, site.r}, Matrix<T>{site.core, wide}, last - first, wide,
                site.r);
  std::vector<T> weights(static_cast<size_t>(site.n));
  for (Int i = first; i < last; ++i) {
    const T* const row = ahead + (i - first) * wide;
    T whole = 0;
    for (Int v = 0; v < site.n; ++v) {
      T sum = 0;
      for (Int s = 0; s < site.s; ++s) sum += row[v * site.s + s] * row[v * site.s + s];
      weights[static_cast<size_t>(v)] = sum, whole += sum;
    }
    double upto = 0;
    T kept = 0;
    for (auto& w : weights) w = w > least * whole ? w : T(0), kept += w;  // what rounding may have made of nothing
    const double wanted = draws[i * apart] * static_cast<double>(kept);
    Int chosen = 0;
    for (Int v = 0; v < site.n; ++v) {
      if (weights[static_cast<size_t>(v)] == 0) continue;
      chosen = v, upto += static_cast<double>(weights[static_cast<size_t>(v)]);
      if (upto > wanted) break;
    }
    values[i * apart] = chosen;
    const T factor = 1 / std::sqrt(weights[static_cast<size_t>(chosen)]);
    for (Int s = 0; s < site.s; ++s) next[i * site.s + s] = row[chosen * site.s + s] * factor;
  }
}

template <typename T>
void draw_all(const Tensors& cores, const Tensor& draws, double least, Int* values) {
  const Int batch = draws.size(0), d = draws.size(1);
  Int widest = 1, work = 0;
  for (const auto& core : cores) widest = std::max({widest, core.size(2), core.size(1) * core.size(2)}), work += core.numel();
  constexpr Int part = 128;
  on_threads(batch, part, work * batch > 200'000, [&](Int from, Int to) {
    for (Int first = from; first < to; first += part) {
      const Int last = std::min(first + part, to);
      Room room;
      T* state = room.take<T>(part * widest);
      T* next = room.take<T>(part * widest);
      T* const ahead = room.take<T>(part * widest);
      std::fill(state, state + (last - first), T(1));
      for (Int k = 0; k < d; ++k) {
        const auto& core = cores[static_cast<size_t>(k)];
        const Site<T> site{core.const_data_ptr<T>(), nullptr, nullptr, nullptr, nullptr, 0,
                           core.size(0), core.size(1), core.size(2)};
        draw_site(site, state, ahead, next, draws.const_data_ptr<double>() + first * d + k, d, values + first * d + k,
                  static_cast<T>(least), 0, last - first);
        std::swap(state, next);
      }
    }
  });
}

// Values (b, d) of numbers (b, d) in [0, 1), for cores that are right-orthonormal behind the first one.
inline std::optional<Tensor> drawn(Tensors cores, const Tensor& draws, double least) {
  if (cores.empty() || !is_plain(draws, at::kDouble) || draws.size(1) != static_cast<Int>(cores.size())) return std::nullopt;
  const auto dtype = cores.front().scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble) return std::nullopt;
  for (const auto& core : cores)
    if (core.dim() != 3 || !is_plain(core, dtype)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  auto values = at::empty(draws.sizes(), draws.options().dtype(at::kLong));
  dtype == at::kFloat ? draw_all<float>(cores, draws, least, values.data_ptr<Int>())
                      : draw_all<double>(cores, draws, least, values.data_ptr<Int>());
  return values;
}

inline void bind(pybind11::module_& m) {
  m.def("chain_drawn", &drawn);
  m.def("chain_norm_grads", &norm_grads);
  m.def("data_walk_there", &there);
  m.def("data_walk_back", &back);
}

}  // namespace tensortrain::data_walk
