// A contraction plan in C++: the products that plan.py does, in the same order, without Python between them.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

namespace tensortrain {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = std::vector<int64_t>;

enum class Form : int64_t { linear, flipped, batched, copied };

// A product of two neighbouring runs of cores; indices count from the first core of the step.
struct Merge {
  int64_t start, middle;
};

struct Step {
  int64_t start, stop;  // the cores that it takes
  Form form;
  int64_t mode, rank;  // sizes of the input mode and of the bond that are contracted
  std::vector<Merge> merges;

  int64_t n_cores() const { return stop - start; }
};

// The cores of a step, merged and laid out as a matrix, with what the way back needs.
struct Weight {
  Tensor matrix;
  Sizes core;                                    // sizes of the merged core
  std::vector<std::pair<Tensor, Tensor>> pairs;  // left and right of every merge
};

// Cores (r, i, j, s) multiply x of (.., N). A sweep over ready matrices has one of them per step and no merges.
struct Sweep : torch::CustomClassHolder {
  bool leftward;
  bool ready;
  int64_t in_features, out_features;
  int64_t rows_at_a_time;  // 0: all; else each thread takes about so many rows through all steps, in its own cache
  std::vector<Step> steps;
  std::vector<Sizes> shapes;  // of cores or matrices

  // What the steps leave for the way back; null where there is none.
  struct Trace {
    std::vector<Weight> weights;
    Tensors operands;            // of each product, as it read them
    std::vector<Sizes> states;   // sizes of the state before each step
  };
  Tensor forward(const Tensor& x, at::TensorList tensors, const std::optional<Tensor>& bias, Trace* trace) const;

 private:
  bool is_one_product() const { return steps.size() == 1 && steps[0].form == Form::linear; }
  Tensor by_parts(const Tensor& x, at::TensorList tensors, const std::optional<Tensor>& bias, int64_t rows) const;
};

inline Tensor merge_pair(const Tensor& left, const Tensor& right) {
  const auto l = left.sizes(), r = right.sizes();
  const auto both = at::mm(left.reshape({-1, l[3]}), right.reshape({r[0], -1}));
  return both.view({l[0], l[1], l[2], r[1], r[2], r[3]})
      .permute({0, 1, 3, 2, 4, 5})
      .reshape({l[0], l[1] * r[1], l[2] * r[2], r[3]});
}

inline std::pair<Tensor, Tensor> merge_pair_backward(const Tensor& grad, const Tensor& left, const Tensor& right) {
  const auto l = left.sizes(), r = right.sizes();
  const auto sorted = grad.reshape({l[0], l[1], r[1], l[2], r[2], r[3]})
                          .permute({0, 1, 3, 2, 4, 5})
                          .reshape({l[0] * l[1] * l[2], r[1] * r[2] * r[3]});
  return {at::mm(sorted, right.reshape({r[0], -1}).t()).view(l),
          at::mm(left.reshape({-1, l[3]}).t(), sorted).view(r)};
}

inline Weight weight_of(const Step& step, at::TensorList tensors, const Sweep& sweep) {
  Weight weight;
  if (sweep.ready) {
    weight.matrix = tensors[step.start];
    return weight;
  }
  Tensors runs(tensors.begin() + step.start, tensors.begin() + step.stop);
  for (const auto& merge : step.merges) {
    weight.pairs.emplace_back(runs[merge.start], runs[merge.middle]);
    runs[merge.start] = merge_pair(runs[merge.start], runs[merge.middle]);
  }
  weight.core = runs[0].sizes().vec();
  const auto& s = weight.core;
  weight.matrix = sweep.leftward ? runs[0].reshape({s[0] * s[1], s[2] * s[3]})
                                 : runs[0].permute({1, 3, 0, 2}).reshape({s[1] * s[3], s[0] * s[2]});
  return weight;
}

inline void weight_backward(const Tensor& grad, const Weight& weight, const Step& step, const Sweep& sweep,
                            Tensors& grads) {
  if (sweep.ready) {
    grads[step.start] = grad;
    return;
  }
  const auto& s = weight.core;
  Tensors runs(step.n_cores());
  runs[0] = sweep.leftward ? grad.reshape(s)
                           : grad.reshape({s[1], s[3], s[0], s[2]}).permute({2, 0, 3, 1}).reshape(s);
  for (size_t k = step.merges.size(); k-- > 0;) {
    const auto& merge = step.merges[k];
    std::tie(runs[merge.start], runs[merge.middle]) =
        merge_pair_backward(runs[merge.start], weight.pairs[k].first, weight.pairs[k].second);
  }
  std::move(runs.begin(), runs.end(), grads.begin() + step.start);
}

inline Tensor repeated(const Tensor& matrix, int64_t n) {
  return matrix.unsqueeze(0).expand({n, matrix.size(0), matrix.size(1)});
}

// States are (lead, rows of the last weight, width) as in plan.py: leftward (b j, s i, p) with p output modes made,
// rightward (b i, r j, p) with p input modes to come.
struct Cut {
  int64_t i, p;

  Cut(at::IntArrayRef state, const Step& step, bool leftward)
      : i(state[1] / step.rank), p(leftward ? state[2] : state[2] / step.mode) {}
  int64_t width(bool leftward) const { return leftward ? i * p : p; }
};

inline Tensor operand_of(const Tensor& state, const Step& step, bool leftward) {
  const Cut cut(state.sizes(), step, leftward);
  const auto n = step.mode * step.rank;
  if (step.form == Form::batched) return state.reshape({-1, n, cut.width(leftward)});
  if (leftward)
    return state.reshape({-1, step.mode, step.rank, cut.i, cut.p}).permute({0, 3, 4, 1, 2}).reshape({-1, n});
  return state.reshape({-1, cut.i, step.rank, step.mode, cut.p}).permute({0, 1, 4, 2, 3}).reshape({-1, n});
}

inline Tensor operand_backward(const Tensor& grad, at::IntArrayRef state, const Step& step, bool leftward) {
  const Cut cut(state, step, leftward);
  if (step.form == Form::batched) return grad.reshape(state);
  if (leftward)
    return grad.reshape({-1, cut.i, cut.p, step.mode, step.rank}).permute({0, 3, 4, 1, 2}).reshape(state);
  return grad.reshape({-1, cut.i, cut.p, step.rank, step.mode}).permute({0, 1, 3, 4, 2}).reshape(state);
}

inline Tensor product(const Tensor& operand, const Tensor& weight, const Step& step, int64_t width) {
  if (step.form == Form::batched) return at::bmm(repeated(weight, operand.size(0)), operand);
  const auto rows =
      step.form == Form::flipped ? at::mm(weight, operand.t()).t() : at::mm(operand, weight.t());
  return rows.reshape({-1, width, weight.size(0)}).transpose(1, 2);
}

// The sum over the batch of grad_b operand_b^T.
inline Tensor summed_products(const Tensor& grad, const Tensor& operand) {
  const auto rows = grad.size(1), columns = operand.size(1), width = grad.size(2);
  if (grad.size(0) == 1) return at::mm(grad[0], operand[0].t());
  // One product of the copies laid side by side moves less than a product for every member.
  if (rows * columns > (rows + columns) * width)
    return at::mm(grad.transpose(0, 1).reshape({rows, -1}), operand.transpose(0, 1).reshape({columns, -1}).t());
  return at::bmm(grad, operand.transpose(1, 2)).sum(0);
}

// The gradient that arrives at a product, laid out as the product made it.
inline Tensor product_grad(const Tensor& grad, const Tensor& operand, const Tensor& weight, const Step& step,
                           int64_t width) {
  if (step.form == Form::batched) return grad.reshape({operand.size(0), weight.size(0), width});
  return grad.reshape({-1, weight.size(0), width}).transpose(1, 2).reshape({-1, weight.size(0)});
}

inline Tensor apply_weight(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const auto rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  const auto y = bias ? at::addmm(*bias, rows, weight.t()) : at::mm(rows, weight.t());
  if (x.dim() == 2) return y;
  auto sizes = x.sizes().vec();
  sizes.back() = weight.size(0);
  return y.view(sizes);
}

inline Tensor Sweep::forward(const Tensor& x, at::TensorList tensors, const std::optional<Tensor>& bias,
                             Trace* trace) const {
  if (ready && !trace && is_one_product()) return apply_weight(x, tensors[0], bias);
  const auto rows = x.numel() / in_features;
  if (rows_at_a_time > 0 && rows > rows_at_a_time && !trace && !at::in_parallel_region())
    return by_parts(x, tensors, bias, rows);
  Tensor state = leftward ? x.reshape({rows * in_features, 1, 1}) : x.reshape({rows, 1, in_features});
  for (const auto& step : steps) {
    const auto width = Cut(state.sizes(), step, leftward).width(leftward);
    auto weight = weight_of(step, tensors, *this);
    if (trace) trace->states.push_back(state.sizes().vec());
    const auto operand = operand_of(state, step, leftward);
    state = bias && is_one_product() ? at::addmm(*bias, operand, weight.matrix.t())
                                        : product(operand, weight.matrix, step, width);
    if (trace) {
      trace->weights.push_back(std::move(weight));
      trace->operands.push_back(operand);
    }
  }
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  auto y = state.reshape(sizes);
  return bias && !is_one_product() ? y.add_(*bias) : y;
}

// Parts of equal size, a whole number of them for every thread; no gradients are recorded here.
inline Tensor Sweep::by_parts(const Tensor& x, at::TensorList tensors, const std::optional<Tensor>& bias,
                              int64_t rows) const {
  const auto n_threads = static_cast<int64_t>(at::get_num_threads());
  const auto per_thread = (rows + rows_at_a_time * n_threads - 1) / (rows_at_a_time * n_threads);
  const auto part = (rows + per_thread * n_threads - 1) / (per_thread * n_threads);
  const auto input = x.reshape({rows, in_features});
  auto sizes = x.sizes().vec();
  sizes.back() = out_features;
  auto y = at::empty({rows, out_features}, x.options());
  at::parallel_for(0, (rows + part - 1) / part, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (auto k = first; k < last; ++k) {
      const auto start = k * part, n = std::min(part, rows - start);
      y.narrow(0, start, n).copy_(forward(input.narrow(0, start, n), tensors, bias, nullptr));
    }
  });
  return y.view(sizes);
}

// Gradients of a sweep, with what it saved; differentiating twice goes through the products once more.
struct SweepFunction : torch::autograd::Function<SweepFunction> {
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* ctx, const c10::intrusive_ptr<Sweep>& sweep, const Tensor& x,
                        const std::optional<Tensor>& bias, at::TensorList tensors) {
    at::AutoDispatchBelowADInplaceOrView below;
    Sweep::Trace trace;
    const auto y = sweep->forward(x, tensors, bias, &trace);
    Tensors saved{x};
    if (bias) saved.push_back(*bias);
    saved.insert(saved.end(), tensors.begin(), tensors.end());
    for (size_t k = 0; k < sweep->steps.size(); ++k) {
      saved.push_back(trace.operands[k]);
      saved.push_back(trace.weights[k].matrix);
      for (const auto& pair : trace.weights[k].pairs) saved.insert(saved.end(), {pair.first, pair.second});
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["sweep"] = c10::IValue::make_capsule(sweep);
    ctx->saved_data["has_bias"] = bias.has_value();
    std::vector<Sizes> sizes = std::move(trace.states);
    for (auto& weight : trace.weights) sizes.push_back(std::move(weight.core));
    ctx->saved_data["sizes"] = std::move(sizes);
    return y;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    const auto sweep = c10::static_intrusive_pointer_cast<Sweep>(ctx->saved_data["sweep"].toCapsule());
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    const auto saved = ctx->get_saved_variables();
    const size_t n_leading = has_bias ? 2 : 1;
    Needs needs{ctx->needs_input_grad(0), has_bias && ctx->needs_input_grad(1), {}};
    for (size_t k = 0; k < sweep->shapes.size(); ++k) needs.tensors.push_back(ctx->needs_input_grad(n_leading + k));
    Tensors found;
    if (c10::GradMode::is_enabled()) {
      found = again(*sweep, saved, has_bias, grads[0], needs);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      found = first(*sweep, saved, has_bias, grads[0], needs, ctx);
    }
    // The sweep itself, x, a place for the bias whether there is one or not, cores.
    Tensors result{Tensor(), found[0], has_bias ? found[1] : Tensor()};
    result.insert(result.end(), found.begin() + n_leading, found.end());
    return result;
  }

 private:
  struct Needs {
    bool x, bias;
    std::vector<bool> tensors;

    bool any(const Step& step) const {
      for (auto k = step.start; k < step.stop; ++k)
        if (tensors[k]) return true;
      return false;
    }
    bool any_before(const std::vector<Step>& steps, size_t stop) const {
      for (size_t k = 0; k < stop; ++k)
        if (any(steps[k])) return true;
      return x;
    }
  };

  static Tensors first(const Sweep& sweep, const Tensors& saved, bool has_bias, const Tensor& grad_y,
                       const Needs& needs, Context* ctx) {
    const size_t n_leading = has_bias ? 2 : 1, n_steps = sweep.steps.size();
    const auto sizes = ctx->saved_data["sizes"].to<std::vector<Sizes>>();
    Tensors grads(sweep.shapes.size());
    std::vector<size_t> at(1, n_leading + sweep.shapes.size());  // where each step's tensors begin
    for (const auto& step : sweep.steps) at.push_back(at.back() + 2 + 2 * step.merges.size());
    auto grad = grad_y;
    for (size_t k = n_steps; k-- > 0;) {
      const auto& step = sweep.steps[k];
      const auto& operand = saved[at[k]];
      Weight weight{saved[at[k] + 1], sizes[n_steps + k], {}};
      for (auto m = at[k] + 2; m < at[k + 1]; m += 2) weight.pairs.emplace_back(saved[m], saved[m + 1]);
      const auto width = Cut(sizes[k], step, sweep.leftward).width(sweep.leftward);
      const bool is_batched = step.form == Form::batched;
      const auto arriving = product_grad(grad, operand, weight.matrix, step, width);
      if (needs.any(step)) {
        const auto of_weight = is_batched ? summed_products(arriving, operand) : at::mm(arriving.t(), operand);
        weight_backward(of_weight, weight, step, sweep, grads);
      }
      if (!needs.any_before(sweep.steps, k)) break;
      const auto of_operand = is_batched ? at::bmm(repeated(weight.matrix.t(), arriving.size(0)), arriving)
                                         : at::mm(arriving, weight.matrix);
      grad = operand_backward(of_operand, sizes[k], step, sweep.leftward);
    }
    Tensors result{needs.x ? grad.reshape(saved[0].sizes()) : Tensor()};
    if (has_bias) result.push_back(needs.bias ? grad_y.reshape({-1, sweep.out_features}).sum(0) : Tensor());
    result.insert(result.end(), grads.begin(), grads.end());
    return result;
  }

  // Under create_graph, by torch's own derivatives of the same products.
  static Tensors again(const Sweep& sweep, const Tensors& saved, bool has_bias, const Tensor& grad_y,
                       const Needs& needs) {
    Tensors inputs, wanted;
    const auto take = [&](const Tensor& tensor, bool needed) {
      // An alias: the history of one input may hold another one, and that way is not this node's.
      inputs.push_back(needed ? tensor.view_as(tensor) : tensor.detach());
      if (needed) wanted.push_back(inputs.back());
    };
    take(saved[0], needs.x);
    if (has_bias) take(saved[1], needs.bias);
    for (size_t k = 0; k < needs.tensors.size(); ++k) take(saved[inputs.size()], needs.tensors[k]);
    const std::optional<Tensor> bias = has_bias ? std::optional<Tensor>(inputs[1]) : std::nullopt;
    const at::TensorList tensors = at::TensorList(inputs).slice(has_bias ? 2 : 1);
    const auto y = sweep.forward(inputs[0], tensors, bias, nullptr);
    const auto found = torch::autograd::grad({y}, wanted, {grad_y}, /*retain_graph=*/true, /*create_graph=*/true,
                                             /*allow_unused=*/true);
    Tensors result(inputs.size());
    for (size_t k = 0, taken = 0; k < inputs.size(); ++k)
      if (inputs[k].requires_grad()) result[k] = found[taken++];
    return result;
  }
};

inline Tensor differentiable(const c10::intrusive_ptr<Sweep>& sweep, const Tensor& x, at::TensorList tensors,
                             const std::optional<Tensor>& bias) {
  return SweepFunction::apply(sweep, x, bias, tensors);
}

}  // namespace tensortrain
