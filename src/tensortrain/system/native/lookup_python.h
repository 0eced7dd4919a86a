// What Python sees of lookups: calls that answer None where the tensors at hand are not what the loops take.
#pragma once

#include "lookup.h"
#include "short_way.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace tensortrain {

namespace py = pybind11;

inline bool is_looked_up(const Tensor& tensor, at::ScalarType dtype) {
  return is_plain(tensor) && tensor.scalar_type() == dtype;
}

inline bool are_looked_up(const std::vector<Tensor>& tensors) {
  if (tensors.size() < 2 || !is_undisturbed()) return false;
  const auto dtype = tensors[0].scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble) return false;
  for (const auto& tensor : tensors)
    if (!is_looked_up(tensor, dtype)) return false;
  return true;
}

inline bool are_ids(const Tensor& ids) { return is_looked_up(ids, at::kLong) && ids.is_contiguous(); }

// Least and greatest id; none where they are no plain whole numbers.
inline std::optional<std::pair<int64_t, int64_t>> range_of_ids(const Tensor& ids) {
  if (!is_undisturbed() || !are_ids(ids) || ids.numel() == 0) return std::nullopt;
  const auto* const at = ids.const_data_ptr<int64_t>();
  int64_t low = at[0], high = at[0];
  for (int64_t k = 1, n = ids.numel(); k < n; ++k) {
    low = std::min(low, at[k]);
    high = std::max(high, at[k]);
  }
  return std::make_pair(low, high);
}

inline std::optional<std::vector<Tensor>> pack_cores(const std::vector<Tensor>& cores) {
  if (!are_looked_up(cores)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  std::vector<Tensor> tables;
  for (const auto& core : cores) {
    const bool is_last = tables.size() + 1 == cores.size();
    tables.push_back(core.scalar_type() == at::kFloat ? pack_core<float>(core, is_last) : pack_core<double>(core, is_last));
  }
  return tables;
}

inline std::optional<Tensor> look_up(const Tensor& ids, const std::vector<Tensor>& tables,
                                     const std::vector<Sizes>& cores, int64_t max_bytes) {
  if (!are_ids(ids) || !are_looked_up(tables)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto run = tables[0].scalar_type() == at::kFloat ? &looked_up<float> : &looked_up<double>;
  return run(ids, tables, cores, max_bytes);
}

inline std::optional<std::vector<Tensor>> look_up_backward(const Tensor& ids, const std::vector<Tensor>& tables,
                                                           const std::vector<Sizes>& cores, const Tensor& grad,
                                                           int64_t max_bytes) {
  if (!are_ids(ids) || !are_looked_up(tables) || !is_looked_up(grad, tables[0].scalar_type())) return std::nullopt;
  const py::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto run = grad.scalar_type() == at::kFloat ? &lookup_gradients<float> : &lookup_gradients<double>;
  return run(ids, tables, cores, grad.contiguous(), max_bytes);
}

inline void define_lookups(py::module_& m) {
  m.def("range_of_ids", &range_of_ids);
  m.def("pack_cores", &pack_cores);
  m.def("look_up", &look_up);
  m.def("look_up_backward", &look_up_backward);
}

}  // namespace tensortrain
