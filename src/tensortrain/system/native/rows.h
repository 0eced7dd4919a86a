// Rows of cores with their gradients, and the short way of an embedding to them: one call from Python.
#pragma once

#include "layer_call.h"
#include "lookup_cores.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

namespace tensortrain {

inline bool is_looked_up(const Tensor& tensor, at::ScalarType dtype) {
  return is_plain(tensor) && tensor.scalar_type() == dtype;
}

inline bool are_looked_up(const Tensors& tensors) {
  if (tensors.size() < 2 || !is_undisturbed()) return false;
  const auto dtype = tensors[0].scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble) return false;
  return std::all_of(tensors.begin(), tensors.end(), [&](const Tensor& one) { return is_looked_up(one, dtype); });
}

inline bool are_ids(const Tensor& ids) { return is_looked_up(ids, at::kLong) && ids.is_contiguous(); }

inline std::pair<int64_t, int64_t> extent_of(const Tensor& ids) {
  const auto* const at = ids.const_data_ptr<int64_t>();
  int64_t low = at[0], high = at[0];
  for (int64_t k = 1, n = ids.numel(); k < n; ++k) {
    low = std::min(low, at[k]);
    high = std::max(high, at[k]);
  }
  return {low, high};
}

using Kept = c10::intrusive_ptr<torch::CustomClassHolder>;

inline bool is_low_rank(const Tensors& cores) { return cores.size() == 2 && cores[0].dim() == 2; }

// (*ids, dim) from cores (r, i, j, s), or from the two matrices of a table of low rank, and what the way back needs.
inline std::pair<Tensor, Kept> plain_rows(const Tensor& ids, const Tensors& cores, int64_t max_bytes) {
  auto sizes = ids.sizes().vec();
  sizes.push_back(1);
  for (const auto& core : cores) sizes.back() *= core.dim() == 4 ? core.size(1) : 1;
  if (is_low_rank(cores)) sizes.back() = cores[1].size(0);
  const auto out = at::empty(sizes, cores[0].options());
  if (out.scalar_type() == at::kFloat) return {out, Kept(rows_of_cores<float>(ids, cores, max_bytes, out))};
  return {out, Kept(rows_of_cores<double>(ids, cores, max_bytes, out))};
}

template <typename T>
Tensors plain_gradients(const Kept& kept, const Tensors& cores, const Tensor& grad, const std::vector<bool>& needed) {
  return gradients_of_cores(static_cast<const Asked<T>&>(*kept), cores, grad, needed);
}

// The same by operations of torch, slice by slice.
inline Tensor recorded_rows(const Tensor& ids, const Tensors& cores) {
  if (is_low_rank(cores)) return at::linear(at::embedding(cores[0], ids), cores[1]);
  Tensors digits(cores.size());
  auto rest = ids.reshape({-1});
  for (auto k = cores.size(); k-- > 0;) {
    digits[k] = rest.remainder(cores[k].size(2));
    rest = rest.div(cores[k].size(2), "floor");
  }
  auto state = at::ones({ids.numel(), 1, 1}, cores[0].options());
  for (size_t k = 0; k < cores.size(); ++k) {
    const auto r = cores[k].size(0), i = cores[k].size(1), s = cores[k].size(3);
    const auto picked = cores[k].permute({2, 0, 1, 3}).index_select(0, digits[k]).reshape({-1, r, i * s});
    state = at::bmm(state, picked);
    state = state.reshape({state.size(0), state.size(1) * i, s});
  }
  auto sizes = ids.sizes().vec();
  sizes.push_back(-1);
  return state.reshape(sizes);
}

struct RowsFunction : torch::autograd::Function<RowsFunction> {
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* ctx, const Tensor& ids, int64_t max_bytes, at::TensorList cores) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensors saved{ids};
    saved.insert(saved.end(), cores.begin(), cores.end());
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    auto [rows, kept] = plain_rows(ids, cores.vec(), max_bytes);
    ctx->saved_data["kept"] = c10::IValue::make_capsule(std::move(kept));
    return rows;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    auto saved = ctx->get_saved_variables();
    const auto ids = saved[0];
    const Tensors cores(saved.begin() + 1, saved.end());
    Tensors found(2 + cores.size());
    if (!grads[0].defined()) return found;
    const auto& grad = grads[0];
    if (c10::GradMode::is_enabled() || !are_looked_up(cores) || !are_ids(ids) ||
        !is_looked_up(grad, cores[0].scalar_type())) {
      recorded(ctx, ids, cores, grad, found);
      return found;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto run = grad.scalar_type() == at::kFloat ? &plain_gradients<float> : &plain_gradients<double>;
    std::vector<bool> needed;
    for (size_t k = 0; k < cores.size(); ++k) needed.push_back(ctx->needs_input_grad(1 + k));
    auto made = run(ctx->saved_data["kept"].toCapsule(), cores, grad.contiguous(), needed);
    std::move(made.begin(), made.end(), found.begin() + 2);
    return found;
  }

 private:
  // Gradients that have gradients, and those of many at once.
  static void recorded(Context* ctx, const Tensor& ids, const Tensors& cores, const Tensor& grad, Tensors& found) {
    const bool again = c10::GradMode::is_enabled();
    Tensors inputs, wanted;
    const c10::AutoGradMode on(true);
    for (size_t k = 0; k < cores.size(); ++k) {
      // An alias: the history of one core may hold another one.
      inputs.push_back(again ? cores[k].view_as(cores[k]) : cores[k].detach().requires_grad_(true));
      if (ctx->needs_input_grad(1 + k)) wanted.push_back(inputs.back());
    }
    const auto made = torch::autograd::grad({recorded_rows(ids, inputs)}, wanted, {grad}, std::nullopt, again);
    for (size_t k = 0, taken = 0; k < cores.size(); ++k)
      if (ctx->needs_input_grad(1 + k)) found[2 + k] = made[taken++];
  }
};

// Rows of cores as they are, differentiable where gradients are recorded; none where the loops do not serve them.
inline std::optional<Tensor> rows_of(const Tensor& ids, const Tensors& cores, int64_t max_bytes) {
  if (!are_ids(ids) || !are_looked_up(cores)) return std::nullopt;
  if (c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() && any_requires_grad(cores))
    return RowsFunction::apply(ids, max_bytes, at::TensorList(cores));
  const at::AutoDispatchBelowADInplaceOrView below;
  return plain_rows(ids, cores, max_bytes).first;
}

// What stands beside the rows that cores make: those of hot ids, and that of padding, of zeros where it has none.
struct Beside {
  Tensor hot_ids, hot_rows, padding_row;
  int64_t padding_id = -1;

  static constexpr int64_t of_cores = -1, of_padding = -2;

  bool is_empty() const { return !hot_rows.defined() && padding_id < 0; }

  bool fits(at::ScalarType dtype) const {
    if (padding_row.defined() && !is_row(padding_row, 1, dtype)) return false;
    if (!hot_rows.defined()) return true;
    return is_row(hot_rows, 2, dtype) && hot_ids.defined() && are_ids(hot_ids) && hot_ids.dim() == 1 &&
           hot_ids.size(0) == hot_rows.size(0) && !(c10::GradMode::is_enabled() && hot_rows.requires_grad());
  }

  // For each id the number of its hot row, or where else its row comes from.
  Sizes places_of(const Tensor& ids) const {
    Sizes places(ids.numel(), of_cores);
    const auto* const at = ids.const_data_ptr<int64_t>();
    const auto* const first = hot_rows.defined() ? hot_ids.const_data_ptr<int64_t>() : nullptr;
    const auto* const last = first ? first + hot_ids.numel() : nullptr;
    for (size_t k = 0; k < places.size(); ++k) {
      if (at[k] == padding_id) {
        places[k] = of_padding;
      } else if (first) {
        const auto* const found = std::lower_bound(first, last, at[k]);
        if (found != last && *found == at[k]) places[k] = found - first;
      }
    }
    return places;
  }

  // All rows in their places, those of the cores among them.
  Tensor put_together(const Sizes& places, const Tensor& cold, Sizes sizes) const {
    const auto dim = cold.size(-1);
    sizes.push_back(dim);
    const auto out = at::empty(sizes, cold.options());
    const auto n_bytes = static_cast<size_t>(dim) * cold.element_size();
    auto* to = static_cast<char*>(out.mutable_data_ptr());
    const auto* next = static_cast<const char*>(cold.const_data_ptr());
    for (const auto place : places) {
      if (place == of_cores) {
        std::memcpy(to, next, n_bytes);
        next += n_bytes;
      } else if (place >= 0) {
        std::memcpy(to, static_cast<const char*>(hot_rows.const_data_ptr()) + place * n_bytes, n_bytes);
      } else if (padding_row.defined()) {
        std::memcpy(to, padding_row.const_data_ptr(), n_bytes);
      } else {
        std::memset(to, 0, n_bytes);
      }
      to += n_bytes;
    }
    return out;
  }

  bool has_width(int64_t dim) const {
    return (!hot_rows.defined() || hot_rows.size(1) == dim) && (!padding_row.defined() || padding_row.size(0) == dim);
  }

 private:
  static bool is_row(const Tensor& rows, int64_t n_axes, at::ScalarType dtype) {
    return is_looked_up(rows, dtype) && rows.dim() == n_axes && rows.is_contiguous();
  }
};

// How an embedding was looked up last: from a table that lies ready, dense or in slices, or from its cores.
class RowsWay {
 public:
  // Settings of the layer that it holds for.
  const py::list options;

  explicit RowsWay(py::list given) : options(std::move(given)) {}

  void keep_training(int64_t n_rows, int64_t max_bytes) { n_rows_ = n_rows, max_bytes_ = max_bytes, trains_ = true; }
  // Of a table of low rank: one product with all rows.
  void keep_product(int64_t n_rows) { n_rows_ = n_rows, by_product_ = true; }
  // One table, dense; or several of slices, and the sizes of the cores that they are.
  void keep_tables(Tensors tables, std::vector<Sizes> shapes, int64_t n_rows, int64_t max_bytes, const Tensors& cores) {
    Kept now{std::move(tables), std::move(shapes), {}, n_optimizer_steps};
    for (const auto& core : cores) now.stamps.emplace_back(core);
    n_rows_ = n_rows, max_bytes_ = max_bytes;
    std::swap(kept_, now);
  }
  void forget_weights() {
    Kept gone;
    std::swap(gone, kept_);
  }
  void note_cached() {}

  std::optional<Tensor> find(const Tensor& ids, const Tensors& cores) const {
    if (!is_undisturbed() || !is_plain(ids) || ids.numel() == 0) return std::nullopt;
    const bool records = c10::GradMode::is_enabled() && any_requires_grad(cores);
    const bool is_ready = !records && !kept_.tables.empty() && is_current(cores);
    if (records) return trains_ && is_within(ids) ? rows_of(ids, cores, max_bytes_) : std::nullopt;
    if (!is_ready && by_product_) return of_two(ids, cores);
    if (!is_ready) return std::nullopt;
    if (kept_.tables.size() > 1) return is_within(ids) ? of_slices(ids) : std::nullopt;
    try {
      return at::embedding(kept_.tables[0], ids);
    } catch (const c10::Error&) {  // the long way says what is wrong
      return std::nullopt;
    }
  }

  // With rows that stand beside those of the cores, where no gradients are recorded.
  std::optional<Tensor> find_beside(const Tensor& ids, const Tensors& cores, const Beside& beside) const {
    if (!is_undisturbed() || cores.empty() || ids.numel() == 0 || !is_within(ids)) return std::nullopt;
    if (c10::GradMode::is_enabled() && any_requires_grad(cores)) return std::nullopt;
    const auto dtype = cores[0].scalar_type();
    if ((dtype != at::kFloat && dtype != at::kDouble) || !beside.fits(dtype)) return std::nullopt;
    const auto places = beside.places_of(ids);
    const auto n_cold = std::count(places.begin(), places.end(), Beside::of_cores);
    if (n_cold == ids.numel()) return find(ids, cores);
    Tensor cold;
    if (n_cold == 0) {
      if (!beside.hot_rows.defined()) return std::nullopt;  // nothing here knows how wide a row is
      cold = beside.hot_rows.narrow(0, 0, 0);
    } else {
      const auto cold_ids = at::empty({n_cold}, ids.options());
      auto* to = cold_ids.mutable_data_ptr<int64_t>();
      const auto* const from = ids.const_data_ptr<int64_t>();
      for (size_t k = 0; k < places.size(); ++k)
        if (places[k] == Beside::of_cores) *to++ = from[k];
      const auto found = find(cold_ids, cores);
      if (!found || found->scalar_type() != dtype) return std::nullopt;
      cold = found->contiguous();
    }
    if (!beside.has_width(cold.size(-1))) return std::nullopt;
    const at::AutoDispatchBelowADInplaceOrView below;
    return beside.put_together(places, cold, ids.sizes().vec());
  }

 private:
  struct Kept {
    Tensors tables;
    std::vector<Sizes> shapes;
    std::vector<Stamp> stamps;
    int64_t n_steps = 0;
  };

  bool is_within(const Tensor& ids) const {
    if (!are_ids(ids)) return false;
    const auto extent = extent_of(ids);
    return extent.first >= 0 && extent.second < n_rows_;
  }

  std::optional<Tensor> of_two(const Tensor& ids, const Tensors& cores) const {
    if (!is_low_rank(cores) || !are_looked_up(cores) || !is_within(ids)) return std::nullopt;
    return at::linear(at::embedding(cores[0], ids), cores[1]);
  }

  std::optional<Tensor> of_slices(const Tensor& ids) const {
    if (!are_looked_up(kept_.tables)) return std::nullopt;
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto run = kept_.tables[0].scalar_type() == at::kFloat ? &looked_up<float> : &looked_up<double>;
    const auto rows = run(ids, kept_.tables, kept_.shapes, max_bytes_);
    auto sizes = ids.sizes().vec();
    sizes.push_back(rows.size(1));
    return rows.view(sizes);
  }

  bool is_current(const Tensors& cores) const {
    if (kept_.stamps.size() != cores.size() || kept_.n_steps != n_optimizer_steps) return false;
    for (size_t k = 0; k < cores.size(); ++k)
      if (cores[k].is_inference() || !kept_.stamps[k].is_of(cores[k])) return false;
    return true;
  }

  Kept kept_;
  int64_t n_rows_ = 0, max_bytes_ = 0;
  bool trains_ = false, by_product_ = false;
};

// What a user may set on an embedding at any time is as it was, and nothing but copying of rows is asked for.
inline bool is_as_kept(PyObject* layer, PyObject* state, const RowsWay& way) {
  static const Name settings[] = {Name("implementation"), Name("dense_limit_bytes")};
  static const Name max_norm("max_norm"), scales("scale_grad_by_freq"), stand_ins("stand_ins");
  for (size_t k = 0; k < 2; ++k) {
    const auto now = settings[k].of(layer);
    const auto then = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(way.options.ptr(), k));
    if (!now) return false;
    if (now.is(then)) continue;
    const int equal = PyObject_RichCompareBool(now.ptr(), then.ptr(), Py_EQ);
    if (equal < 0) PyErr_Clear();
    if (equal != 1) return false;
  }
  const auto found = stand_ins.of(layer);
  return found && found.is_none() && max_norm.in(state) == Py_None && scales.in(state) == Py_False;
}

// Nothing where it is kept in another way than a layer of ours does.
inline std::optional<Beside> beside_of(PyObject* state) {
  static const Name parameters("_parameters"), buffers("_buffers"), padding_idx("padding_idx");
  static const Name hot_weight("hot_weight"), hot_ids("hot_ids"), padding_row("padding_row");
  Beside beside;
  const auto read = [](PyObject* found, Tensor& into) {
    if (found && found != Py_None && is_tensor(found)) into = THPVariable_Unpack(found);
    return found && (found == Py_None || is_tensor(found));
  };
  if (!read(hot_weight.in(parameters.in(state)), beside.hot_rows)) return std::nullopt;
  if (beside.hot_rows.defined() && !read(hot_ids.in(buffers.in(state)), beside.hot_ids)) return std::nullopt;
  PyObject* const padding = padding_idx.in(state);
  if (!padding || (padding != Py_None && !PyLong_CheckExact(padding))) return std::nullopt;
  if (padding == Py_None) return beside;
  beside.padding_id = PyLong_AsLongLong(padding);
  if (PyErr_Occurred()) PyErr_Clear();
  if (beside.padding_id < 0 || !read(padding_row.in(buffers.in(state)), beside.padding_row)) return std::nullopt;
  return beside;
}

inline std::optional<Tensor> run_rows(const RowsWay& way, PyObject* layer, PyObject* input) {
  if (is_idle || !is_tensor(input)) return std::nullopt;
  const auto& ids = THPVariable_Unpack(input);
  const auto state = dictionary_of(layer);
  if (!state || ids.is_nested() || !is_as_kept(layer, state.ptr(), way)) return std::nullopt;
  const auto cores = cores_of(state.ptr());
  const auto beside = beside_of(state.ptr());
  if (!cores || !beside) return std::nullopt;
  const py::gil_scoped_release unlocked;
  return beside->is_empty() ? way.find(ids, *cores) : way.find_beside(ids, *cores, *beside);
}

// way(layer, ids): the rows, or None where the long way must be taken.
inline PyObject* call_rows(PyObject* self, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  if (PyTuple_GET_SIZE(arguments) != 2) throw py::type_error("a short way takes a layer and its input");
  const auto& way = *static_cast<RowsWay*>(reinterpret_cast<py::detail::instance*>(self)->simple_value_holder[0]);
  auto found = run_rows(way, PyTuple_GET_ITEM(arguments, 0), PyTuple_GET_ITEM(arguments, 1));
  if (!found) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(*found));
  END_HANDLE_TH_ERRORS
}

}  // namespace tensortrain
