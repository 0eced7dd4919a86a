// What Python sees of the kernels.
#include "chain_python.h"
#include "conv_call.h"
#include "data_walk.h"
#include "filters.h"
#include "grouped.h"
#include "higher.h"
#include "kept_kernels.h"
#include "kept_ways.h"
#include "layer_call.h"
#include "lookup_python.h"
#include "recurrent_python.h"


#include <map>
#include <string>
#include <tuple>

namespace tensortrain {
namespace {

// Steps as (start, stop, form, mode, rank, start and middle of every merge). Equal sweeps are one, and it stays for
// good: what waits for its way back holds its address.
c10::intrusive_ptr<Sweep> make_sweep(bool leftward, bool ready, int64_t in_features, int64_t out_features,
                                     int64_t rows_at_a_time, const std::vector<Sizes>& steps,
                                     std::vector<Sizes> shapes) {
  using Key = std::tuple<Sizes, std::vector<Sizes>, std::vector<Sizes>>;
  static auto& known = *new std::map<Key, c10::intrusive_ptr<Sweep>>();  // never destroyed
  auto& sweep = known[Key({leftward, ready, in_features, out_features, rows_at_a_time}, steps, shapes)];
  if (sweep) return sweep;
  sweep = c10::make_intrusive<Sweep>();
  sweep->leftward = leftward;
  sweep->ready = ready;
  sweep->in_features = in_features;
  sweep->out_features = out_features;
  sweep->rows_at_a_time = rows_at_a_time;
  sweep->shapes = std::move(shapes);
  for (const auto& given : steps) {
    Step step{given[0], given[1], static_cast<Form>(given[2]), given[3], given[4], {}};
    for (size_t k = 5; k + 1 < given.size(); k += 2) step.merges.push_back({given[k], given[k + 1]});
    sweep->steps.push_back(std::move(step));
  }
  return sweep;
}

// One product with a weight (out_features, in_features).
c10::intrusive_ptr<Sweep> dense_sweep(int64_t in_features, int64_t out_features) {
  return make_sweep(true, true, in_features, out_features, 0, {{0, 1, static_cast<int64_t>(Form::linear), in_features, 1}},
                    {{out_features, in_features}});
}

std::optional<Tensor> run(const c10::intrusive_ptr<Sweep>& sweep, const py::object& input, const py::list& given,
                          const py::object& added) {
  Tensors tensors;
  for (const auto one : given) {
    if (!is_tensor(one.ptr())) return std::nullopt;
    tensors.push_back(THPVariable_Unpack(one.ptr()));
  }
  if (!is_tensor(input.ptr()) || !(added.is_none() || is_tensor(added.ptr()))) return std::nullopt;
  const auto x = THPVariable_Unpack(input.ptr());
  const auto bias = added.is_none() ? std::nullopt : Bias(THPVariable_Unpack(added.ptr()));
  if (!is_undisturbed() || !fits(*sweep, x, tensors, bias)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return multiply(sweep, x, tensors, bias);
}

// Whether grouped products of these tensors were done; out lies as it was made, so that its rows can be written to.
using GroupedProduct = void (*)(const Tensor&, const Tensor&, const std::vector<int64_t>&, const Tensor&);

template <GroupedProduct multiply>
bool run_groups(const Tensor& states, const Tensor& other, const std::vector<int64_t>& counts, const Tensor& out) {
  for (const auto& tensor : {states, other, out})
    if (!is_plain(tensor) || tensor.dim() != 3 || tensor.scalar_type() != states.scalar_type()) return false;
  if (!is_undisturbed() || !at::isFloatingType(states.scalar_type()) || !out.is_contiguous()) return false;
  const py::gil_scoped_release unlocked;
  multiply(states, other, counts, out);
  return true;
}

}  // namespace
}  // namespace tensortrain

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace tensortrain;
  py::class_<Sweep, c10::intrusive_ptr<Sweep>>(m, "Sweep");
  py::class_<ShortWay>(m, "ShortWay", py::custom_type_setup([](PyHeapTypeObject* type) {
                         type->ht_type.tp_call = &call_layer;
                       }))
      .def(py::init<py::list>())
      .def("keep_training", &ShortWay::keep_training)
      .def("keep_inference", &ShortWay::keep_inference)
      .def("forget_weights", &ShortWay::forget_weights)
      .def("note_cached", &ShortWay::note_cached)
      // Part of no copy and no checkpoint: None takes its place.
      .def("__reduce__", [](const py::object&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
  py::class_<ConvWay>(m, "ConvWay", py::custom_type_setup([](PyHeapTypeObject* type) {
                        type->ht_type.tp_call = &call_convolution;
                      }))
      .def(py::init<py::list>())
      .def_readonly("options", &ConvWay::options)
      .def("keep_dense", &ConvWay::keep_dense)
      .def("keep_call", &ConvWay::keep_call)
      .def("train_dense", &ConvWay::train_dense)
      .def("train_call", &ConvWay::train_call)
      .def("forget_weights", &ConvWay::forget_weights)
      .def("__reduce__", [](const py::object&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
  py::class_<Contraction, c10::intrusive_ptr<Contraction>>(m, "Contraction");
  m.def("make_contraction", &make_contraction);
  m.def("contract_cores", &contract_cores);
  m.def("convolve_contracted", &convolve_contracted);
  m.def("know_kernel_builder", [](py::object build) { kept_kernels().know_builder(std::move(build)); });
  m.def("forget_kept_kernel", [](int64_t address) { kept_kernels().forget(address); });
  m.def("kept_kernel_bytes", [](const Tensors& cores) { return kept_kernels().n_bytes(cores); });
  m.def("know_way_runner", [](py::object run) { kept_ways().know_runner(std::move(run)); });
  m.def("keep_short_way", [](const Tensor& core, std::string told, py::object way) {
    kept_ways().keep<ShortWay>(core, std::move(told), std::move(way));
  });
  m.def("keep_rows_way", [](const Tensor& core, std::string told, py::object way) {
    kept_ways().keep<RowsWay>(core, std::move(told), std::move(way));
  });
  m.def("forget_kept_ways", [](int64_t address) { kept_ways().forget(address); });
  m.def("filter", &filters::run);
  m.def("know_core_lists", &know_core_lists);
  m.def("set_idle", [](bool value) { is_idle = value; });
  m.def("make_sweep", &make_sweep);
  m.def("dense_sweep", &dense_sweep);
  m.def("run", &run);
  m.def("multiply_groups", &run_groups<multiply_groups>);
  m.def("multiply_groups_backward", &run_groups<multiply_groups_backward>);
  chain::bind(m);
  data_walk::bind(m);
  define_lookups(m);
  recurrent::bind(m);
  higher::bind(m);
  m.def("count_optimizer_step", [] { ++n_optimizer_steps; });
}
