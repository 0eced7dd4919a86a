// A call of a convolution from Python: whether what an earlier input of its shape left ready still holds.
#pragma once

#include "layer_call.h"

#include <ATen/ops/convolution.h>

namespace tensortrain {

// By the shape of the input, how one convolution runs at inference.
class ConvWay {
 public:
  const py::list options;

  explicit ConvWay(py::list given) : options(std::move(given)), n_threads_(at::get_num_threads()) {}

  // The dense kernel with torch's own convolution.
  void keep_dense(const Tensor& x, const Tensors& cores, Tensor weight, Sizes stride, Sizes padding, Sizes dilation,
                  int64_t groups) {
    keep(x, cores, {entry_of(x), py::object(), std::move(weight), std::move(stride), std::move(padding),
                    std::move(dilation), groups});
  }

  // A function of Python of the input and the bias.
  void keep_call(const Tensor& x, const Tensors& cores, py::object call) {
    keep(x, cores, {entry_of(x), std::move(call), Tensor(), {}, {}, {}, 1});
  }

  // The output, or null where the long way must be taken.
  py::object run(PyObject* layer, PyObject* input) {
    if (is_idle || !is_tensor(input) || c10::GradMode::is_enabled()) return py::object();
    const auto& x = THPVariable_Unpack(input);
    if (x.is_nested() || !is_plain(x) || !is_undisturbed()) return py::object();
    if (at::globalContext().deterministicAlgorithms() || at::get_num_threads() != n_threads_) return py::object();
    const auto state = dictionary_of(layer);
    if (!state || !has_options(layer, *this)) return py::object();
    const auto cores = cores_of(state.ptr());
    const auto bias = bias_of(state.ptr());
    if (!cores || !bias || !is_current(*cores)) return py::object();
    if (*bias && (!is_plain(**bias) || (*bias)->scalar_type() != x.scalar_type())) return py::object();
    for (const auto& kept : kept_)
      if (kept.key.is_of(x)) return called(kept, x, input, *bias, state.ptr());
    return py::object();
  }

 private:
  struct Key {
    Sizes sizes;
    bool is_contiguous;
    at::ScalarType dtype;
    bool is_of(const Tensor& x) const {
      return x.sizes() == sizes && x.is_contiguous() == is_contiguous && x.scalar_type() == dtype;
    }
  };
  struct Ready {
    Key key;
    py::object call;
    Tensor weight;
    Sizes stride, padding, dilation;
    int64_t groups;
  };
  static constexpr size_t most = 16;  // shapes

  static Key entry_of(const Tensor& x) { return {x.sizes().vec(), x.is_contiguous(), x.scalar_type()}; }

  void keep(const Tensor& x, const Tensors& cores, Ready ready) {
    std::vector<Ready> gone;
    if (!is_current(cores) || kept_.size() >= most || n_threads_ != at::get_num_threads()) {
      std::swap(gone, kept_);
      stamps_.clear();
      for (const auto& core : cores) stamps_.emplace_back(core);
      n_steps_ = n_optimizer_steps;
      n_threads_ = at::get_num_threads();
    }
    const auto same = std::find_if(kept_.begin(), kept_.end(), [&](const Ready& one) { return one.key.is_of(x); });
    if (same == kept_.end())
      kept_.push_back(std::move(ready));
    else
      std::swap(*same, ready);
  }

  bool is_current(const Tensors& cores) const {
    if (stamps_.size() != cores.size() || n_steps_ != n_optimizer_steps) return false;
    for (size_t k = 0; k < cores.size(); ++k)
      if (cores[k].is_inference() || !stamps_[k].is_of(cores[k])) return false;
    return true;
  }

  static py::object called(const Ready& ready, const Tensor& x, PyObject* input, const Bias& bias, PyObject* state) {
    static const Name seen("_seen_spatial");
    const auto n_axes = static_cast<size_t>(x.dim() - 2);
    py::tuple spatial(n_axes);
    for (size_t k = 0; k < n_axes; ++k) spatial[k] = py::int_(x.size(static_cast<int64_t>(k) + 2));
    if (PyDict_SetItem(state, seen.object(), spatial.ptr()) < 0) throw py::error_already_set();
    if (ready.call) {
      const auto call = ready.call;  // may be forgotten meanwhile
      const auto added = bias ? py::reinterpret_steal<py::object>(THPVariable_Wrap(*bias)) : py::none();
      return call(py::reinterpret_borrow<py::object>(input), added);
    }
    const auto weight = ready.weight;
    const auto stride = ready.stride, padding = ready.padding, dilation = ready.dilation;
    const auto groups = ready.groups;
    Tensor y;
    {
      const py::gil_scoped_release unlocked;
      y = at::convolution(x, weight, bias, stride, padding, dilation, false, Sizes(n_axes, 0), groups);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
  }

  int n_threads_;
  std::vector<Ready> kept_;
  std::vector<Stamp> stamps_;
  int64_t n_steps_ = 0;
};

// way(layer, input): the output, or None where the long way must be taken.
inline PyObject* call_convolution(PyObject* self, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  if (PyTuple_GET_SIZE(arguments) != 2) throw py::type_error("a short way takes a layer and its input");
  auto& way = *static_cast<ConvWay*>(reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0]);
  auto found = way.run(PyTuple_GET_ITEM(arguments, 0), PyTuple_GET_ITEM(arguments, 1));
  if (!found) Py_RETURN_NONE;
  return found.release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace tensortrain
