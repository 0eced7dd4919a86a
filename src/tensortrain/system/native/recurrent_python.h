// What Python sees of recurrent.h.
#pragma once

#include "layer_call.h"
#include "recurrent.h"

namespace tensortrain::recurrent {

// Numbers of (kind, size, n_steps, batch, whether time comes first, whether it runs backwards), and of the examples of
// every step where they are packed.
inline Course course_of(const Sizes& numbers, const std::optional<Tensor>& counts) {
  Course course{static_cast<Kind>(numbers[0]), numbers[1], numbers[2], numbers[3], numbers[5] != 0, 1, {}, {}, numbers[3]};
  if (counts) {
    const auto* const given = counts->const_data_ptr<int64_t>();
    course.count.assign(given, given + course.n_steps);
    int64_t at = 0;
    for (const auto n : course.count) course.first.push_back(at), at += n;
  } else if (numbers[4] == 0) {
    course.stride = course.n_steps, course.step_rows = 1;
  }
  return course;
}

inline bool fits(const Course& course, const Sweep& sweep, const Tensors& weights, const Bias& bias, const Tensor& gates,
                 const Tensors& states) {
  const auto dtype = gates.scalar_type();
  const auto is_like = [dtype](const Tensor& one) { return is_plain(one) && one.scalar_type() == dtype; };
  if (!has_blas() || !is_undisturbed() || (dtype != at::kFloat && dtype != at::kDouble)) return false;
  if (!is_like(gates) || gates.numel() == 0 || !sweep.ready || weights.size() != sweep.shapes.size()) return false;
  if (sweep.in_features != course.size || sweep.out_features != gates_of(course.kind) * course.size) return false;
  if (gates.numel() != course.rows() * sweep.out_features) return false;
  for (size_t k = 0; k < weights.size(); ++k)
    if (!is_like(weights[k]) || weights[k].sizes() != sweep.shapes[k]) return false;
  for (const auto& state : states)
    if (!is_like(state) || state.numel() != course.batch * course.size) return false;
  return !bias || (is_like(*bias) && bias->numel() == sweep.out_features);
}

template <typename Run>
void by_dtype(const Tensor& like, const Run& run) {
  like.scalar_type() == at::kFloat ? run(0.0f) : run(0.0);
}

// Outputs (rows, size), the last states, and where gradients will be wanted, what the way back takes.
inline std::optional<Tensors> forward(const Sizes& numbers, const std::optional<Tensor>& counts,
                                      const c10::intrusive_ptr<Sweep>& sweep, const Tensors& given, const Bias& added,
                                      const Tensor& input, const Tensors& states, bool keeps) {
  const auto course = course_of(numbers, counts);
  if (!fits(course, *sweep, given, added, input, states)) return std::nullopt;
  const py::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto gates = input.contiguous(), bias = added ? added->contiguous() : Tensor();
  const auto weights = contiguous_all(given);
  const auto rows = course.rows(), width = sweep->out_features;
  const bool keeps_gates = keeps && gates_of(course.kind) > 1;
  Tensors found{at::empty({rows, course.size}, gates.options())};
  for (const auto& state : states) found.push_back(state.contiguous().clone());
  const Tensors last(found.begin() + 1, found.end());
  const auto kept_gates = keeps_gates ? at::empty({rows, width}, gates.options()) : Tensor();
  const auto kept_state = keeps_gates ? at::empty({rows, course.size}, gates.options()) : Tensor();
  by_dtype(gates, [&](auto zero) {
    const Call call{course, *sweep, weights, bias};
    by_examples(call, [&](int64_t from, int64_t to) {
      forward_part<decltype(zero)>(call, gates, last, found[0], kept_gates, kept_state, from, to);
    });
  });
  if (keeps_gates) found.insert(found.end(), {kept_gates, kept_state});
  return found;
}

// Gradients of what the input map gave, of what the hidden map gave, the states that it was given, and gradients of the
// first states. `kept` as forward left it, `grads` of the outputs and the last states.
inline Tensors backward(const Sizes& numbers, const std::optional<Tensor>& counts, const c10::intrusive_ptr<Sweep>& sweep,
                        const Tensors& given, const Tensors& states, const Tensor& out, const Tensors& kept,
                        const std::vector<std::optional<Tensor>>& grads) {
  const auto course = course_of(numbers, counts);
  const py::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  const auto weights = contiguous_all(given), firsts = contiguous_all(states);
  const auto rows = course.rows();
  Found found;
  found.dx = at::empty({rows, sweep->out_features}, out.options());
  found.du = course.kind == Kind::gru ? at::empty({rows, sweep->out_features}, out.options()) : found.dx;
  found.before = at::empty({rows, course.size}, out.options());
  for (size_t k = 1; k < grads.size(); ++k)
    found.states.push_back(grads[k] ? grads[k]->contiguous().clone() : at::zeros({course.batch, course.size}, out.options()));
  const auto grad = grads[0] ? grads[0]->contiguous() : Tensor();
  by_dtype(out, [&](auto zero) {
    const Call call{course, *sweep, weights, Tensor()};
    by_examples(call, [&](int64_t from, int64_t to) {
      backward_part<decltype(zero)>(call, grad, firsts, out, kept.empty() ? Tensor() : kept[0],
                                    kept.empty() ? Tensor() : kept[1], found, from, to);
    });
  });
  Tensors all{found.dx, found.du, found.before};
  all.insert(all.end(), found.states.begin(), found.states.end());
  return all;
}

inline void bind(py::module_& m) {
  m.def("recur", &forward);
  m.def("recur_backward", &backward);
}

}  // namespace tensortrain::recurrent
