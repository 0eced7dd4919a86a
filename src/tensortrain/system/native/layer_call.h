// A call of a layer from Python, read off the module without a line of Python in between.
#pragma once

#include "short_way.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

namespace tensortrain {

namespace py = pybind11;

inline bool is_idle = false;  // switched off: all runs in Python

// Instances of subclasses, which may see operations without a dispatch key that shows it, are none.
inline bool is_tensor(PyObject* object) { return THPVariable_CheckExact(object); }

// A name that many dictionaries have as a key.
class Name {
 public:
  explicit Name(const char* text) : object_(PyUnicode_InternFromString(text)) {}
  PyObject* object() const { return object_; }
  // Borrowed; null where it is missing or this is no dictionary.
  PyObject* in(PyObject* dictionary) const {
    return dictionary && PyDict_Check(dictionary) ? PyDict_GetItemWithError(dictionary, object_) : nullptr;
  }
  // Past a module's __getattr__; null where it is missing.
  py::object of(PyObject* object) const {
    auto found = py::reinterpret_steal<py::object>(PyObject_GenericGetAttr(object, object_));
    if (!found) PyErr_Clear();
    return found;
  }

 private:
  PyObject* object_;
};

// The two classes of lists of plain cores; they live for as long as the process.
inline PyTypeObject* core_lists[2] = {nullptr, nullptr};

inline void know_core_lists(const py::type& one, const py::type& other) {
  core_lists[0] = reinterpret_cast<PyTypeObject*>(one.inc_ref().ptr());
  core_lists[1] = reinterpret_cast<PyTypeObject*>(other.inc_ref().ptr());
}

inline py::object dictionary_of(PyObject* object) {
  auto found = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(object, nullptr));
  if (!found) PyErr_Clear();
  return found;
}

// Whether nothing waits for the list of cores to be called.
inline bool is_unwatched(PyObject* state) {
  static const Name hooks[] = {Name("_forward_pre_hooks"), Name("_forward_hooks"), Name("_backward_hooks"),
                               Name("_backward_pre_hooks")};
  static const Name forward("forward");
  for (const auto& name : hooks) {
    PyObject* const found = name.in(state);
    if (!found || !PyDict_Check(found) || PyDict_Size(found) != 0) return false;
  }
  return forward.in(state) == nullptr;
}

// The tensors of a list of cores in order; nothing where it is no plain list. Pruning and weight norm leave other names
// there than 0, 1, .., or these in another order.
inline std::optional<Tensors> cores_of(PyObject* layer_state) {
  static const Name modules("_modules"), cores("cores"), parameters("_parameters");
  PyObject* const list = cores.in(modules.in(layer_state));
  if (!list || (Py_TYPE(list) != core_lists[0] && Py_TYPE(list) != core_lists[1])) return std::nullopt;
  const auto state = dictionary_of(list);
  PyObject* const stored = parameters.in(state.ptr());
  if (!stored || !PyDict_Check(stored) || !is_unwatched(state.ptr())) return std::nullopt;
  Tensors found;
  found.reserve(static_cast<size_t>(PyDict_Size(stored)));
  PyObject *key = nullptr, *value = nullptr;
  for (Py_ssize_t at = 0; PyDict_Next(stored, &at, &key, &value);) {
    const auto name = std::to_string(found.size());
    if (!PyUnicode_Check(key) || PyUnicode_CompareWithASCIIString(key, name.c_str()) != 0) return std::nullopt;
    if (!is_tensor(value)) return std::nullopt;
    found.push_back(THPVariable_Unpack(value));
  }
  return found;
}

// The bias of a layer: none where it has none, no answer where it is kept elsewhere than among its parameters.
inline std::optional<Bias> bias_of(PyObject* layer_state) {
  static const Name parameters("_parameters"), bias("bias");
  PyObject* const found = bias.in(parameters.in(layer_state));
  if (found == nullptr) return std::nullopt;
  if (found == Py_None) return Bias();
  if (!is_tensor(found)) return std::nullopt;
  return Bias(THPVariable_Unpack(found));
}

// What a user may set on a layer at any time is as it was when the way was found.
template <typename AnyWay>
bool has_options(PyObject* layer, const AnyWay& way) {
  static const Name names[] = {Name("implementation"), Name("dense_limit_bytes"), Name("may_time_plans")};
  static const Name stand_ins("stand_ins");
  for (size_t k = 0; k < 3; ++k) {
    const auto now = names[k].of(layer), then = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(way.options.ptr(), k));
    if (!now) return false;
    if (now.is(then)) continue;
    const int equal = PyObject_RichCompareBool(now.ptr(), then.ptr(), Py_EQ);
    if (equal < 0) PyErr_Clear();
    if (equal != 1) return false;
  }
  const auto found = stand_ins.of(layer);
  return found && found.is_none();
}

inline std::optional<Tensor> run_layer(ShortWay& way, PyObject* layer, PyObject* input) {
  if (is_idle || !is_tensor(input)) return std::nullopt;
  const auto& x = THPVariable_Unpack(input);
  if (x.is_nested()) return std::nullopt;  // has no sizes to look at
  const auto state = dictionary_of(layer);
  if (!state || !has_options(layer, way)) return std::nullopt;
  auto tensors = cores_of(state.ptr());
  const auto bias = bias_of(state.ptr());
  if (!tensors || !bias) return std::nullopt;
  const auto found = way.find(x, std::move(*tensors));
  if (!found || !fits(*found->first, x, found->second, *bias)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return multiply(found->first, x, found->second, *bias);
}

// way(layer, input): the output, or None where the long way must be taken.
inline PyObject* call_layer(PyObject* self, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  if (PyTuple_GET_SIZE(arguments) != 2) throw py::type_error("a short way takes a layer and its input");
  auto& way = *static_cast<ShortWay*>(reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0]);
  auto found = run_layer(way, PyTuple_GET_ITEM(arguments, 0), PyTuple_GET_ITEM(arguments, 1));
  if (!found) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*found));
  END_HANDLE_TH_ERRORS
}

}  // namespace tensortrain
