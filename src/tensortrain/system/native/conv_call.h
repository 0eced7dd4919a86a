// A call of a convolution from Python: whether what an earlier input of its shape left ready still holds.
#pragma once

#include "contract.h"
#include "layer_call.h"

#include <ATen/ops/convolution.h>

namespace tensortrain {

// What torch's convolution is told besides the kernel.
struct ConvNumbers {
  Sizes stride, padding, dilation;
  int64_t groups = 1;

  Tensor convolve(const Tensor& x, const Tensor& weight, const Bias& bias) const {
    return at::convolution(x, weight, bias, stride, padding, dilation, false, Sizes(stride.size(), 0), groups);
  }
};

// By the shape of the input, how one convolution runs: at inference by weights that lie ready, in training by weights
// that are contracted from the cores in every call.
class ConvWay {
 public:
  const py::list options;

  explicit ConvWay(py::list given) : options(std::move(given)), n_threads_(at::get_num_threads()) {}

  // The dense kernel with torch's own convolution.
  void keep_dense(const Tensor& x, const Tensors& cores, Tensor weight, Sizes stride, Sizes padding, Sizes dilation,
                  int64_t groups) {
    keep(x, cores, {entry_of(x), py::object(), std::move(weight),
                    {std::move(stride), std::move(padding), std::move(dilation), groups}});
  }

  // A function of Python of the input and the bias.
  void keep_call(const Tensor& x, const Tensors& cores, py::object call) {
    keep(x, cores, {entry_of(x), std::move(call), Tensor(), {}});
  }

  // In training: the dense kernel that the recipe makes.
  void train_dense(const Tensor& x, c10::intrusive_ptr<Contraction> recipe, Sizes stride, Sizes padding, Sizes dilation,
                   int64_t groups) {
    train(x, {entry_of(x), std::move(recipe), py::object(),
              {std::move(stride), std::move(padding), std::move(dilation), groups}});
  }

  // In training: a function of Python of the input, the bias and the weights that the recipe makes.
  void train_call(const Tensor& x, c10::intrusive_ptr<Contraction> recipe, py::object call) {
    train(x, {entry_of(x), std::move(recipe), std::move(call), {}});
  }

  // Weights that lie ready leave memory; how training runs stays.
  void forget_weights() {
    std::vector<Ready> gone;
    std::swap(gone, kept_);
    stamps_.clear();
  }

  // The output, or null where the long way must be taken.
  py::object run(PyObject* layer, PyObject* input) {
    if (is_idle || !is_tensor(input)) return py::object();
    const auto& x = THPVariable_Unpack(input);
    if (x.is_nested() || !is_plain(x) || !is_undisturbed()) return py::object();
    if (at::globalContext().deterministicAlgorithms() || at::get_num_threads() != n_threads_) return py::object();
    const auto state = dictionary_of(layer);
    if (!state || !has_options(layer, *this)) return py::object();
    const auto cores = cores_of(state.ptr());
    const auto bias = bias_of(state.ptr());
    if (!cores || !bias) return py::object();
    if (*bias && (!is_plain(**bias) || (*bias)->scalar_type() != x.scalar_type())) return py::object();
    if (c10::GradMode::is_enabled()) return trained(x, input, *cores, *bias, state.ptr());
    if (!is_current(*cores)) return py::object();
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
    ConvNumbers numbers;
  };
  struct Trained {
    Key key;
    c10::intrusive_ptr<Contraction> recipe;
    py::object call;
    ConvNumbers numbers;
  };
  static constexpr size_t most = 16;  // shapes

  void train(const Tensor& x, Trained one) {
    std::vector<Trained> gone;
    if (trained_.size() >= most || n_threads_ != at::get_num_threads()) std::swap(gone, trained_);
    n_threads_ = at::get_num_threads();
    const auto same = std::find_if(trained_.begin(), trained_.end(), [&](const Trained& old) { return old.key.is_of(x); });
    if (same == trained_.end())
      trained_.push_back(std::move(one));
    else
      std::swap(*same, one);
  }

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

  // For whom asks a layer how it runs.
  static void note_positions(const Tensor& x, PyObject* state) {
    static const Name seen("_seen_spatial");
    const auto n_axes = static_cast<size_t>(x.dim() - 2);
    py::tuple spatial(n_axes);
    for (size_t k = 0; k < n_axes; ++k) spatial[k] = py::int_(x.size(static_cast<int64_t>(k) + 2));
    if (PyDict_SetItem(state, seen.object(), spatial.ptr()) < 0) throw py::error_already_set();
  }

  // While weights of an earlier inference lie ready, the long way is taken, which lets them go.
  py::object trained(const Tensor& x, PyObject* input, const Tensors& cores, const Bias& bias, PyObject* state) {
    if (!kept_.empty() || !any_requires_grad(cores)) return py::object();
    const auto found = std::find_if(trained_.begin(), trained_.end(), [&](const Trained& one) { return one.key.is_of(x); });
    if (found == trained_.end() || cores[0].scalar_type() != x.scalar_type() || !found->recipe->fits(cores))
      return py::object();
    note_positions(x, state);
    const auto one = *found;  // may be forgotten meanwhile
    Tensor y;
    Tensors weights;
    {
      const py::gil_scoped_release unlocked;
      weights = contract(one.recipe, cores);
      if (!one.call) y = one.numbers.convolve(x, weights[0], bias);
    }
    if (!one.call) return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
    return one.call(py::reinterpret_borrow<py::object>(input), wrapped(bias), py::cast(weights));
  }

  static py::object wrapped(const Bias& bias) {
    return bias ? py::reinterpret_steal<py::object>(THPVariable_Wrap(*bias)) : py::none();
  }

  static py::object called(const Ready& ready, const Tensor& x, PyObject* input, const Bias& bias, PyObject* state) {
    note_positions(x, state);
    if (ready.call) {
      const auto call = ready.call;  // may be forgotten meanwhile
      return call(py::reinterpret_borrow<py::object>(input), wrapped(bias));
    }
    const auto weight = ready.weight;
    const auto numbers = ready.numbers;
    Tensor y;
    {
      const py::gil_scoped_release unlocked;
      y = numbers.convolve(x, weight, bias);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(y)));
  }

  int n_threads_;
  std::vector<Ready> kept_;
  std::vector<Trained> trained_;
  std::vector<Stamp> stamps_;
  int64_t n_steps_ = 0;
};

// Equal recipes are one, and it stays for good: what waits for its way back holds its address.
inline c10::intrusive_ptr<Contraction> make_contraction(const Sizes& sizes, const std::vector<Sizes>& tensors,
                                                        const std::vector<std::pair<int64_t, int64_t>>& steps,
                                                        const Sizes& wanted, const std::vector<Sizes>& shapes) {
  using Key = std::tuple<Sizes, std::vector<Sizes>, std::vector<std::pair<int64_t, int64_t>>, Sizes, std::vector<Sizes>>;
  static auto& known = *new std::map<Key, c10::intrusive_ptr<Contraction>>();  // never destroyed
  auto& recipe = known[Key(sizes, tensors, steps, wanted, shapes)];
  if (!recipe) recipe = c10::make_intrusive<Contraction>(sizes, tensors, steps, wanted, shapes);
  return recipe;
}

// The weights of a recipe; none where the cores are not what the loops take.
inline std::optional<Tensors> contract_cores(const c10::intrusive_ptr<Contraction>& recipe, const Tensors& cores) {
  if (!is_undisturbed() || !recipe->fits(cores)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return contract(recipe, cores);
}

// A whole training step's way there, as ConvWay takes it.
inline std::optional<Tensor> convolve_contracted(const c10::intrusive_ptr<Contraction>& recipe, const Tensors& cores,
                                                 const Tensor& x, const Bias& bias, const Sizes& stride,
                                                 const Sizes& padding, const Sizes& dilation, int64_t groups) {
  if (!is_undisturbed() || !recipe->fits(cores)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return ConvNumbers{stride, padding, dilation, groups}.convolve(x, contract(recipe, cores)[0], bias);
}

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
