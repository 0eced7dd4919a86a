// A contraction plan in C++: the products that plan.py does, in the same order, without Python between them.
#pragma once

#include "views.h"

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace tensortrain {

using Tensors = std::vector<Tensor>;
using Bias = std::optional<Tensor>;

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
  bool is_batched() const { return form == Form::batched; }
};

// The cores of a step, merged and laid out as a matrix, with what the way back needs.
struct Weight {
  Tensor matrix;
  Sizes core;                                    // sizes of the merged core
  std::vector<std::pair<Tensor, Tensor>> pairs;  // left and right of every merge
};

// What the steps leave for the way back.
struct Trace {
  std::vector<Weight> weights;
  Tensors operands;           // of each product, as it read them, where the weight's gradient takes it
  std::vector<Sizes> states;  // sizes of the state before each step
};

// Cores (r, i, j, s) multiply x of (.., N). A sweep over ready matrices has one of them per step and no merges.
struct Sweep : torch::CustomClassHolder {
  bool leftward;
  bool ready;
  int64_t in_features, out_features;
  int64_t rows_at_a_time;  // 0: all; else about so many at a time go through all steps, which keeps states in the cache
  std::vector<Step> steps;
  std::vector<Sizes> shapes;  // of cores or matrices

  Tensor forward(const Tensor& x, at::TensorList tensors, const Bias& bias, Trace* trace) const;
  bool is_one_product() const { return steps.size() == 1 && steps[0].form == Form::linear; }

 private:
  Tensor by_parts(const Tensor& x, at::TensorList tensors, const Bias& bias, int64_t rows) const;
};

inline bool any_requires_grad(at::TensorList tensors) {
  for (const auto& tensor : tensors)
    if (tensor.requires_grad()) return true;
  return false;
}

// -- cores to matrices ------------------------------------------------------------------------------

inline Tensor as_rows(const Tensor& core) { return shaped(core, {core.numel() / core.size(3), core.size(3)}); }
inline Tensor as_columns(const Tensor& core) { return shaped(core, {core.size(0), core.numel() / core.size(0)}); }

inline Tensor merge_pair(const Tensor& left, const Tensor& right) {
  const auto l = left.sizes(), r = right.sizes();
  const auto both = at::mm(as_rows(left), as_columns(right));
  const auto modes = permuted(shaped(both, {l[0], l[1], l[2], r[1], r[2], r[3]}), {0, 1, 3, 2, 4, 5});
  return shaped(modes, {l[0], l[1] * r[1], l[2] * r[2], r[3]});
}

inline std::pair<Tensor, Tensor> merge_pair_backward(const Tensor& grad, const Tensor& left, const Tensor& right) {
  const auto l = left.sizes(), r = right.sizes();
  const auto modes = permuted(shaped(grad, {l[0], l[1], r[1], l[2], r[2], r[3]}), {0, 1, 3, 2, 4, 5});
  const auto both = shaped(modes, {l[0] * l[1] * l[2], r[1] * r[2] * r[3]});
  return {shaped(at::mm(both, transposed(as_columns(right))), l), shaped(at::mm(transposed(as_rows(left)), both), r)};
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
  weight.matrix = sweep.leftward ? shaped(runs[0], {s[0] * s[1], s[2] * s[3]})
                                 : shaped(permuted(runs[0], {1, 3, 0, 2}), {s[1] * s[3], s[0] * s[2]});
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
  runs[0] = sweep.leftward ? shaped(grad, s)
                           : shaped(permuted(shaped(grad, {s[1], s[3], s[0], s[2]}), {2, 0, 3, 1}), s);
  for (size_t k = step.merges.size(); k-- > 0;) {
    const auto& merge = step.merges[k];
    std::tie(runs[merge.start], runs[merge.middle]) =
        merge_pair_backward(runs[merge.start], weight.pairs[k].first, weight.pairs[k].second);
  }
  std::move(runs.begin(), runs.end(), grads.begin() + step.start);
}

// -- products ---------------------------------------------------------------------------------------

// States are (lead, rows of the last weight, width) as in plan.py: leftward (b j, s i, p) with p output modes made,
// rightward (b i, r j, p) with p input modes to come.
struct Cut {
  int64_t lead, i, p, width;

  Cut(at::IntArrayRef state, const Step& step, bool leftward)
      : lead(leftward ? state[0] / step.mode : state[0]),
        i(state[1] / step.rank),
        p(leftward ? state[2] : state[2] / step.mode),
        width(leftward ? i * p : p) {
    if (!leftward) lead *= i;  // matrices of a batch; their rows are r j
  }
};

inline Tensor operand_of(const Tensor& state, const Step& step, bool leftward) {
  const Cut cut(state.sizes(), step, leftward);
  const auto n = step.mode * step.rank;
  if (step.is_batched()) return shaped(state, {cut.lead, n, cut.width});
  if (cut.width == 1) return shaped(state, {cut.lead, n});
  const auto axes = leftward ? permuted(shaped(state, {cut.lead, step.mode, step.rank, cut.i, cut.p}), {0, 3, 4, 1, 2})
                             : permuted(shaped(state, {cut.lead, step.rank, step.mode, cut.p}), {0, 3, 1, 2});
  return shaped(axes, {cut.lead * cut.width, n});
}

inline Tensor operand_backward(const Tensor& grad, at::IntArrayRef state, const Step& step, bool leftward) {
  const Cut cut(state, step, leftward);
  if (step.is_batched() || cut.width == 1) return shaped(grad, state);
  const auto axes = leftward ? permuted(shaped(grad, {cut.lead, cut.i, cut.p, step.mode, step.rank}), {0, 3, 4, 1, 2})
                             : permuted(shaped(grad, {cut.lead, cut.p, step.rank, step.mode}), {0, 2, 3, 1});
  return shaped(axes, state);
}

inline Tensor product(const Tensor& operand, const Tensor& weight, const Step& step, int64_t width) {
  if (step.is_batched()) return at::bmm(repeated(weight, operand.size(0)), operand);
  const auto rows = step.form == Form::flipped ? transposed(at::mm(weight, transposed(operand)))
                                               : at::mm(operand, transposed(weight));
  return permuted(shaped(rows, {rows.size(0) / width, width, weight.size(0)}), {0, 2, 1});
}

// The gradient that arrives at a product, laid out as the product made it.
inline Tensor product_backward(const Tensor& grad, const Tensor& weight, const Step& step, int64_t width) {
  const auto m = weight.size(0), lead = grad.numel() / (m * width);
  if (step.is_batched()) return shaped(grad, {lead, m, width});
  if (width == 1) return shaped(grad, {lead, m});
  return shaped(permuted(shaped(grad, {lead, m, width}), {0, 2, 1}), {lead * width, m});
}

// The sum over the batch of grad_b operand_b^T.
inline Tensor summed_products(const Tensor& grad, const Tensor& operand) {
  const auto n = grad.size(0), rows = grad.size(1), columns = operand.size(1), width = grad.size(2);
  if (n == 1) return at::mm(shaped(grad, {rows, width}), transposed(shaped(operand, {columns, width})));
  // One product of the copies laid side by side moves less than a product for every member.
  if (rows * columns > (rows + columns) * width)
    return at::mm(shaped(permuted(grad, {1, 0, 2}), {rows, n * width}),
                  transposed(shaped(permuted(operand, {1, 0, 2}), {columns, n * width})));
  return at::bmm(grad, permuted(operand, {0, 2, 1})).sum(0);
}

// -- sweeps -----------------------------------------------------------------------------------------

// Sizes of the tensor with another number of features.
inline Sizes sizes_with(const Tensor& tensor, int64_t features) {
  auto sizes = tensor.sizes().vec();
  sizes.back() = features;
  return sizes;
}

inline Tensor summed_rows(const Tensor& y) { return shaped(y, {y.numel() / y.size(-1), y.size(-1)}).sum(0); }

inline Tensor apply_weight(const Tensor& rows, const Tensor& weight, const Bias& bias) {
  return bias ? at::addmm(*bias, rows, transposed(weight)) : at::mm(rows, transposed(weight));
}

inline Tensor Sweep::forward(const Tensor& x, at::TensorList tensors, const Bias& bias, Trace* trace) const {
  const auto rows = x.numel() / in_features;
  const bool may_part = !trace && is_unseen(x) && !at::in_parallel_region();  // seen by autograd: its second derivative
  if (may_part && rows_at_a_time > 0 && rows > rows_at_a_time) return by_parts(x, tensors, bias, rows);
  const auto sizes = sizes_with(x, out_features);
  if (is_one_product()) {
    auto weight = weight_of(steps[0], tensors, *this);
    const auto operand = shaped(x, {rows, in_features});
    const auto y = shaped(apply_weight(operand, weight.matrix, bias), sizes);
    if (trace) {
      trace->operands.push_back(any_requires_grad(tensors) ? operand : Tensor());
      trace->states.push_back({rows * (leftward ? in_features : 1), 1, leftward ? 1 : in_features});
      trace->weights.push_back(std::move(weight));
    }
    return y;
  }
  Tensor state = leftward ? shaped(x, {rows * in_features, 1, 1}) : shaped(x, {rows, 1, in_features});
  for (const auto& step : steps) {
    const auto width = Cut(state.sizes(), step, leftward).width;
    auto weight = weight_of(step, tensors, *this);
    if (trace) trace->states.push_back(state.sizes().vec());
    const auto operand = operand_of(state, step, leftward);
    state = product(operand, weight.matrix, step, width);
    if (trace) {
      trace->weights.push_back(std::move(weight));
      trace->operands.push_back(any_requires_grad(tensors.slice(step.start, step.n_cores())) ? operand : Tensor());
    }
  }
  const auto y = shaped(state, sizes).contiguous();  // flipped products come out transposed
  return bias ? y.add_(*bias) : y;
}

// Parts of equal size, a whole number of them for every thread; no gradients are recorded here. Built without OpenMP,
// as now, parts follow each other and their products use all threads.
inline Tensor Sweep::by_parts(const Tensor& x, at::TensorList tensors, const Bias& bias, int64_t rows) const {
  const auto n_threads = static_cast<int64_t>(at::get_num_threads());
  const auto per_thread = (rows + rows_at_a_time * n_threads - 1) / (rows_at_a_time * n_threads);
  const auto part = (rows + per_thread * n_threads - 1) / (per_thread * n_threads);
  const auto input = shaped(x, {rows, in_features});
  const auto y = at::empty({rows, out_features}, x.options());
  at::parallel_for(0, (rows + part - 1) / part, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (auto k = first; k < last; ++k) {
      const auto start = k * part, n = std::min(part, rows - start);
      y.narrow(0, start, n).copy_(forward(input.narrow(0, start, n), tensors, bias, nullptr));
    }
  });
  return shaped(y, sizes_with(x, out_features));
}

// -- gradients --------------------------------------------------------------------------------------

// What a sweep keeps beside tensors until its way back: whole numbers, since compiled autograd takes nothing else.
struct Course {
  const Sweep* sweep;  // sweeps stay for as long as the process, see module.cpp
  bool has_bias;
  std::vector<Sizes> states, cores;

  Sizes packed() const {
    Sizes all{reinterpret_cast<int64_t>(sweep), has_bias};
    for (size_t k = 0; k < states.size(); ++k) {
      all.insert(all.end(), states[k].begin(), states[k].end());
      all.insert(all.end(), cores[k].begin(), cores[k].end());
    }
    return all;
  }

  explicit Course(const Sizes& packed) : sweep(reinterpret_cast<const Sweep*>(packed[0])), has_bias(packed[1] != 0) {
    const auto n_core = sweep->ready ? 0 : 4;
    for (auto at = packed.begin() + 2; at != packed.end(); at += 3 + n_core) {
      states.emplace_back(at, at + 3);
      cores.emplace_back(at + 3, at + 3 + n_core);
    }
  }
  Course(const Sweep* sweep, bool has_bias, std::vector<Sizes> states)
      : sweep(sweep), has_bias(has_bias), states(std::move(states)) {}
};

// Gradients of a sweep, with what it saved; differentiating twice goes through the products once more.
struct SweepFunction : torch::autograd::Function<SweepFunction> {
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* ctx, const c10::intrusive_ptr<Sweep>& sweep, const Tensor& x, const Bias& bias,
                        at::TensorList tensors) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Trace trace;
    const auto y = sweep->forward(x, tensors, bias, &trace);
    Course course(sweep.get(), bias.has_value(), std::move(trace.states));
    // frozen cores: gradients do not depend on x
    auto saved = saved_of(course, any_requires_grad(tensors) ? x : Tensor(), tensors, trace);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["course"] = course.packed();
    return y;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    const Course course(ctx->saved_data["course"].toIntVector());
    if (!grads[0].defined()) return Tensors(3 + course.sweep->shapes.size());
    const auto saved = ctx->get_saved_variables();
    const size_t n_leading = course.has_bias ? 2 : 1;  // x and bias, before the cores
    Needs needs{ctx->needs_input_grad(0), course.has_bias && ctx->needs_input_grad(1), {}};
    for (size_t k = 0; k < course.sweep->shapes.size(); ++k)
      needs.tensors.push_back(ctx->needs_input_grad(n_leading + k));
    Tensors found;
    if (c10::GradMode::is_enabled()) {
      const at::TensorList tensors(saved.data() + 1, course.sweep->shapes.size());
      found = again(*course.sweep, saved[0], tensors, grads[0], needs);
    } else {
      std::optional<at::AutoDispatchBelowADInplaceOrView> below;
      if (!grads[0]._fw_grad(0).defined()) below.emplace();  // else torch takes the derivative of the way back along
      found = first(course, saved, grads[0], needs);
    }
    // The sweep itself; then x, a place for the bias whether there is one or not, cores.
    found.insert(found.begin(), Tensor());
    return found;
  }

  struct Needs {
    bool x, bias;
    std::vector<bool> tensors;

    bool any(const Step& step) const {
      return std::any_of(tensors.begin() + step.start, tensors.begin() + step.stop, [](bool one) { return one; });
    }
    bool any_before(const std::vector<Step>& steps, size_t stop) const {
      return x || std::any_of(steps.begin(), steps.begin() + stop, [&](const Step& step) { return any(step); });
    }
  };

  static Tensors first(const Course& course, const Tensors& saved, const Tensor& grad_y, const Needs& needs) {
    const auto& sweep = *course.sweep;
    const auto n_steps = sweep.steps.size();
    Tensors grads(sweep.shapes.size());
    std::vector<size_t> at{1 + sweep.shapes.size()};  // where each step's tensors begin
    for (const auto& step : sweep.steps) at.push_back(at.back() + 2 + 2 * step.merges.size());
    auto grad = grad_y;
    for (size_t k = n_steps; k-- > 0;) {
      const auto& step = sweep.steps[k];
      const auto& operand = saved[at[k]];
      Weight weight{saved[at[k] + 1], course.cores[k], {}};
      for (auto m = at[k] + 2; m < at[k + 1]; m += 2) weight.pairs.emplace_back(saved[m], saved[m + 1]);
      const auto width = Cut(course.states[k], step, sweep.leftward).width;
      const auto arriving = product_backward(grad, weight.matrix, step, width);
      if (needs.any(step)) {
        const auto of_weight =
            step.is_batched() ? summed_products(arriving, operand) : at::mm(transposed(arriving), operand);
        weight_backward(of_weight, weight, step, sweep, grads);
      }
      if (!needs.any_before(sweep.steps, k)) break;
      const auto of_operand = step.is_batched()
                                  ? at::bmm(repeated(transposed(weight.matrix), arriving.size(0)), arriving)
                                  : at::mm(arriving, weight.matrix);
      grad = operand_backward(of_operand, course.states[k], step, sweep.leftward);
    }
    Tensors result{needs.x ? shaped(grad, sizes_with(grad_y, sweep.in_features)) : Tensor(),
                   needs.bias ? summed_rows(grad_y) : Tensor()};
    result.insert(result.end(), grads.begin(), grads.end());
    return result;
  }

  // What the way back needs is made once more: nothing of it was kept.
  static Tensors first_again(const Sweep& sweep, const Tensor& x, at::TensorList tensors, const Tensor& grad_y,
                             const Needs& needs) {
    Trace trace;
    const auto input = x.defined() ? x : at::zeros(sizes_with(grad_y, sweep.in_features), grad_y.options());
    sweep.forward(input, tensors, std::nullopt, &trace);
    Course course(&sweep, needs.bias, std::move(trace.states));
    return first(course, saved_of(course, x, tensors, trace), grad_y, needs);
  }

  // Under create_graph, by torch's own derivatives of the same products. Without an x, gradients do not depend on it.
  static Tensors again(const Sweep& sweep, const Tensor& x, at::TensorList tensors, const Tensor& grad_y,
                       const Needs& needs) {
    Tensors inputs, wanted;
    std::vector<bool> needed;
    const auto take = [&](const Tensor& tensor, bool need) {
      // An alias: the history of one input may hold another one, and that way is not this node's. What needs no
      // gradient now stays linked too: the gradients of the others depend on it.
      inputs.push_back(tensor.view_as(tensor));
      needed.push_back(need);
      if (need) wanted.push_back(inputs.back());
    };
    take(x.defined() ? x : at::zeros(sizes_with(grad_y, sweep.in_features), grad_y.options()).requires_grad_(), needs.x);
    for (size_t k = 0; k < tensors.size(); ++k) take(tensors[k], needs.tensors[k]);
    Tensors found;
    if (!wanted.empty()) {
      const auto y = sweep.forward(inputs[0], at::TensorList(inputs).slice(1), std::nullopt, nullptr);
      found = torch::autograd::grad({y}, wanted, {grad_y}, /*retain_graph=*/true, /*create_graph=*/true,
                                    /*allow_unused=*/true);
    }
    Tensors result;
    for (size_t k = 0, taken = 0; k < inputs.size(); ++k) result.push_back(needed[k] ? found[taken++] : Tensor());
    result.insert(result.begin() + 1, needs.bias ? summed_rows(grad_y) : Tensor());
    return result;
  }

 private:
  // x, cores, then for every step its operand, its matrix and both sides of its merges.
  static Tensors saved_of(Course& course, const Tensor& x, at::TensorList tensors, Trace& trace) {
    Tensors saved{x};
    saved.insert(saved.end(), tensors.begin(), tensors.end());
    for (size_t k = 0; k < trace.weights.size(); ++k) {
      auto& weight = trace.weights[k];
      course.cores.push_back(std::move(weight.core));
      saved.insert(saved.end(), {trace.operands[k], weight.matrix});
      for (const auto& pair : weight.pairs) saved.insert(saved.end(), {pair.first, pair.second});
    }
    return saved;
  }
};

inline Tensor differentiable(const c10::intrusive_ptr<Sweep>& sweep, const Tensor& x, at::TensorList tensors,
                             const Bias& bias) {
  return SweepFunction::apply(sweep, x, bias, tensors);
}

}  // namespace tensortrain
