// One direction of a recurrent layer as a function with gradients: its two maps, merged from their cores, and all steps.
#pragma once

#include "recurrent.h"
#include "short_way.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/lerp.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/zeros.h>

namespace tensortrain::recurrent {

// Numbers that a map's products may keep between them in plain memory.
constexpr int64_t most_numbers = 1 << 21;

// A linear map, without its tensors.
struct Map {
  c10::intrusive_ptr<Sweep> sweep;  // over its tensors; null: there is none
  c10::intrusive_ptr<Sweep> ready;  // over the matrices that the steps make of them; the same where they are matrices
  bool is_turned = false;           // stored cores are matrices, transposes of the sweep's

  size_t n_tensors() const { return sweep ? sweep->shapes.size() : 0; }

  // The tensors as the sweep takes them: differentiable where somebody looks on.
  Tensor taken(const Tensor& stored, size_t k) const {
    const auto turned = is_turned ? stored.t() : stored;
    return turned.sizes() == sweep->shapes[k] ? turned : turned.reshape(sweep->shapes[k]);
  }
  Tensors taken(at::TensorList stored) const {
    Tensors found;
    for (size_t k = 0; k < stored.size(); ++k) found.push_back(taken(stored[k], k));
    return found;
  }
};

// Everything of a call but its tensors, which are: x or what an input map gave, states, biases where there are any, those
// of the input map, those of the hidden map.
struct Job {
  Course course;
  Map input, hidden;
  bool has_input_bias = false, has_hidden_bias = false;
  bool gives_outputs = true;  // and not the last states alone
  bool by_torch = false;      // torch's own kernel does the steps; see recurrent_torch.h

  size_t n_states() const { return course.kind == Kind::lstm ? 2 : 1; }
  size_t input_bias() const { return 1 + n_states(); }
  size_t hidden_bias() const { return input_bias() + has_input_bias; }
  size_t input_tensors() const { return hidden_bias() + has_hidden_bias; }
  size_t hidden_tensors() const { return input_tensors() + input.n_tensors(); }
  size_t n_tensors() const { return hidden_tensors() + hidden.n_tensors(); }
  int64_t width() const { return gates_of(course.kind) * course.size; }

  at::TensorList of_input(at::TensorList all) const { return all.slice(input_tensors(), input.n_tensors()); }
  at::TensorList of_hidden(at::TensorList all) const { return all.slice(hidden_tensors(), hidden.n_tensors()); }

  // Whole numbers, since compiled autograd takes nothing else; sweeps stay for as long as the process, see module.cpp.
  Sizes packed() const {
    const auto address = [](const auto& sweep) { return reinterpret_cast<int64_t>(sweep.get()); };
    Sizes all{static_cast<int64_t>(course.kind), course.size, course.n_steps, course.batch, course.is_reversed,
              course.stride, course.step_rows, address(input.sweep), address(input.ready), input.is_turned,
              address(hidden.sweep), address(hidden.ready), hidden.is_turned, has_input_bias, has_hidden_bias,
              gives_outputs, by_torch};
    all.insert(all.end(), course.count.begin(), course.count.end());
    return all;
  }

  static Job unpacked(const Sizes& all) {
    const auto sweep = [](int64_t address) {
      return address ? c10::intrusive_ptr<Sweep>::reclaim_copy(reinterpret_cast<Sweep*>(address)) : nullptr;
    };
    Job job{{static_cast<Kind>(all[0]), all[1], all[2], all[3], all[4] != 0, all[5], {}, {}, all[6]},
            {sweep(all[7]), sweep(all[8]), all[9] != 0},
            {sweep(all[10]), sweep(all[11]), all[12] != 0},
            all[13] != 0, all[14] != 0, all[15] != 0, all[16] != 0};
    job.course.pack({all.begin() + 17, all.end()});
    return job;
  }
};

// -- on plain memory ----------------------------------------------------------------------------------

// What the way forward leaves for the way back.
struct Left {
  Tensor out, gates, state, of_input, of_hidden;
};

template <typename T>
const T* read(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

inline Tensors plain_tensors(const Map& map, at::TensorList stored) {
  Tensors found;
  for (const auto& tensor : stored) found.push_back(map.is_turned ? tensor.t().contiguous() : tensor.contiguous());
  return found;
}

// Above so many numbers, tensors do the products of a map's many rows.
inline bool is_manageable(const Map& map, int64_t rows) {
  if (rows * std::max(map.sweep->in_features, map.sweep->out_features) > most_numbers) return false;
  const auto layout = layout_of(*map.sweep, rows);
  return layout->size <= most_numbers && layout->scratch <= most_numbers;
}

// Rows for which the memory of a map is laid out; its matrices lie there too.
inline int64_t rows_kept(const Map& map, int64_t rows) { return is_manageable(map, rows) ? rows : 1; }

inline Tensor optional_at(at::TensorList all, size_t k, bool is_there) { return is_there ? all[k].contiguous() : Tensor(); }

template <typename T>
std::vector<const T*> addresses(const Tensors& tensors) {
  std::vector<const T*> found;
  for (const auto& tensor : tensors) found.push_back(tensor.const_data_ptr<T>());
  return found;
}

// Room for what a map leaves for the way back from so many rows.
inline Tensor kept_of(const Map& map, int64_t rows, const Tensor& like) {
  return map.sweep ? at::empty({layout_of(*map.sweep, rows_kept(map, rows))->size}, like.options()) : Tensor();
}

// All steps. `last` holds copies of the first states, and the last ones afterwards; without `keeps` only the outputs are
// left, and x and tensors are plain.
template <typename T>
void go_forward(const Job& job, at::TensorList all, const Tensors& last, Left& left, bool keeps) {
  const auto& course = job.course;
  const auto rows = course.rows(), width = job.width();
  Room room;
  const auto x = all[0].contiguous(), input_bias = optional_at(all, job.input_bias(), job.has_input_bias);
  const auto hidden_bias = optional_at(all, job.hidden_bias(), job.has_hidden_bias);
  const T* gates = x.const_data_ptr<T>();
  if (job.input.sweep) {
    const auto layout = layout_of(*job.input.sweep, rows);
    const auto tensors = plain_tensors(job.input, job.of_input(all));
    T *const made = room.take<T>(rows * width), *const kept = keeps ? data<T>(left.of_input) : room.take<T>(layout->size);
    SmallSweep<T>(*job.input.sweep, *layout, tensors, kept).forward(gates, read<T>(input_bias), made, rows * width);
    gates = made;
  }
  const auto tensors = plain_tensors(job.hidden, job.of_hidden(all));
  auto matrices = addresses<T>(tensors);
  if (!job.hidden.sweep->ready) {
    const auto layout = layout_of(*job.hidden.sweep, rows_kept(job.hidden, rows));
    T* const kept = keeps ? data<T>(left.of_hidden) : room.take<T>(layout->size);
    SmallSweep<T> sweep(*job.hidden.sweep, *layout, tensors, kept);
    sweep.merge();
    matrices = sweep.matrices();
  }
  const Call<T> call{course, *job.hidden.ready, matrices, read<T>(hidden_bias)};
  const Steps<T> steps{gates, data<T>(last[0]), last.size() > 1 ? data<T>(last[1]) : nullptr, data<T>(left.out),
                       {data<T>(left.gates), data<T>(left.state)}};
  by_examples(course, [&](int64_t from, int64_t to) { forward_part(call, steps, from, to); });
}

template <typename T>
void sum_rows(const T* from, int64_t rows, int64_t width, T* to) {
  std::fill_n(to, width, T(0));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t k = 0; k < width; ++k) to[k] += from[row * width + k];
}

inline Tensor bias_gradient(const Tensor& of_rows) {
  auto found = at::empty({of_rows.size(1)}, of_rows.options());
  of_rows.scalar_type() == at::kFloat
      ? sum_rows(of_rows.const_data_ptr<float>(), of_rows.size(0), of_rows.size(1), found.mutable_data_ptr<float>())
      : sum_rows(of_rows.const_data_ptr<double>(), of_rows.size(0), of_rows.size(1), found.mutable_data_ptr<double>());
  return found;
}

// Gradients of a map's tensors, and of its rows if there is a place for them, from those of what it gave. `kept` as the
// way forward left it, but for the states between the products where these were of other rows.
struct MapBack {
  const Map& map;
  at::TensorList stored;
  const Tensor &kept, &x, &grad;
  std::vector<bool> wanted;
  Tensor of_rows;
  bool remakes_states;

  void run(Tensor* found) const {
    if (!of_rows.defined() && std::none_of(wanted.begin(), wanted.end(), [](bool want) { return want; })) return;
    if (!is_manageable(map, grad.size(0))) return by_tensors(found);
    grad.scalar_type() == at::kFloat ? by_memory<float>(found) : by_memory<double>(found);
  }

 private:
  template <typename T>
  void by_memory(Tensor* found) const {
    const auto layout = layout_of(*map.sweep, grad.size(0));
    const auto tensors = plain_tensors(map, stored);
    std::vector<T*> places;
    for (size_t k = 0; k < wanted.size(); ++k) {
      if (wanted[k]) found[k] = at::empty(tensors[k].sizes(), grad.options());
      places.push_back(data<T>(found[k]));
    }
    SmallSweep<T> sweep(*map.sweep, *layout, tensors, const_cast<T*>(read<T>(kept)));  // that is ours alone
    if (remakes_states && layout->parts.size() > 1) {
      Room room;
      sweep.multiply_all(read<T>(x), nullptr, room.take<T>(grad.numel()), grad.numel());
    }
    sweep.backward(read<T>(x), read<T>(grad), data<T>(of_rows), places);
    if (map.is_turned)
      for (size_t k = 0; k < wanted.size(); ++k)
        if (wanted[k]) found[k] = found[k].t();
  }

  void by_tensors(Tensor* found) const {
    const SweepFunction::Needs needs{false, false, wanted};
    const auto gradients = SweepFunction::first_again(*map.sweep, x, map.taken(stored), grad, needs);
    for (size_t k = 0; k < wanted.size(); ++k) {
      if (!wanted[k]) continue;
      const auto& one = gradients[2 + k];
      found[k] = map.is_turned ? one.reshape({stored[k].size(1), stored[k].size(0)}).t() : one.reshape(stored[k].sizes());
    }
  }
};

inline std::vector<bool> wanted_of(const std::vector<bool>& needs, size_t from, size_t n) {
  return {needs.begin() + static_cast<int64_t>(from), needs.begin() + static_cast<int64_t>(from + n)};
}

// Gradients in the order of the tensors.
template <typename T>
Tensors go_back(const Job& job, at::TensorList all, const Left& left, const Tensors& of_last, const Tensor& of_out,
                const std::vector<bool>& needs) {
  const auto& course = job.course;
  const auto rows = course.rows(), width = job.width();
  const auto n_states = job.n_states();
  Tensors found(all.size()), firsts;
  for (size_t k = 0; k < n_states; ++k) {
    firsts.push_back(all[1 + k].contiguous());
    found[1 + k] = of_last[k].defined() ? of_last[k].contiguous().clone().view(all[1 + k].sizes())
                                        : at::zeros(all[1 + k].sizes(), left.out.options());
  }
  const auto hidden = plain_tensors(job.hidden, job.of_hidden(all));
  auto matrices = addresses<T>(hidden);
  if (!job.hidden.sweep->ready)
    matrices = SmallSweep<T>(*job.hidden.sweep, *layout_of(*job.hidden.sweep, rows_kept(job.hidden, rows)), hidden,
                             const_cast<T*>(read<T>(left.of_hidden)))
                   .matrices();
  const auto dx = at::empty({rows, width}, left.out.options()), before = at::empty({rows, course.size}, dx.options());
  const auto du = course.kind == Kind::gru ? at::empty({rows, width}, dx.options()) : dx;
  const bool wants_first = needs[1] || (n_states > 1 && needs[2]);
  const auto grad = of_out.defined() ? of_out.contiguous() : Tensor();
  const Call<T> call{course, *job.hidden.ready, matrices, nullptr};
  const StepsBack<T> back{read<T>(grad), read<T>(firsts[0]), n_states > 1 ? read<T>(firsts[1]) : nullptr,
                          read<T>(left.out), {data<T>(left.gates), data<T>(left.state)}, data<T>(dx), data<T>(du),
                          data<T>(before), data<T>(found[1]), n_states > 1 ? data<T>(found[2]) : nullptr, wants_first};
  by_examples(course, [&](int64_t from, int64_t to) { backward_part(call, back, from, to); });
  MapBack{job.hidden, job.of_hidden(all), left.of_hidden, before, du,
          wanted_of(needs, job.hidden_tensors(), job.hidden.n_tensors()), Tensor(), true}
      .run(found.data() + job.hidden_tensors());
  if (job.input.sweep) {
    if (needs[0]) found[0] = at::empty(all[0].sizes(), dx.options());
    MapBack{job.input, job.of_input(all), left.of_input, all[0].contiguous(), dx,
            wanted_of(needs, job.input_tensors(), job.input.n_tensors()), found[0], false}
        .run(found.data() + job.input_tensors());
  } else if (needs[0]) {
    found[0] = dx.view(all[0].sizes());
  }
  if (job.has_input_bias && needs[job.input_bias()]) found[job.input_bias()] = bias_gradient(dx);
  if (job.has_hidden_bias && needs[job.hidden_bias()]) found[job.hidden_bias()] = bias_gradient(du);
  return found;
}

// -- by operations of torch, which have gradients of any order -------------------------------------------

inline Tensor with_bias(const Tensor& y, at::TensorList all, size_t k, bool is_there) { return is_there ? y + all[k] : y; }

inline void step_recorded(Kind kind, const Tensor& x, const Tensor& u, Tensors& state) {
  switch (kind) {
    case Kind::tanh:
      state[0] = at::tanh(x + u);
      return;
    case Kind::relu:
      state[0] = at::relu(x + u);
      return;
    case Kind::sigmoid:
    case Kind::linear:
    case Kind::igfo:
      return;  // of other cells
    case Kind::gru: {
      const auto xs = x.chunk(3, 1), us = u.chunk(3, 1);
      const auto r = at::sigmoid(xs[0] + us[0]), z = at::sigmoid(xs[1] + us[1]), n = at::tanh(xs[2] + r * us[2]);
      state[0] = at::lerp(n, state[0], z);
      return;
    }
    case Kind::lstm: {
      const auto gates = (x + u).chunk(4, 1);
      state[1] = at::sigmoid(gates[1]) * state[1] + at::sigmoid(gates[0]) * at::tanh(gates[2]);
      state[0] = at::sigmoid(gates[3]) * at::tanh(state[1]);
      return;
    }
  }
}

// Rows of one step among all.
inline Tensor rows_of(const Course& course, const Tensor& gates, int64_t step) {
  if (!course.count.empty()) return gates.narrow(0, course.first[static_cast<size_t>(step)], course.examples(step));
  if (course.stride == 1) return gates.narrow(0, step * course.step_rows, course.batch);
  return gates.view({course.batch, course.n_steps, gates.size(1)}).select(1, step);
}

inline Tensor joined(const Course& course, const Tensors& steps) {
  if (!course.count.empty()) return at::cat(steps);
  const auto both = at::stack(steps, course.stride == 1 ? 0 : 1);
  return both.reshape({course.rows(), course.size});
}

// The last states and the outputs, these as rows.
inline Tensors recorded(const Job& job, at::TensorList all) {
  const auto& course = job.course;
  auto gates = all[0];
  if (job.input.sweep)
    gates = with_bias(job.input.sweep->forward(gates, job.input.taken(job.of_input(all)), std::nullopt, nullptr), all,
                      job.input_bias(), job.has_input_bias);
  gates = gates.reshape({course.rows(), job.width()});
  const auto tensors = job.hidden.taken(job.of_hidden(all));
  Tensors matrices, firsts, state, outputs(static_cast<size_t>(course.n_steps));
  for (const auto& step : job.hidden.sweep->steps) matrices.push_back(weight_of(step, tensors, *job.hidden.sweep).matrix);
  for (size_t k = 0; k < job.n_states(); ++k) firsts.push_back(all[1 + k].reshape({course.batch, course.size}));
  std::vector<Tensors> ended(firsts.size());  // states whose sequences are over, the shortest first
  for (int64_t k = 0; k < course.n_steps; ++k) {
    const auto step = course.step(k), n = course.examples(step), now = k == 0 ? 0 : state[0].size(0);
    for (size_t s = 0; s < firsts.size(); ++s) {
      if (k == 0) state.push_back(firsts[s].narrow(0, 0, n));
      if (k > 0 && n < now) ended[s].push_back(state[s].narrow(0, n, now - n)), state[s] = state[s].narrow(0, 0, n);
      if (k > 0 && n > now) state[s] = at::cat({state[s], firsts[s].narrow(0, now, n - now)});
    }
    const auto given = job.hidden.ready->forward(state[0], matrices, std::nullopt, nullptr);
    step_recorded(course.kind, rows_of(course, gates, step), with_bias(given, all, job.hidden_bias(), job.has_hidden_bias),
                  state);
    outputs[static_cast<size_t>(step)] = state[0];
  }
  Tensors found;
  for (size_t s = 0; s < firsts.size(); ++s) {
    Tensors parts{state[s]};
    parts.insert(parts.end(), ended[s].rbegin(), ended[s].rend());
    found.push_back(at::cat(parts).reshape(all[1 + s].sizes()));
  }
  found.push_back(joined(course, outputs));
  return found;
}

// -- with gradients -------------------------------------------------------------------------------------

// Whether gradients that have gradients are wanted, or somebody else looks on.
inline bool is_unread(const Tensors& grads, const Tensors& saved) {
  if (c10::GradMode::is_enabled() || !is_unheard(c10::impl::tls_local_dispatch_key_set())) return true;
  const auto is_odd = [&](const Tensor& one) { return one.defined() && !has_plain_keys(one); };
  if (std::any_of(saved.begin(), saved.end(), is_odd)) return true;
  return std::any_of(grads.begin(), grads.end(), [&](const Tensor& one) {
    return one.defined() && (is_odd(one) || one._fw_grad(0).defined() || one.scalar_type() != saved[0].scalar_type());
  });
}

inline Tensors by_operations(const Job& job, at::TensorList all, const Tensors& grads, const std::vector<bool>& needs) {
  const bool again = c10::GradMode::is_enabled();
  const at::AutoGradMode records(true);
  Tensors inputs, wanted, outputs, given;
  for (size_t k = 0; k < all.size(); ++k) {
    // An alias: the history of one input may hold another one, as a state holds the weight of the call before; that
    // way is not to be counted again. What was frozen meanwhile is no leaf of ours.
    inputs.push_back(all[k].requires_grad() ? all[k].view_as(all[k])
                     : needs[k]             ? all[k].detach().requires_grad_()
                                            : all[k]);
    if (needs[k]) wanted.push_back(inputs.back());
  }
  const auto found = recorded(job, inputs);
  for (size_t k = 0; k < grads.size(); ++k)
    if (grads[k].defined() && found[k].requires_grad()) outputs.push_back(found[k]), given.push_back(grads[k]);
  Tensors result(all.size());
  if (wanted.empty() || outputs.empty()) return result;
  const auto gradients = torch::autograd::grad(outputs, wanted, given, /*retain_graph=*/again, /*create_graph=*/again,
                                               /*allow_unused=*/true);
  for (size_t k = 0, taken = 0; k < all.size(); ++k)
    if (needs[k]) result[k] = gradients[taken++];
  return result;
}

// What `read` makes of what a function has saved, its tensors first; by operations of torch where it may not.
template <typename Read>
Tensors gradients_of(torch::autograd::AutogradContext* ctx, const Job& job, Tensors grads, Read read) {
  const auto n = job.n_tensors();
  const bool any = std::any_of(grads.begin(), grads.end(), [](const Tensor& one) { return one.defined(); });
  if (!any) return Tensors(1 + n);
  const auto saved = ctx->get_saved_variables();
  std::vector<bool> needs;
  for (size_t k = 0; k < n; ++k) needs.push_back(ctx->needs_input_grad(k));
  auto found = is_unread(grads, saved) ? by_operations(job, at::TensorList(saved.data(), n), grads, needs)
                                       : read(job, saved, grads, needs);
  for (size_t k = 0; k < n; ++k)
    if (!needs[k]) found[k] = Tensor();
  found.insert(found.begin(), Tensor());  // the job itself
  return found;
}

struct SequenceFunction : torch::autograd::Function<SequenceFunction> {
  using Context = torch::autograd::AutogradContext;

  // The last states, then the outputs if they are asked.
  static Tensors forward(Context* ctx, const Job& job, at::TensorList all) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Left left;
    auto found = run(job, all, left, true);
    if (job.gives_outputs) found.push_back(left.out.clone());  // who is given the outputs may write to them
    Tensors saved(all.begin(), all.end());
    saved.insert(saved.end(), {left.out, left.gates, left.state, left.of_input, left.of_hidden});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["job"] = job.packed();
    return found;
  }

  static Tensors run(const Job& job, at::TensorList all, Left& left, bool keeps) {
    const auto& course = job.course;
    const auto options = all[0].options();
    left.out = at::empty({course.rows(), course.size}, options);
    if (keeps && gates_of(course.kind) > 1) {
      left.gates = at::empty({course.rows(), job.width()}, options);
      left.state = at::empty({course.rows(), course.size}, options);
    }
    if (keeps) left.of_input = kept_of(job.input, course.rows(), all[0]);
    if (keeps) left.of_hidden = kept_of(job.hidden, course.rows(), all[0]);
    Tensors last;
    for (size_t k = 0; k < job.n_states(); ++k) last.push_back(all[1 + k].contiguous().clone());
    all[0].scalar_type() == at::kFloat ? go_forward<float>(job, all, last, left, keeps)
                                       : go_forward<double>(job, all, last, left, keeps);
    return last;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    const auto job = Job::unpacked(ctx->saved_data["job"].toIntVector());
    return gradients_of(ctx, job, std::move(grads), &by_memory);
  }

 private:
  static Tensors by_memory(const Job& job, const Tensors& saved, const Tensors& grads, const std::vector<bool>& needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto n = job.n_tensors(), n_states = job.n_states();
    const Left left{saved[n], saved[n + 1], saved[n + 2], saved[n + 3], saved[n + 4]};
    const Tensors of_last(grads.begin(), grads.begin() + static_cast<int64_t>(n_states));
    const auto of_out = job.gives_outputs ? grads[n_states] : Tensor();
    const at::TensorList all(saved.data(), n);
    return saved[0].scalar_type() == at::kFloat ? go_back<float>(job, all, left, of_last, of_out, needs)
                                                : go_back<double>(job, all, left, of_last, of_out, needs);
  }
};

// -- a call ---------------------------------------------------------------------------------------------

inline bool fits(const Map& map, at::TensorList stored, int64_t in_features, int64_t out_features, at::ScalarType dtype) {
  const auto& sweep = *map.sweep;
  if (sweep.in_features != in_features || sweep.out_features != out_features) return false;
  if (map.ready->in_features != in_features || map.ready->out_features != out_features || !map.ready->ready) return false;
  if (map.ready->steps.size() != sweep.steps.size()) return false;
  for (size_t k = 0; k < stored.size(); ++k) {
    const auto& shape = sweep.shapes[k];
    if (!is_plain(stored[k]) || stored[k].scalar_type() != dtype || (map.is_turned && stored[k].dim() != 2)) return false;
    if (stored[k].numel() != c10::multiply_integers(shape)) return false;
  }
  return true;
}

inline bool fits(const Job& job, at::TensorList all) {
  const auto& course = job.course;
  const auto dtype = all[0].scalar_type();
  if (!has_blas() || !is_undisturbed() || (dtype != at::kFloat && dtype != at::kDouble)) return false;
  for (size_t k = 0; k < job.input_tensors(); ++k)
    if (!is_plain(all[k]) || all[k].scalar_type() != dtype) return false;
  const auto in_features = job.input.sweep ? job.input.sweep->in_features : job.width();
  if (all[0].numel() == 0 || all[0].dim() == 0 || all[0].size(-1) != in_features) return false;
  if (all[0].numel() != course.rows() * in_features) return false;
  for (size_t k = 0; k < job.n_states(); ++k)
    if (all[1 + k].numel() != course.batch * course.size) return false;
  if (job.has_input_bias && all[job.input_bias()].numel() != job.width()) return false;
  if (job.has_hidden_bias && all[job.hidden_bias()].numel() != job.width()) return false;
  if (job.input.sweep && !fits(job.input, job.of_input(all), in_features, job.width(), dtype)) return false;
  return fits(job.hidden, job.of_hidden(all), course.size, job.width(), dtype);
}

inline bool records(at::TensorList all) {
  return c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() && any_requires_grad(all);
}

// An input map that is not small runs before, by tensors: what it gives takes the place of x.
inline void apply_input_map(Job& job, Tensors& all) {
  const auto bias = job.has_input_bias ? Bias(all[job.input_bias()]) : std::nullopt;
  const auto at = [&](size_t k) { return all.begin() + static_cast<int64_t>(k); };
  all[0] = multiply(job.input.sweep, all[0], job.input.taken(job.of_input(all)), bias);
  all.erase(at(job.input_tensors()), at(job.hidden_tensors()));
  if (job.has_input_bias) all.erase(at(job.input_bias()));
  job.input = {}, job.has_input_bias = false;
}

// The last states, then the outputs as rows if they are asked; all fit the job.
inline Tensors call_by_steps(Job job, Tensors all) {
  if (job.input.sweep && !is_manageable(job.input, job.course.rows())) apply_input_map(job, all);
  if (records(all)) return SequenceFunction::apply(job, at::TensorList(all));
  const at::AutoDispatchBelowADInplaceOrView below;
  Left left;
  auto found = SequenceFunction::run(job, all, left, false);
  if (job.gives_outputs) found.push_back(left.out);
  return found;
}

}  // namespace tensortrain::recurrent
