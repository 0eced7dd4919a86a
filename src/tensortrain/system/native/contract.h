// Weights that cores make, contracted in one call: several at once, with gradients.
#pragma once

#include "contraction.h"
#include "short_way.h"

#include <ATen/ops/einsum_native.h>

#include <map>
#include <string>

namespace tensortrain {

// Numbers of legs of every tensor, inputs first and then the results of the steps; sizes of the legs; operands of every
// step; and which results are wanted, in which shapes.
class Contraction : public c10::intrusive_ptr_target {
 public:
  Contraction(const Sizes& sizes, const std::vector<Sizes>& tensors, const std::vector<std::pair<int64_t, int64_t>>& steps,
              Sizes wanted, std::vector<Sizes> shapes)
      : n_inputs(tensors.size() - steps.size()), wanted(std::move(wanted)), shapes(std::move(shapes)) {
    for (const auto& legs : tensors) {
      Sizes own;
      std::string word;
      for (const auto leg : legs) own.push_back(sizes[leg]), word += letter(leg);
      numels.push_back(std::accumulate(own.begin(), own.end(), int64_t{1}, std::multiplies<>()));
      legs_.push_back(std::move(own)), words_.push_back(std::move(word));
    }
    for (size_t k = 0; k < steps.size(); ++k) {
      const auto [a, b] = steps[k];
      const auto c = static_cast<int64_t>(n_inputs + k);
      steps_.emplace_back(a, b, c, legs_of(sizes, tensors, {a, b, c}));
    }
    for (size_t k = n_inputs; k < tensors.size(); ++k) {
      const bool is_kept = std::find(this->wanted.begin(), this->wanted.end(), k) == this->wanted.end();
      at_.push_back(is_kept ? kept_size : -1);
      kept_size += is_kept ? numels[k] : 0;
    }
  }

  const size_t n_inputs;
  const Sizes wanted;
  const std::vector<Sizes> shapes;
  Sizes numels;
  int64_t kept_size = 0;

  bool fits(at::TensorList cores) const {
    if (cores.size() != n_inputs) return false;
    const auto dtype = cores[0].scalar_type();
    if (dtype != at::kFloat && dtype != at::kDouble) return false;
    for (size_t k = 0; k < n_inputs; ++k)
      if (!is_plain(cores[k]) || cores[k].scalar_type() != dtype || cores[k].numel() != numels[k]) return false;
    return true;
  }

  template <typename T>
  void forward(const std::vector<const T*>& inputs, T* kept, const std::vector<T*>& out) const {
    const auto values = values_of<T>(inputs, kept, out);
    for (const auto& step : steps_)
      step.run<T>(values[step.a], step.b < 0 ? nullptr : values[step.b], values[step.c]);
  }

  // Gradients of the inputs from those of what was wanted; null where there is none, or nobody wants it.
  template <typename T>
  void backward(const std::vector<const T*>& inputs, const T* kept, const std::vector<const T*>& grads,
                const std::vector<T*>& out) const {
    Room room;
    const auto values = values_of<T>(inputs, const_cast<T*>(kept), {});  // only read
    std::vector<const T*> given(numels.size(), nullptr);
    std::vector<T*> found(out);
    found.resize(numels.size(), nullptr);
    std::vector<char> is_wanted;
    for (auto* place : out) is_wanted.push_back(place != nullptr);
    for (const auto& step : steps_) is_wanted.push_back(is_wanted[step.a] || (step.b >= 0 && is_wanted[step.b]));
    for (size_t k = 0; k < wanted.size(); ++k) given[wanted[k]] = grads[k];
    const auto into = [&](int64_t k) -> T* {
      if (k < 0 || !is_wanted[k]) return nullptr;
      if (found[k] == nullptr) found[k] = room.take<T>(numels[k]);
      given[k] = found[k];
      return found[k];
    };
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
      const T* const grad = given[step->c];
      if (grad == nullptr || !is_wanted[step->c]) continue;
      step->back<T>(values[step->a], step->b < 0 ? nullptr : values[step->b], grad, into(step->a), into(step->b));
    }
  }

  // The same by torch's operations, which see to all that is more than numbers: graphs of graphs, many at once.
  Tensors gradients(at::TensorList cores, const Tensors& grads, const std::vector<bool>& needed) const {
    Tensors values, given(numels.size());
    for (size_t k = 0; k < n_inputs; ++k) values.push_back(cores[k].reshape(legs_[k]));
    for (const auto& step : steps_) values.push_back(made(step, values));
    std::vector<char> is_wanted(needed.begin(), needed.end());
    for (const auto& step : steps_) is_wanted.push_back(is_wanted[step.a] || (step.b >= 0 && is_wanted[step.b]));
    for (size_t k = 0; k < wanted.size(); ++k)
      if (grads[k].defined()) given[wanted[k]] = grads[k].reshape(legs_[wanted[k]]);
    for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
      const auto& grad = given[step->c];
      if (!grad.defined()) continue;
      if (step->b < 0) {
        given[step->a] = einsum(words_[step->c] + "->" + words_[step->a], {grad});
        continue;
      }
      const auto &a = words_[step->a], &b = words_[step->b], &c = words_[step->c];
      if (is_wanted[step->a]) given[step->a] = einsum(c + "," + b + "->" + a, {grad, values[step->b]});
      if (is_wanted[step->b]) given[step->b] = einsum(a + "," + c + "->" + b, {values[step->a], grad});
    }
    Tensors found;
    for (size_t k = 0; k < n_inputs; ++k)
      found.push_back(needed[k] && given[k].defined() ? given[k].reshape(cores[k].sizes()) : Tensor());
    return found;
  }

 private:
  // As products and sorting at once: a transform of torch.func has rules for these alone.
  static Tensor einsum(const std::string& equation, const Tensors& operands) {
    return at::native::einsum(equation, operands, std::nullopt);
  }

  static char letter(int64_t leg) { return static_cast<char>(leg < 26 ? 'a' + leg : 'A' + (leg - 26)); }

  static contraction::Legs legs_of(const Sizes& sizes, const std::vector<Sizes>& tensors, std::array<int64_t, 3> which) {
    std::map<int64_t, contraction::Leg> legs;
    for (int p = 0; p < 3; ++p) {
      if (which[p] < 0) continue;
      int64_t step = 1;
      const auto& own = tensors[which[p]];
      for (auto leg = own.rbegin(); leg != own.rend(); step *= sizes[*leg], ++leg) {
        auto& entry = legs.try_emplace(*leg, contraction::Leg{sizes[*leg], {0, 0, 0}}).first->second;
        entry.at[p] = step;
      }
    }
    contraction::Legs found;
    for (const auto& one : legs) found.push_back(one.second);
    return found;
  }

  Tensor made(const contraction::Step& step, const Tensors& values) const {
    if (step.b < 0) return einsum(words_[step.a] + "->" + words_[step.c], {values[step.a]});
    return einsum(words_[step.a] + "," + words_[step.b] + "->" + words_[step.c], {values[step.a], values[step.b]});
  }

  // Where every tensor lies; inputs are only read.
  template <typename T>
  std::vector<T*> values_of(const std::vector<const T*>& inputs, T* kept, const std::vector<T*>& out) const {
    std::vector<T*> values;
    for (const auto* one : inputs) values.push_back(const_cast<T*>(one));
    for (const auto at : at_) values.push_back(at < 0 ? nullptr : kept + at);
    for (size_t k = 0; k < out.size(); ++k) values[wanted[k]] = out[k];
    return values;
  }

  std::vector<Sizes> legs_;
  std::vector<std::string> words_;
  std::vector<contraction::Step> steps_;
  Sizes at_;
};

// -- with tensors -----------------------------------------------------------------------------------

template <typename T>
std::vector<const T*> read_from(const Tensors& tensors) {
  std::vector<const T*> found;
  for (const auto& one : tensors) found.push_back(one.defined() ? one.const_data_ptr<T>() : nullptr);
  return found;
}

template <typename T>
std::vector<T*> written_to(Tensors& tensors) {
  std::vector<T*> found;
  for (auto& one : tensors) found.push_back(one.defined() ? one.mutable_data_ptr<T>() : nullptr);
  return found;
}

// What is wanted, and last what lies between.
inline Tensors contracted(const Contraction& recipe, at::TensorList cores) {
  const auto given = contiguous_all(cores);
  Tensors found;
  for (const auto& shape : recipe.shapes) found.push_back(at::empty(shape, given[0].options()));
  auto kept = at::empty({recipe.kept_size}, given[0].options());
  if (given[0].scalar_type() == at::kFloat)
    recipe.forward<float>(read_from<float>(given), kept.mutable_data_ptr<float>(), written_to<float>(found));
  else
    recipe.forward<double>(read_from<double>(given), kept.mutable_data_ptr<double>(), written_to<double>(found));
  found.push_back(std::move(kept));
  return found;
}

struct ContractionFunction : torch::autograd::Function<ContractionFunction> {
  using Context = torch::autograd::AutogradContext;

  static Tensors forward(Context* ctx, const c10::intrusive_ptr<Contraction>& recipe, at::TensorList cores) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto found = contracted(*recipe, cores);
    Tensors saved(cores.begin(), cores.end());
    saved.push_back(found.back());
    found.pop_back();
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["recipe"] = reinterpret_cast<int64_t>(recipe.get());  // recipes stay for as long as the process
    return found;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    const auto& recipe = *reinterpret_cast<const Contraction*>(ctx->saved_data["recipe"].toInt());
    const auto saved = ctx->get_saved_variables();
    const at::TensorList cores(saved.data(), recipe.n_inputs);
    std::vector<bool> needed;
    for (size_t k = 0; k < recipe.n_inputs; ++k) needed.push_back(ctx->needs_input_grad(k));
    auto found = is_read(saved, grads) ? by_memory(recipe, saved, grads, needed) : recipe.gradients(cores, grads, needed);
    found.insert(found.begin(), Tensor());  // the recipe itself
    return found;
  }

 private:
  // Whether nothing but the numbers of first gradients is wanted.
  static bool is_read(const Tensors& saved, const Tensors& grads) {
    if (c10::GradMode::is_enabled() || !is_unheard(c10::impl::tls_local_dispatch_key_set())) return false;
    const auto dtype = saved.back().scalar_type();
    const auto is_number = [dtype](const Tensor& one) {
      return !one.defined() || (is_plain(one) && one.scalar_type() == dtype);
    };
    return std::all_of(saved.begin(), saved.end(), is_number) && std::all_of(grads.begin(), grads.end(), is_number);
  }

  static Tensors by_memory(const Contraction& recipe, const Tensors& saved, const Tensors& grads,
                           const std::vector<bool>& needed) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto cores = contiguous_all(at::TensorList(saved.data(), recipe.n_inputs));
    Tensors arriving, found;
    for (const auto& grad : grads) arriving.push_back(grad.defined() ? grad.contiguous() : grad);
    const bool is_any = std::any_of(grads.begin(), grads.end(), [](const Tensor& one) { return one.defined(); });
    // A core of a weight that got no gradient: zeros, as if it had got one of zeros.
    const bool is_all = std::all_of(grads.begin(), grads.end(), [](const Tensor& one) { return one.defined(); });
    for (size_t k = 0; k < cores.size(); ++k) {
      if (!needed[k] || !is_any) found.emplace_back();
      else found.push_back(is_all ? at::empty(saved[k].sizes(), cores[k].options()) : at::zeros(saved[k].sizes(), cores[k].options()));
    }
    const auto& kept = saved.back();
    if (kept.scalar_type() == at::kFloat)
      recipe.backward<float>(read_from<float>(cores), kept.const_data_ptr<float>(), read_from<float>(arriving),
                             written_to<float>(found));
    else
      recipe.backward<double>(read_from<double>(cores), kept.const_data_ptr<double>(), read_from<double>(arriving),
                              written_to<double>(found));
    return found;
  }
};

// The wanted weights, differentiably where gradients are recorded. The cores fit.
inline Tensors contract(const c10::intrusive_ptr<Contraction>& recipe, at::TensorList cores) {
  if (c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() && any_requires_grad(cores))
    return ContractionFunction::apply(recipe, cores);
  const at::AutoDispatchBelowADInplaceOrView below;
  auto found = contracted(*recipe, cores);
  found.pop_back();
  return found;
}

}  // namespace tensortrain
