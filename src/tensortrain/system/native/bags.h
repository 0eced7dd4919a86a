// Sums and means of rows over bags of ids, with their gradients: rows are never put where their ids stand.
#pragma once

#include "rows.h"

#include <ATen/ops/zeros.h>

namespace tensortrain {

struct BagOptions {
  bool has_end;  // the end of the last bag is among the starts
  bool is_mean;
  int64_t padding_idx;  // ids that take no part; -1 where there are none
};

// The ids that count, bag by bag, and what of each row counts in its bag.
template <typename T>
struct Bags final : torch::CustomClassHolder {
  std::vector<int64_t> places, bags, starts{0};  // places among all ids, their bags, where each bag begins
  std::vector<T> shares;
  std::vector<int64_t> ids, leaves;  // leaves of the tree
  std::optional<Asked<T>> asked;
  Tensor rows;  // the distinct ones

  Bags(const Tensor& all_ids, const Tensor& offsets, const Tensor& weights, const BagOptions& options) {
    const auto* const given = all_ids.const_data_ptr<int64_t>();
    const auto* const starts_given = offsets.const_data_ptr<int64_t>();
    const auto n_starts = offsets.numel();
    const T* const its = weights.defined() ? weights.const_data_ptr<T>() : nullptr;
    for (int64_t bag = 0; bag < n_starts - options.has_end; ++bag) {
      const auto end = bag + 1 < n_starts ? starts_given[bag + 1] : all_ids.numel();
      for (auto place = starts_given[bag]; place < end; ++place) {
        if (given[place] == options.padding_idx) continue;
        places.push_back(place), bags.push_back(bag), ids.push_back(given[place]);
        shares.push_back(its == nullptr ? T(1) : its[place]);
      }
      if (options.is_mean)
        for (auto k = starts.back(); k < n(); ++k) shares[k] /= static_cast<T>(n() - starts.back());
      starts.push_back(n());
    }
  }

  int64_t n() const { return static_cast<int64_t>(ids.size()); }
  int64_t n_bags() const { return static_cast<int64_t>(starts.size()) - 1; }
  int64_t dim() const { return asked->way.stops.back().state(); }

  // Whether the ids are few enough to be taken at once.
  bool ask(const Tensors& cores, int64_t max_bytes) {
    if (n() == 0) return false;
    asked.emplace(ids.data(), n(), cores, max_bytes);
    return asked->whole.has_value();
  }

  Tensor sums(const Tensors& tensors) {
    const auto& tree = *asked->whole;
    const auto& last = tree.levels.back();
    asked->states = at::empty({LevelStates<T>::size(tree, asked->way)}, tensors[0].options());
    rows = at::empty({last.n(), dim()}, tensors[0].options());
    T* const first = rows.template mutable_data_ptr<T>();
    auto at = places_of(first, last.n(), dim());
    rows_of_tree(tree, asked->way, grids_of<T>(tensors), asked->states.template mutable_data_ptr<T>(), at.data());
    leaves.resize(n());
    for (int64_t k = 0; k < last.n(); ++k)
      for (auto place = last.first_child[k]; place < last.first_child[k + 1]; ++place) leaves[tree.places[place]] = k;
    std::vector<const T*> its_rows(n()), its_shares(n());
    for (int64_t k = 0; k < n(); ++k) its_rows[k] = first + leaves[k] * dim(), its_shares[k] = &shares[k];
    const Tensor out = at::empty({n_bags(), dim()}, tensors[0].options());
    T* const made = out.template mutable_data_ptr<T>();
    on_threads(n_bags(), 16, is_large_work(n() * dim() * products_of_a_number), [&](int64_t bag, int64_t end) {
      for (; bag < end; ++bag)
        sum_rows(starts[bag + 1] - starts[bag], dim(), its_shares.data() + starts[bag], its_rows.data() + starts[bag],
                 made + bag * dim());
    });
    return out;
  }

  Tensors gradients(const Tensors& cores, const Tensor& grad, const std::vector<bool>& needed) const {
    const T* const first = grad.const_data_ptr<T>();
    return gradients_of_rows<T>(*asked, cores, needed, [&](Room& room, const Tree& tree) {
      return summed_rows<T>(room, tree, dim(), [&](int64_t k) { return first + bags[k] * dim(); },
                            [&](int64_t k) { return &shares[k]; });
    });
  }

  Tensor gradient_of_weights(const Tensor& weights, const Tensor& grad) const {
    const Tensor found = at::zeros(weights.sizes(), grad.options());
    T* const out = found.template mutable_data_ptr<T>();
    const T *const first = rows.template const_data_ptr<T>(), *const given = grad.const_data_ptr<T>();
    const auto dot = row_dotter<T>();
    on_threads(n(), 64, is_large_work(n() * dim() * products_of_a_number), [&](int64_t k, int64_t end) {
      for (; k < end; ++k) out[places[k]] = dot(first + leaves[k] * dim(), given + bags[k] * dim(), dim());
    });
    return found;
  }

  // The same sums by operations of torch.
  Tensor recorded(const Tensors& cores, const Tensor& weights) const {
    const auto all_rows = recorded_rows(as_tensor(ids, cores[0]), cores);
    const auto its = weights.defined() ? weights.index_select(0, as_tensor(places, cores[0])) : as_tensor(shares, cores[0]);
    const auto out = at::zeros({n_bags(), all_rows.size(1)}, cores[0].options());
    return out.index_add(0, as_tensor(bags, cores[0]), all_rows * its.unsqueeze(1));
  }

 private:
  template <typename Number>
  static Tensor as_tensor(const std::vector<Number>& numbers, const Tensor& like) {
    const auto dtype = std::is_same_v<Number, int64_t> ? at::kLong : like.scalar_type();
    const Tensor found = at::empty({static_cast<int64_t>(numbers.size())}, like.options().dtype(dtype));
    std::memcpy(found.mutable_data_ptr(), numbers.data(), numbers.size() * sizeof(Number));
    return found;
  }
};

template <typename T>
struct BagsFunction : torch::autograd::Function<BagsFunction<T>> {
  using Context = torch::autograd::AutogradContext;
  using Asking = c10::intrusive_ptr<Bags<T>>;
  static constexpr size_t n_before = 2;  // of the arguments, before the cores

  // Weights are given where they have a gradient; the bags have their numbers.
  static Tensor forward(Context* ctx, const std::optional<Tensor>& weights, Asking bags, at::TensorList cores) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensors saved = cores.vec();
    if (weights) saved.push_back(*weights);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["has_weights"] = weights.has_value();
    auto out = bags->sums(cores.vec());
    ctx->saved_data["bags"] = c10::IValue::make_capsule(std::move(bags));
    return out;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    auto cores = ctx->get_saved_variables();
    Tensor weights;
    if (ctx->saved_data["has_weights"].toBool()) weights = cores.back(), cores.pop_back();
    Tensors found(n_before + cores.size());
    if (!grads[0].defined()) return found;
    const auto kept = ctx->saved_data["bags"].toCapsule();
    const auto& bags = static_cast<const Bags<T>&>(*kept);
    const auto& grad = grads[0];
    std::vector<bool> needed;
    for (size_t k = 0; k < cores.size() + weights.defined(); ++k) needed.push_back(ctx->needs_input_grad(k));
    if (weights.defined()) std::rotate(needed.begin(), needed.begin() + 1, needed.end());  // as they were saved
    if (c10::GradMode::is_enabled() || !are_looked_up(cores) || !is_looked_up(grad, cores[0].scalar_type())) {
      recorded(bags, cores, weights, grad, needed, found);
      return found;
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto whole = grad.contiguous();
    auto made = bags.gradients(cores, whole, needed);
    std::move(made.begin(), made.end(), found.begin() + n_before);
    if (weights.defined() && needed.back()) found[0] = bags.gradient_of_weights(weights, whole);
    return found;
  }

 private:
  static void recorded(const Bags<T>& bags, const Tensors& cores, const Tensor& weights, const Tensor& grad,
                       const std::vector<bool>& needed, Tensors& found) {
    const bool again = c10::GradMode::is_enabled();
    Tensors inputs = cores, wanted;
    if (weights.defined()) inputs.push_back(weights);
    const c10::AutoGradMode on(true);
    for (size_t k = 0; k < inputs.size(); ++k) {
      // An alias: the history of one may hold another one.
      inputs[k] = again ? inputs[k].view_as(inputs[k]) : inputs[k].detach().requires_grad_(true);
      if (needed[k]) wanted.push_back(inputs[k]);
    }
    const Tensors its_cores(inputs.begin(), inputs.begin() + cores.size());
    const auto sums = bags.recorded(its_cores, weights.defined() ? inputs.back() : Tensor());
    const auto made = torch::autograd::grad({sums}, wanted, {grad}, std::nullopt, again, true);
    for (size_t k = 0, taken = 0; k < inputs.size(); ++k)
      if (needed[k]) found[k == cores.size() ? 0 : n_before + k] = made[taken++];
  }
};

template <typename T>
std::optional<Tensor> bags_of(const Tensor& ids, const Tensor& offsets, const Tensor& weights, const BagOptions& options,
                              const Tensors& cores, int64_t max_bytes) {
  auto bags = c10::make_intrusive<Bags<T>>(ids, offsets, weights, options);
  if (!bags->ask(cores, max_bytes)) return std::nullopt;
  const bool has_weights = weights.defined() && weights.requires_grad();
  return BagsFunction<T>::apply(has_weights ? std::optional<Tensor>(weights) : std::nullopt, std::move(bags),
                                at::TensorList(cores));
}

// Sums or means of rows of known ids; none where the loops do not serve them.
inline std::optional<Tensor> bags_of_cores(const Tensor& ids, const Tensor& offsets, const std::optional<Tensor>& weights,
                                           const std::tuple<bool, bool, int64_t>& options, const Tensors& cores,
                                           int64_t max_bytes) {
  if (!are_ids(ids) || !are_ids(offsets) || !are_looked_up(cores)) return std::nullopt;
  const auto dtype = cores[0].scalar_type();
  const auto its = weights.value_or(Tensor());
  if (its.defined() && (!is_looked_up(its, dtype) || !its.is_contiguous())) return std::nullopt;
  const auto [has_end, is_mean, padding_idx] = options;
  const auto run = dtype == at::kFloat ? &bags_of<float> : &bags_of<double>;
  return run(ids, offsets, its, {has_end, is_mean, padding_idx}, cores, max_bytes);
}

}  // namespace tensortrain
