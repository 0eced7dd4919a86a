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

// The cores of a chain and the tensors that hold them; nothing where one of them is not plain or would be recorded.
struct Given {
  std::vector<Tensor> held;

  static std::optional<Given> of(const py::list& list, Int n_axes = 3) {
    Given given;
    if (list.empty() || !lapack::has_lapack() || !is_undisturbed()) return std::nullopt;
    const bool records = c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled();
    for (const auto one : list) {
      if (!THPVariable_CheckExact(one.ptr())) return std::nullopt;
      const auto& core = THPVariable_Unpack(one.ptr());
      if (!is_plain(core) || core.dim() != n_axes || core.numel() == 0 || core.numel() > (1 << 30)) return std::nullopt;
      if (core.is_conj() || core.is_neg() || (records && core.requires_grad())) return std::nullopt;
      given.held.push_back(core.is_contiguous() ? core : core.contiguous());
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
    for (const auto& core : held)
      found.push_back({core.const_data_ptr<T>(), core.size(0), core.size(1), core.size(2)});
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

inline Parts dot_parts(const py::list& bra, const py::list& ket) {
  const auto left = Given::of(bra), right = Given::of(ket);
  if (!left || !right || left->held.size() != right->held.size() || left->is_double() != right->is_double())
    return std::nullopt;
  for (size_t k = 0; k < left->held.size(); ++k)
    if (left->held[k].size(1) != right->held[k].size(1)) return std::nullopt;
  if (left->held[0].size(0) != 1 || right->held[0].size(0) != 1 || left->held.back().size(2) != 1 ||
      right->held.back().size(2) != 1)
    return std::nullopt;
  const py::gil_scoped_release unlocked;
  return left->is_double() ? parts_of(dot(left->cores<double>(), right->cores<double>()))
                           : parts_of(dot(left->cores<float>(), right->cores<float>()));
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
  Buffer<T> rows, made;
  for (size_t k = 0; k < left.held.size(); ++k) {
    const auto a = left.matrix<T>(k), b = right.matrix<T>(k);
    out.push_back(at::empty({a.r * b.r, a.i, b.j, a.s * b.s}, left.held[k].options()));
    times_matrix(a, b, out.back().mutable_data_ptr<T>(), rows, made);
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

  using Made_ = std::tuple<std::vector<Tensor>, std::vector<Tensor>, Tensor, Tensor, Tensor>;

  // Cores, kept singular values, tails, the least of the kept values, and growth; nothing where a step failed.
  std::optional<Made_> cut(double share, const std::vector<Int>& caps, bool needs_values) {
    const py::gil_scoped_release unlocked;
    auto found = rounding.cut(share, caps, needs_values);
    if (!rounding.is_safe) return std::nullopt;
    std::vector<Tensor> values;
    for (const auto& one : found.values) values.push_back(tensor_of(one));
    return Made_(tensors_of(found.cores), std::move(values), tensor_of(found.tails), tensor_of(found.smallest),
                 tensor_of(found.growth));
  }

  std::pair<Tensor, Tensor> norm() const {
    const int32_t exponent = static_cast<int32_t>(rounding.exponent);
    return {tensor_of(&rounding.norm, {}), tensor_of(&exponent, {})};
  }
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
  m.def("chain_dot", &dot_parts);
  m.def("chain_norm", &norm_parts);
  m.def("chain_product", &product_cores);
  m.def("chain_orthogonal", &orthogonal_cores);
  m.def("chain_balanced", &balanced_cores);
  m.def("chain_rounding", &walk);
}

}  // namespace tensortrain::chain
