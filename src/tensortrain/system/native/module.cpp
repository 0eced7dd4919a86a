// What Python sees of the kernels.
#include "grouped.h"
#include "lookup_python.h"
#include "short_way.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <map>
#include <string>
#include <tuple>

namespace py = pybind11;

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

// Instances of subclasses, which may see operations without a dispatch key that shows it, are none.
bool is_tensor(PyObject* object) { return THPVariable_CheckExact(object); }

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

// The tensors of a ParameterList in order; nothing where it holds something else. Pruning and weight norm leave other
// names there than 0, 1, .., or these in another order.
std::optional<Tensors> cores_of(const py::dict& dictionary) {
  Tensors found;
  found.reserve(dictionary.size());
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(dictionary.ptr(), &at, &key, &value);) {
    const auto name = std::to_string(found.size());
    if (!PyUnicode_Check(key) || PyUnicode_CompareWithASCIIString(key, name.c_str()) != 0) return std::nullopt;
    if (!is_tensor(value)) return std::nullopt;
    found.push_back(THPVariable_Unpack(value));
  }
  return found;
}

// The bias of a layer: none where it has none, no answer where it is kept elsewhere than among its parameters.
std::optional<std::optional<Tensor>> bias_of(const py::dict& parameters) {
  static PyObject* const name = PyUnicode_InternFromString("bias");
  PyObject* const found = PyDict_GetItemWithError(parameters.ptr(), name);
  if (found == nullptr) return std::nullopt;
  if (found == Py_None) return std::optional<Tensor>();
  if (!is_tensor(found)) return std::nullopt;
  return std::optional<Tensor>(THPVariable_Unpack(found));
}

std::optional<Tensor> run_short(ShortWay& way, const py::object& input, const py::dict& cores,
                                const py::dict& parameters) {
  if (!is_tensor(input.ptr())) return std::nullopt;
  const auto x = THPVariable_Unpack(input.ptr());
  auto tensors = cores_of(cores);
  const auto bias = bias_of(parameters);
  if (!tensors || !bias) return std::nullopt;
  const auto found = way.find(x, std::move(*tensors));
  if (!found || !fits(*found->first, x, found->second, *bias)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return multiply(found->first, x, found->second, *bias);
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
  py::class_<ShortWay>(m, "ShortWay")
      .def(py::init<>())
      .def("keep_training", &ShortWay::keep_training)
      .def("keep_inference", &ShortWay::keep_inference)
      .def("forget_weights", &ShortWay::forget_weights)
      .def("note_cached", &ShortWay::note_cached)
      .def("__call__", &run_short)
      // Part of no copy and no checkpoint: None takes its place.
      .def("__reduce__", [](const py::object&) { return py::make_tuple(py::type::of(py::none()), py::tuple()); });
  m.def("make_sweep", &make_sweep);
  m.def("dense_sweep", &dense_sweep);
  m.def("run", &run);
  m.def("multiply_groups", &run_groups<multiply_groups>);
  m.def("multiply_groups_backward", &run_groups<multiply_groups_backward>);
  define_lookups(m);
  m.def("count_optimizer_step", [] { ++n_optimizer_steps; });
}
