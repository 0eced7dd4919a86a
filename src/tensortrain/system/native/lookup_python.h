// What Python sees of lookups: calls that answer None where the tensors at hand are not what the loops take.
#pragma once

#include "bags.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace tensortrain {

namespace py = pybind11;

// Least and greatest id; none where they are no plain whole numbers.
inline std::optional<std::pair<int64_t, int64_t>> range_of_ids(const Tensor& ids) {
  if (!is_undisturbed() || !are_ids(ids) || ids.numel() == 0) return std::nullopt;
  return extent_of(ids);
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

inline std::optional<Tensor> look_up_cores(const Tensor& ids, const std::vector<Tensor>& cores, int64_t max_bytes) {
  const py::gil_scoped_release unlocked;
  return rows_of(ids, cores, max_bytes);
}

inline std::optional<Tensor> bag_cores(const Tensor& ids, const Tensor& offsets, const std::optional<Tensor>& weights,
                                       const std::tuple<bool, bool, int64_t>& options, const Tensors& cores,
                                       int64_t max_bytes) {
  const py::gil_scoped_release unlocked;
  return bags_of_cores(ids, offsets, weights, options, cores, max_bytes);
}

// A run of cores as one, merged by the given steps.
inline std::optional<Tensor> merge_run(const std::vector<Tensor>& cores, const Sizes& steps) {
  if (!are_looked_up(cores)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  return cores[0].scalar_type() == at::kFloat ? merged_run<float>(cores, steps) : merged_run<double>(cores, steps);
}

inline std::optional<std::vector<std::optional<Tensor>>> merge_run_backward(const std::vector<Tensor>& cores,
                                                                            const Sizes& steps, const Tensor& grad,
                                                                            const std::vector<bool>& needed) {
  if (!are_looked_up(cores) || !is_looked_up(grad, cores[0].scalar_type())) return std::nullopt;
  const py::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto run = grad.scalar_type() == at::kFloat ? &merged_run_backward<float> : &merged_run_backward<double>;
  return run(cores, steps, grad.contiguous(), needed);
}

inline void define_lookups(py::module_& m) {
  py::class_<RowsWay>(m, "RowsWay", py::custom_type_setup([](PyHeapTypeObject* type) {
                        type->ht_type.tp_call = &call_rows;
                      }))
      .def(py::init<py::list>())
      .def("keep_training", &RowsWay::keep_training)
      .def("keep_product", &RowsWay::keep_product)
      .def("keep_tables", &RowsWay::keep_tables)
      .def("forget_weights", &RowsWay::forget_weights)
      .def("note_cached", &RowsWay::note_cached)
      // Part of no copy and no checkpoint: None takes its place.
      .def("__reduce__", [](const py::object&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
  m.def("range_of_ids", &range_of_ids);
  m.def("pack_cores", &pack_cores);
  m.def("look_up", &look_up);
  m.def("look_up_cores", &look_up_cores);
  m.def("bag_cores", &bag_cores);
  m.def("merge_run", &merge_run);
  m.def("merge_run_backward", &merge_run_backward);
}

}  // namespace tensortrain
