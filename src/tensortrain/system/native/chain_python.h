// Chains as Python hands them over: lists of plain tensors (r, n, s) of one dtype, none of them empty.
#pragma once

#include "chain_product.h"
#include "rounding.h"
#include "short_way.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace tensortrain::chain {

namespace py = pybind11;

// Whether these are plain cores of one dtype with so many axes, whose ranks are at least 1, meet, and are 1 at both ends.
inline bool are_sound(const py::sequence& cores, Int n_axes) {
  const size_t n = cores.size();
  Int rank = 1;
  std::optional<at::ScalarType> dtype;
  for (size_t k = 0; k < n; ++k) {
    const py::object one = cores[k];
    if (!THPVariable_CheckExact(one.ptr())) return false;
    const auto& core = THPVariable_Unpack(one.ptr());
    if (!has_plain_keys(core) || core.dim() != n_axes || core.size(0) != rank) return false;
    if (!dtype) dtype = core.scalar_type();
    if (core.scalar_type() != *dtype) return false;
    rank = core.size(-1);
    if (rank < 1) return false;
  }
  return n > 0 && rank == 1 && (dtype == at::kDouble || dtype == at::kFloat);
}

// Whether a core lies column by column, as QR leaves it: its last axis apart, the others row by row.
inline bool is_turned(const Tensor& core) {
  const auto sizes = core.sizes(), strides = core.strides();
  const Int last = core.dim() - 1;
  Int stride = 1;
  for (Int k = last - 1; k >= 0; --k) {
    if (sizes[k] > 1 && strides[k] != stride) return false;
    stride *= sizes[k];
  }
  return sizes[last] == 1 || strides[last] == stride;
}

template <typename T>
Core<T> core_of(const Tensor& core) {
  const Int r = core.size(0), s = core.size(-1);
  return {core.const_data_ptr<T>(), r, core.numel() / (r * s), s, !core.is_contiguous()};
}

template <typename T>
Tensor turned_rows(const Tensor& given) {
  auto out = at::detail::empty_cpu(given.sizes(), given.scalar_type());
  const auto core = core_of<T>(given);
  T* const to = out.mutable_data_ptr<T>();
  on_rows(core.r * core.n, core.s, [&](Int first, Int last) { turn_rows(core, first, last, to); });
  return out;
}

// Row by row: torch's own way takes several times as long for all those that QR has left.
inline Tensor in_rows(const Tensor& core) {
  if (core.is_contiguous()) return core;
  if (core.scalar_type() == at::kDouble && is_turned(core)) return turned_rows<double>(core);
  if (core.scalar_type() == at::kFloat && is_turned(core)) return turned_rows<float>(core);
  return core.contiguous();
}

// The cores of a chain and the tensors that hold them; nothing where one of them is not plain or would be recorded.
struct Given {
  std::vector<Tensor> held;

  // Where they `may_lie` as QR leaves them, they are not brought into rows.
  static std::optional<Given> of(const py::sequence& list, Int n_axes = 3, bool may_lie = false) {
    Given given;
    if (list.empty() || !lapack::has_lapack() || !is_undisturbed()) return std::nullopt;
    const bool records = c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled();
    given.held.reserve(list.size());
    for (const auto one : list) {
      if (!THPVariable_CheckExact(one.ptr())) return std::nullopt;
      const auto& core = THPVariable_Unpack(one.ptr());
      if (!is_plain(core) || core.dim() != n_axes || core.numel() == 0 || core.numel() > (1 << 30)) return std::nullopt;
      if (core.is_conj() || core.is_neg() || (records && core.requires_grad())) return std::nullopt;
      given.held.push_back(may_lie && is_turned(core) ? core : in_rows(core));
    }
    const auto dtype = given.held[0].scalar_type();
    if (dtype != at::kDouble && dtype != at::kFloat) return std::nullopt;
    for (size_t k = 0; k < given.held.size(); ++k) {
      if (given.held[k].scalar_type() != dtype) return std::nullopt;
      if (k && given.held[k].size(0) != given.held[k - 1].size(n_axes - 1)) return std::nullopt;
    }
    return given;
  }

  bool is_double() const { return held[0].scalar_type() == at::kDouble; }

  template <typename T>
  MatrixCore<T> matrix(size_t k) const {
    const auto& core = held[k];
    return {core.const_data_ptr<T>(), core.size(0), core.size(1), core.size(2), core.size(3)};
  }

  template <typename T>
  Cores<T> cores() const {
    Cores<T> found;
    for (const auto& core : held) found.push_back(core_of<T>(core));
    return found;
  }
};

template <typename T>
Tensor tensor_of(const T* data, at::IntArrayRef sizes) {
  auto out = at::detail::empty_cpu(sizes, c10::CppTypeToScalarType<T>::value);
  std::copy(data, data + out.numel(), out.template mutable_data_ptr<T>());
  return out;
}

// A tensor around large numbers, which would take as long to copy as to make.
template <typename T>
Tensor tensor_around(Buffer<T>& data, at::IntArrayRef sizes) {
  constexpr size_t many = 1 << 14;
  if (data.size() < many) return tensor_of(data.data(), sizes);
  auto held = std::make_shared<Buffer<T>>(std::move(data));
  return at::from_blob(held->data(), sizes, [held](void*) {}, at::TensorOptions(c10::CppTypeToScalarType<T>::value));
}

template <typename T>
std::vector<Tensor> tensors_of(std::vector<Made<T>>& made) {
  std::vector<Tensor> out;
  for (auto& core : made) out.push_back(tensor_around(core.data, {core.r, core.n, core.s}));
  return out;
}

inline Tensor tensor_of(const Buffer<double>& numbers) {
  return tensor_of(numbers.data(), {static_cast<Int>(numbers.size())});
}

// Mantissa and exponent as tensors without axes, as Python has them.
using Parts = std::optional<std::pair<Tensor, Tensor>>;

template <typename T>
Parts parts_of(const std::optional<Value<T>>& value) {
  if (!value) return std::nullopt;
  const int32_t exponent = static_cast<int32_t>(value->exponent);
  return std::make_pair(tensor_of(&value->mantissa, {}), tensor_of(&exponent, {}));
}

// Two chains of equal modes and ends of rank 1.
struct Pair {
  Given left, right;

  static std::optional<Pair> of(const py::sequence& bra, const py::sequence& ket, Int n_axes) {
    auto left = Given::of(bra, n_axes, true), right = left ? Given::of(ket, n_axes, true) : std::nullopt;
    if (!right || left->held.size() != right->held.size() || left->is_double() != right->is_double())
      return std::nullopt;
    for (size_t k = 0; k < left->held.size(); ++k)
      for (Int axis = 1; axis + 1 < n_axes; ++axis)
        if (left->held[k].size(axis) != right->held[k].size(axis)) return std::nullopt;
    for (const auto* const one : {&*left, &*right})
      if (one->held[0].size(0) != 1 || one->held.back().size(-1) != 1) return std::nullopt;
    return Pair{std::move(*left), std::move(*right)};
  }

  template <typename T>
  std::optional<Value<T>> dot() const {
    return chain::dot(left.cores<T>(), right.cores<T>());
  }
};

inline Parts dot_parts(const py::sequence& bra, const py::sequence& ket) {
  const auto pair = Pair::of(bra, ket, 3);
  if (!pair) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return pair->left.is_double() ? parts_of(pair->dot<double>()) : parts_of(pair->dot<float>());
}

template <typename T>
std::optional<Tensor> whole_of(const std::optional<Value<T>>& value) {
  if (!value) return std::nullopt;
  const T whole = std::ldexp(value->mantissa, static_cast<int>(std::clamp<int64_t>(value->exponent, -1 << 24, 1 << 24)));
  return tensor_of(&whole, {});
}

// The inner product itself, of cores (r, n, s) or (r, i, j, s): nothing where the steps in Python have to look at them.
inline std::optional<Tensor> dot_whole(const py::sequence& bra, const py::sequence& ket, Int n_axes) {
  const auto pair = Pair::of(bra, ket, n_axes);
  if (!pair) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return pair->left.is_double() ? whole_of(pair->dot<double>()) : whole_of(pair->dot<float>());
}

inline Parts norm_parts(const py::list& cores) {
  const auto given = Given::of(cores);
  if (!given) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return given->is_double() ? parts_of(norm(given->cores<double>())) : parts_of(norm(given->cores<float>()));
}

using Products = std::optional<std::vector<Tensor>>;

template <typename T>
std::vector<Tensor> entries_of(const Given& left, const Given& right) {
  const auto a = left.cores<T>(), b = right.cores<T>();
  std::vector<Tensor> out;
  for (size_t k = 0; k < a.size(); ++k) {
    out.push_back(at::empty({a[k].r * b[k].r, a[k].n, a[k].s * b[k].s}, left.held[k].options()));
    times_entries(a[k], b[k], out.back().mutable_data_ptr<T>());
  }
  return out;
}

template <typename T>
std::vector<Tensor> matrices_of(const Given& left, const Given& right) {
  std::vector<Tensor> out;
  MatrixRoom<T> room;
  double work = 0;
  for (size_t k = 0; k < left.held.size(); ++k)
    work += static_cast<double>(left.held[k].numel()) * right.held[k].numel() / right.held[k].size(1);
  const OneThread alone(work < 2e7);
  for (size_t k = 0; k < left.held.size(); ++k) {
    const auto a = left.matrix<T>(k), b = right.matrix<T>(k);
    out.push_back(at::empty({a.r * b.r, a.i, b.j, a.s * b.s}, left.held[k].options()));
    times_matrix(a, b, out.back().mutable_data_ptr<T>(), room);
  }
  return out;
}

// Cores of the product of two chains, entry by entry of cores (r, n, s), or of matrices (r, i, j, s).
inline Products product_cores(const py::list& a, const py::list& b, bool of_matrices) {
  const Int n_axes = of_matrices ? 4 : 3;
  const auto left = Given::of(a, n_axes), right = Given::of(b, n_axes);
  if (!left || !right || left->held.size() != right->held.size() || left->is_double() != right->is_double())
    return std::nullopt;
  for (size_t k = 0; k < left->held.size(); ++k)
    if (left->held[k].size(n_axes - 2) != right->held[k].size(1)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  if (of_matrices) return left->is_double() ? matrices_of<double>(*left, *right) : matrices_of<float>(*left, *right);
  return left->is_double() ? entries_of<double>(*left, *right) : entries_of<float>(*left, *right);
}

using Placed = std::optional<std::pair<std::vector<Tensor>, Tensor>>;

template <typename T>
Placed orthogonal_of(const Given& given, Int k) {
  auto found = orthogonal(given.cores<T>(), k);
  if (!found) return std::nullopt;
  const int32_t exponent = static_cast<int32_t>(found->exponent);
  return std::make_pair(tensors_of(found->cores), tensor_of(&exponent, {}));
}

// These cores with all but core k orthonormal, and the exponent of the whole.
inline Placed orthogonal_cores(const py::list& cores, Int k) {
  const auto given = Given::of(cores);
  if (!given) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return given->is_double() ? orthogonal_of<double>(*given, k) : orthogonal_of<float>(*given, k);
}

// Cores with bonds of like size and rows of about 1, and the exponent of the whole.
inline Placed balanced_cores(const py::list& cores) {
  const auto given = Given::of(cores);
  if (!given || !given->is_double()) return std::nullopt;
  const py::gil_scoped_release unlocked;
  if (!is_finite(given->cores<double>())) return std::nullopt;
  auto made = balanced(given->cores<double>());
  const int32_t exponent = static_cast<int32_t>(balance_rows(made));
  return std::make_pair(tensors_of(made), tensor_of(&exponent, {}));
}

// A rounding of tensors: `cut` may be called for several tolerances.
struct Walked {
  Given given;
  Rounding rounding;

  Walked(const Given& cores, Int hi, bool squares) : given(cores), rounding(given.cores<double>(), hi, squares) {}

  using Numbers = std::vector<double>;
  using Made_ =
      std::tuple<std::vector<Tensor>, std::vector<Tensor>, Numbers, Numbers, Numbers, std::pair<double, double>>;

  static Numbers numbers_of(const Buffer<double>& found) { return {found.begin(), found.end()}; }

  // Cores, kept singular values, tails, the least of the kept values, growth, and norm and largest modulus of the last
  // core; nothing where a step failed.
  std::optional<Made_> cut(double share, const std::vector<Int>& caps, bool needs_values) {
    const py::gil_scoped_release unlocked;
    auto found = rounding.cut(share, caps, needs_values);
    if (!rounding.is_safe) return std::nullopt;
    std::vector<Tensor> values;
    if (needs_values)
      for (const auto& one : found.values) values.push_back(tensor_of(one));
    const auto& last = found.cores.back().data;
    const std::pair<double, double> sizes{std::sqrt(squares(last.data(), last.size())), ends_of(last.data(), last.size()).high};
    return Made_(tensors_of(found.cores), std::move(values), numbers_of(found.tails), numbers_of(found.smallest),
                 numbers_of(found.growth), sizes);
  }

  std::pair<double, Int> norm() const { return {rounding.norm, rounding.exponent}; }
};

inline std::unique_ptr<Walked> walk(const py::list& cores, Int hi, bool squares) {
  auto given = Given::of(cores);
  if (!given || !given->is_double()) return nullptr;
  const py::gil_scoped_release unlocked;
  auto walked = std::make_unique<Walked>(*given, hi, squares);
  // Squares of numbers that lie far apart may leave the range where these do not.
  if (!walked->rounding.is_safe && squares) walked = std::make_unique<Walked>(*given, hi, false);
  return walked->rounding.is_safe ? std::move(walked) : nullptr;
}

inline void bind(py::module_& m) {
  py::class_<Walked>(m, "Rounding").def("cut", &Walked::cut).def("norm", &Walked::norm);
  m.def("chain_is_sound", &are_sound);
  m.def("chain_dot", &dot_parts);
  m.def("chain_dot_whole", &dot_whole);
  m.def("chain_norm", &norm_parts);
  m.def("chain_product", &product_cores);
  m.def("chain_orthogonal", &orthogonal_cores);
  m.def("chain_balanced", &balanced_cores);
  m.def("chain_rounding", &walk);
}

}  // namespace tensortrain::chain
