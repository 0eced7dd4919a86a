// A call of a recurrent layer or cell from Python: read off its modules, and run as an earlier call of its sizes did.
#pragma once

#include "layer_call.h"
#include "recurrent_torch.h"

#include <ATen/ops/gru.h>
#include <ATen/ops/lstm.h>
#include <ATen/ops/rnn_relu.h>
#include <ATen/ops/rnn_tanh.h>

namespace tensortrain::recurrent {

// (kind, size, n_steps, batch, whether time comes first, whether it runs backwards)
inline Course course_of(const Sizes& numbers) {
  const bool time_first = numbers[4] != 0;
  return {static_cast<Kind>(numbers[0]), numbers[1], numbers[2], numbers[3], numbers[5] != 0,
          time_first ? 1 : numbers[2],   {},         {},         time_first ? numbers[3] : 1};
}

inline Tensors together(const Tensor& x, const Tensors& states, const Bias& input_bias, const Bias& hidden_bias,
                        at::TensorList input, at::TensorList hidden) {
  Tensors all{x};
  all.insert(all.end(), states.begin(), states.end());
  if (input_bias) all.push_back(*input_bias);
  if (hidden_bias) all.push_back(*hidden_bias);
  all.insert(all.end(), input.begin(), input.end());
  all.insert(all.end(), hidden.begin(), hidden.end());
  return all;
}

// How one map of a layer ran at some sizes.
struct KeptMap {
  Map map;
  Tensors weights;       // made of the cores; none: the tensors of the module itself
  py::object cache;      // where they are kept too; another one, once they were made anew or dropped
  std::vector<Stamp> stamps;
};

// One map as its module holds it now.
struct FoundMap {
  Tensors tensors;
  Bias bias;
  py::object cache;  // of derived weights; none of torch's own layer
};

// What a module's dictionary must hold for a way to be valid.
class Guard {
 public:
  explicit Guard(const py::dict& wanted) {
    for (const auto& [name, value] : wanted)
      wanted_.emplace_back(Name(name.cast<std::string>().c_str()), py::reinterpret_borrow<py::object>(value));
  }
  bool holds(PyObject* state) const {
    for (const auto& [name, value] : wanted_) {
      PyObject* const now = name.in(state);
      if (!now) return false;
      if (now == value.ptr()) continue;
      const int equal = PyObject_RichCompareBool(now, value.ptr(), Py_EQ);
      if (equal < 0) PyErr_Clear();
      if (equal != 1) return false;
    }
    return true;
  }

 private:
  std::vector<std::pair<Name, py::object>> wanted_;
};

// How one layer or cell ran at the sizes that it has met.
class RecurrentWay {
 public:
  // types: torch's linear layer and ours. names: of the cells in a layer, direction by direction; none: it is a cell.
  // Guards: what the module and each cell must have in their dictionaries.
  RecurrentWay(const py::tuple& types, const py::list& names, const py::dict& guard, const py::dict& cell_guard)
      : dense_(reinterpret_cast<PyTypeObject*>(types[0].ptr())),
        factorized_(reinterpret_cast<PyTypeObject*>(types[1].ptr())),
        types_(types),
        guard_(guard),
        cell_guard_(cell_guard) {
    for (const auto& name : names) names_.emplace_back(name.cast<std::string>().c_str());
  }

  // numbers: kind, size, whether the batch comes first, directions, whether torch's kernel ran. maps: for each (sweep, ready sweep, whether stored
  // tensors are turned, weights, cores, cache, options), in order of cells, input map first; without
  // gradients, the sweeps are None where torch's kernel ran on the weights.
  void keep(const Tensor& x, bool trains, const Sizes& numbers, const py::list& maps) {
    auto entry = std::make_shared<Entry>();
    entry->sizes = x.sizes().vec(), entry->dtype = x.scalar_type(), entry->trains = trains;
    entry->kind = static_cast<Kind>(numbers[0]), entry->size = numbers[1];
    entry->batch_first = numbers[2] != 0, entry->n_directions = numbers[3];
    entry->by_torch = numbers[4] != 0;
    entry->n_steps_made = n_optimizer_steps;
    for (const auto& given : maps) {
      const auto parts = given.cast<py::tuple>();
      KeptMap kept;
      if (!parts[0].is_none())
        kept.map = {parts[0].cast<c10::intrusive_ptr<Sweep>>(), parts[1].cast<c10::intrusive_ptr<Sweep>>(),
                    parts[2].cast<bool>()};
      kept.weights = parts[3].cast<Tensors>();
      for (const auto& core : parts[4].cast<Tensors>()) kept.stamps.emplace_back(core);
      kept.cache = py::reinterpret_borrow<py::object>(parts[5]);
      entry->maps.push_back(std::move(kept));
      entry->options.emplace_back(Options{py::reinterpret_borrow<py::list>(parts[6])});
    }
    std::vector<std::shared_ptr<const Entry>> gone;  // ends last: tensors that end may let another thread come here
    const auto same = [&](const auto& one) { return one->is_of(x, trains); };
    if (trains || entries_.size() >= most) std::swap(gone, entries_);
    for (const auto& one : gone)
      if (trains && one->trains && gone.size() < most && !same(one)) entries_.push_back(one);
    const auto found = std::find_if(entries_.begin(), entries_.end(), same);
    if (found != entries_.end()) {
      gone.push_back(*found);
      *found = std::move(entry);
    } else {
      entries_.push_back(std::move(entry));
    }
  }

  void forget() {
    std::vector<std::shared_ptr<const Entry>> gone;
    std::swap(gone, entries_);
  }

  // What the module returns, or null where the long way must be taken.
  py::object run(PyObject* module, PyObject* input, PyObject* state) {
    if (is_idle || entries_.empty() || !is_tensor(input)) return py::object();
    const auto& x = THPVariable_Unpack(input);
    if (x.is_nested() || !is_plain(x) || !is_undisturbed()) return py::object();
    if (at::globalContext().deterministicAlgorithms()) return py::object();
    const auto dictionary = dictionary_of(module);
    if (!dictionary || !guard_.holds(dictionary.ptr())) return py::object();
    auto maps = maps_of(dictionary.ptr());
    if (!maps) return py::object();
    const bool trains = records_any(*maps);
    for (const auto& entry : entries_)
      if (entry->is_of(x, trains)) return called(entry, x, state, *maps);
    return py::object();
  }

 private:
  struct Options {
    py::list options;
  };
  struct Entry {
    Sizes sizes;
    at::ScalarType dtype;
    bool trains, by_torch = false, batch_first;
    Kind kind;
    int64_t size, n_directions, n_steps_made;
    std::vector<KeptMap> maps;
    std::vector<Options> options;

    bool is_of(const Tensor& x, bool wants) const {
      return trains == wants && x.sizes() == sizes && x.scalar_type() == dtype;
    }
    size_t n_states() const { return kind == Kind::lstm ? 2 : 1; }
  };
  using Found = std::vector<std::pair<PyObject*, FoundMap>>;
  static constexpr size_t most = 64;  // sizes

  static bool records_any(const Found& maps) {
    if (!c10::GradMode::is_enabled() || c10::InferenceMode::is_enabled()) return false;
    for (const auto& [module, map] : maps)
      if (any_requires_grad(map.tensors) || (map.bias && map.bias->requires_grad())) return true;
    return false;
  }

  std::optional<Found> maps_of(PyObject* state) const {
    static const Name modules("_modules"), input("ih"), hidden("hh");
    Found found;
    PyObject* const children = modules.in(state);
    for (size_t k = 0; k < std::max<size_t>(names_.size(), 1); ++k) {
      py::object held;
      if (!names_.empty()) {
        PyObject* const cell = names_[k].in(children);
        held = cell ? dictionary_of(cell) : py::object();
        if (!held || !cell_guard_.holds(held.ptr())) return std::nullopt;
      }
      PyObject* const own = names_.empty() ? children : modules.in(held.ptr());
      for (const auto* name : {&input, &hidden}) {
        PyObject* const map = name->in(own);
        auto one = map ? map_of(map) : std::nullopt;
        if (!one) return std::nullopt;
        found.emplace_back(map, std::move(*one));
      }
    }
    return found;
  }

  std::optional<FoundMap> map_of(PyObject* map) const {
    static const Name parameters("_parameters"), weight("weight"), runner("runner"), cache("cache"), values("_values");
    if (Py_TYPE(map) != dense_ && Py_TYPE(map) != factorized_) return std::nullopt;
    const auto state = dictionary_of(map);
    if (!state || !is_unwatched(state.ptr())) return std::nullopt;
    FoundMap found;
    if (Py_TYPE(map) == dense_) {
      PyObject* const own = weight.in(parameters.in(state.ptr()));
      if (!own || !is_tensor(own)) return std::nullopt;
      found.tensors.push_back(THPVariable_Unpack(own));
    } else {
      auto cores = cores_of(state.ptr());
      PyObject* const running = runner.in(state.ptr());
      const auto of_runner = running ? dictionary_of(running) : py::object();
      PyObject* const keeping = of_runner ? cache.in(of_runner.ptr()) : nullptr;
      const auto of_cache = keeping ? dictionary_of(keeping) : py::object();
      PyObject* const kept = of_cache ? values.in(of_cache.ptr()) : nullptr;
      if (!cores || !kept) return std::nullopt;
      found.tensors = std::move(*cores);
      found.cache = py::reinterpret_borrow<py::object>(kept);
    }
    const auto bias = bias_of(state.ptr());
    if (!bias) return std::nullopt;
    found.bias = *bias;
    return found;
  }

  // Whether a map is as it was when it ran.
  static bool is_current(const Entry& entry, size_t k, PyObject* module, const FoundMap& now) {
    const auto& then = entry.maps[k];
    if (!now.cache) return then.stamps.empty() && then.cache.is_none();
    if (then.cache.is_none() && !entry.trains) return false;
    if (!has_options(module, entry.options[k])) return false;
    if (entry.trains) return true;
    if (!then.cache.is(now.cache) || then.stamps.size() != now.tensors.size()) return false;
    if (entry.n_steps_made != n_optimizer_steps) return false;
    for (size_t j = 0; j < now.tensors.size(); ++j)
      if (now.tensors[j].is_inference() || !then.stamps[j].is_of(now.tensors[j])) return false;
    return true;
  }

  // The states before the first step; nothing where they do not fit.
  static std::optional<Tensors> states_of(const Entry& entry, const Tensor& x, PyObject* given) {
    auto sizes = x.sizes().vec();
    sizes.back() = entry.size;
    if (x.dim() == 3)
      sizes = {static_cast<int64_t>(entry.maps.size() / 2), x.size(entry.batch_first ? 0 : 1), entry.size};
    const auto n = entry.n_states();
    if (given == Py_None) {
      const auto zeros = at::zeros(sizes, x.options());
      return Tensors(n, zeros);
    }
    std::vector<PyObject*> parts{given};
    if (n > 1) {
      const bool is_pair = (PyTuple_CheckExact(given) || PyList_CheckExact(given)) && PySequence_Fast_GET_SIZE(given) == 2;
      if (!is_pair) return std::nullopt;
      parts = {PySequence_Fast_GET_ITEM(given, 0), PySequence_Fast_GET_ITEM(given, 1)};
    }
    Tensors found;
    for (auto* const part : parts) {
      if (!is_tensor(part)) return std::nullopt;
      const auto& one = THPVariable_Unpack(part);
      if (one.is_nested() || one.sizes() != sizes || one.scalar_type() != x.scalar_type() || !is_plain(one))
        return std::nullopt;
      found.push_back(one);
    }
    return found;
  }

  static py::object called(const std::shared_ptr<const Entry>& entry, const Tensor& x, PyObject* given, const Found& maps) {
    if (maps.size() != entry->maps.size()) return py::object();
    for (size_t k = 0; k < maps.size(); ++k)
      if (!is_current(*entry, k, maps[k].first, maps[k].second)) return py::object();
    const auto states = states_of(*entry, x, given);
    if (!states) return py::object();
    std::optional<Tensors> found;
    {
      const py::gil_scoped_release unlocked;
      found = entry->by_torch && !entry->trains ? by_torch(*entry, x, *states, maps) : by_cells(*entry, x, *states, maps);
    }
    return found ? wrapped(*entry, std::move(*found), x.dim() == 3) : py::object();
  }

  static at::TensorList tensors_of(const KeptMap& kept, const FoundMap& now) {
    return kept.weights.empty() ? at::TensorList(now.tensors) : at::TensorList(kept.weights);
  }

  // Outputs, then the last states.
  static std::optional<Tensors> by_torch(const Entry& entry, const Tensor& x, const Tensors& states, const Found& maps) {
    Tensors weights;
    const bool has_bias = maps[0].second.bias.has_value();
    for (size_t k = 0; k < maps.size(); k += 2) {
      for (size_t j = k; j < k + 2; ++j) {
        weights.push_back(tensors_of(entry.maps[j], maps[j].second)[0]);
        if (maps[j].second.bias.has_value() != has_bias || !is_plain(weights.back())) return std::nullopt;
        if (weights.back().scalar_type() != x.scalar_type()) return std::nullopt;
      }
      if (has_bias) weights.insert(weights.end(), {*maps[k].second.bias, *maps[k + 1].second.bias});
    }
    if (records({x}) || records(states) || records(weights)) return std::nullopt;
    const auto n_layers = static_cast<int64_t>(maps.size() / 2) / entry.n_directions;
    const bool both = entry.n_directions == 2, first = entry.batch_first;
    if (entry.kind == Kind::lstm) {
      auto [y, h, c] = at::lstm(x, states, weights, has_bias, n_layers, 0.0, false, both, first);
      return Tensors{y, h, c};
    }
    const auto run = entry.kind == Kind::gru    ? &at::_ops::gru_input::call
                     : entry.kind == Kind::tanh ? &at::_ops::rnn_tanh_input::call
                                                : &at::_ops::rnn_relu_input::call;
    auto [y, h] = run(x, states[0], weights, has_bias, n_layers, 0.0, false, both, first);
    return Tensors{y, h};
  }

  static std::optional<Tensors> by_cells(const Entry& entry, const Tensor& x, const Tensors& states, const Found& maps) {
    const bool is_layer = x.dim() == 3;
    const auto n_cells = maps.size() / 2, n_directions = static_cast<size_t>(entry.n_directions), n = entry.n_states();
    const int64_t n_steps = is_layer ? x.size(entry.batch_first ? 1 : 0) : 1;
    const auto batch = is_layer ? x.size(entry.batch_first ? 0 : 1) : x.dim() == 1 ? 1 : x.size(0);
    const bool is_row = x.dim() == 1;  // one example without an axis for it
    // Saved in the same shapes as on the long way: checkpoints compare them.
    const bool is_whole = n_cells == 1 && !is_row && (!is_layer || !c10::GradMode::is_enabled());
    std::vector<Tensors> last(n);
    auto rows = is_row ? x.unsqueeze(0) : x;
    for (size_t cell = 0; cell < n_cells;) {
      Tensors outputs;
      for (size_t direction = 0; direction < n_directions; ++direction, ++cell) {
        Tensors here;
        for (const auto& state : states)
          here.push_back(is_whole ? state : is_row ? state.unsqueeze(0) : state.select(0, static_cast<int64_t>(cell)));
        const Job job{course_of({static_cast<int64_t>(entry.kind), entry.size, n_steps, batch, !entry.batch_first,
                                 direction == 1}),
                      entry.maps[2 * cell].map, entry.maps[2 * cell + 1].map, maps[2 * cell].second.bias.has_value(),
                      maps[2 * cell + 1].second.bias.has_value(), is_layer, entry.by_torch};
        const auto &ih = maps[2 * cell].second, &hh = maps[2 * cell + 1].second;
        auto all = together(rows, here, ih.bias, hh.bias, tensors_of(entry.maps[2 * cell], ih),
                            tensors_of(entry.maps[2 * cell + 1], hh));
        if (all.size() != job.n_tensors() || !fits(job, all)) return std::nullopt;
        const auto found = call(job, std::move(all));
        if (!found) return std::nullopt;
        for (size_t k = 0; k < n; ++k) last[k].push_back((*found)[k]);
        if (is_layer) outputs.push_back((*found)[n].view({rows.size(0), rows.size(1), entry.size}));
      }
      if (is_layer) rows = n_directions == 1 ? outputs[0] : at::cat(outputs, -1);
    }
    Tensors found;
    if (is_layer) found.push_back(rows);
    for (const auto& parts : last) found.push_back(is_whole ? parts[0] : is_row ? parts[0].squeeze(0) : at::stack(parts));
    return found;
  }

  static py::object wrapped(const Entry& entry, Tensors found, bool is_layer) {
    const auto one = [&](size_t k) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(found[k]))); };
    const size_t at = is_layer;
    const py::object states = entry.n_states() == 1 ? one(at) : py::make_tuple(one(at), one(at + 1));
    return is_layer ? py::make_tuple(one(0), states) : states;
  }

  PyTypeObject *dense_, *factorized_;
  py::tuple types_;  // holds them
  std::vector<Name> names_;
  Guard guard_, cell_guard_;
  std::vector<std::shared_ptr<const Entry>> entries_;
};

// way(module, input, state): what the module returns, or None where the long way must be taken.
inline PyObject* call_recurrent(PyObject* self, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  if (PyTuple_GET_SIZE(arguments) != 3) throw py::type_error("a short way takes a module, its input and its state");
  auto& way = *static_cast<RecurrentWay*>(reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0]);
  auto found = way.run(PyTuple_GET_ITEM(arguments, 0), PyTuple_GET_ITEM(arguments, 1), PyTuple_GET_ITEM(arguments, 2));
  if (!found) Py_RETURN_NONE;
  return found.release().ptr();
  END_HANDLE_TH_ERRORS
}

}  // namespace tensortrain::recurrent
