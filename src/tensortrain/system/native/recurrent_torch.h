// One direction of an LSTM by torch's own kernel in training: dense weights made of the cores, all steps, and both ways
// back in one function with gradients. What Python does between a large kernel and the next one costs several times what
// it costs by itself, since the kernel leaves none of it in the caches.
#pragma once

#include "merge.h"
#include "recurrent_function.h"

#include <ATen/Context.h>
#include <ATen/ops/mkldnn_rnn_layer.h>
#include <ATen/ops/mkldnn_rnn_layer_backward.h>

namespace tensortrain::recurrent {

constexpr int64_t lstm_of_torch = 2;  // its mode

// Whether torch would take this kernel, and the maps are products with one matrix.
inline bool may_run_by_torch(const Job& job, at::TensorList all) {
  if (job.course.kind != Kind::lstm || !job.input.sweep || !job.course.count.empty()) return false;
  if (!job.input.sweep->is_one_product() || !job.hidden.sweep->is_one_product()) return false;
  if (job.has_input_bias != job.has_hidden_bias || all[0].scalar_type() != at::kFloat) return false;
  return at::hasMKLDNN() && at::globalContext().userEnabledMkldnn();
}

// Start, middle and stop of every product of a map whose sweep is one step.
inline Sizes merge_steps(const Sweep& sweep) {
  const auto& step = sweep.steps[0];
  std::vector<int64_t> stops;
  for (int64_t k = 0; k < step.n_cores(); ++k) stops.push_back(k + 1);
  Sizes found;
  for (const auto& merge : step.merges) {
    const auto stop = stops[static_cast<size_t>(merge.middle)];
    found.insert(found.end(), {merge.start, merge.middle, stop});
    stops[static_cast<size_t>(merge.start)] = stop;
  }
  return found;
}

// The weight (out_features, in_features).
inline Tensor made_of(const Map& map, at::TensorList stored) {
  const auto& sweep = *map.sweep;
  if (sweep.ready) return stored[0].contiguous();
  const auto cores = map.taken(stored);
  if (cores.size() == 1) return cores[0].reshape({sweep.out_features, sweep.in_features}).contiguous();
  return merged_run<float>(cores, merge_steps(sweep)).view({sweep.out_features, sweep.in_features});
}

// Gradients of the tensors, where they are wanted, from that of the weight.
inline void lead_back(const Map& map, at::TensorList stored, const Tensor& grad, const std::vector<bool>& wanted,
                      Tensor* found) {
  if (map.sweep->ready || stored.size() == 1) {
    const auto whole = map.is_turned ? grad.reshape({stored[0].size(1), stored[0].size(0)}).t() : grad;
    if (wanted[0]) found[0] = whole.reshape(stored[0].sizes());
    return;
  }
  const auto cores = map.taken(stored);
  const auto whole = grad.contiguous().view({1, map.sweep->out_features, map.sweep->in_features, 1});
  const auto gradients = merged_run_backward<float>(cores, merge_steps(*map.sweep), whole, wanted);
  for (size_t k = 0; k < stored.size(); ++k) {
    if (!wanted[k]) continue;
    const auto& one = *gradients[k];
    found[k] = map.is_turned ? one.reshape({stored[k].size(1), stored[k].size(0)}).t() : one.reshape(stored[k].sizes());
  }
}

struct TorchFunction : torch::autograd::Function<TorchFunction> {
  using Context = torch::autograd::AutogradContext;

  // The last states, then the outputs (time, examples, size).
  static Tensors forward(Context* ctx, const Job& job, at::TensorList all) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const at::AutoGradMode leaves_workspace(true);
    const auto& course = job.course;
    const auto input = made_of(job.input, job.of_input(all)), hidden = made_of(job.hidden, job.of_hidden(all));
    const auto [input_bias, hidden_bias] = biases_of(job, all);
    const auto [out, h, c, workspace] = at::mkldnn_rnn_layer(
        time_first(course, all[0]), input, hidden, input_bias, hidden_bias, first(course, all[1]), first(course, all[2]),
        course.is_reversed, {}, lstm_of_torch, course.size, 1, true, false, false, true);
    Tensors saved(all.begin(), all.end()), found{h.view(all[1].sizes()), c.view(all[2].sizes()), out};
    saved.insert(saved.end(), {input, hidden, found[0], found[1], out, workspace});
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["job"] = job.packed();
    return found;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    const auto job = Job::unpacked(ctx->saved_data["job"].toIntVector());
    if (grads[2].defined())  // as rows in the order of the input's
      grads[2] = (job.course.stride == 1 ? grads[2] : grads[2].transpose(0, 1)).reshape({-1, job.course.size});
    return gradients_of(ctx, job, std::move(grads), &by_kernel);
  }

 private:
  static Tensor first(const Course& course, const Tensor& state) {
    return state.contiguous().view({course.batch, course.size});
  }

  static Tensor time_first(const Course& course, const Tensor& x) {
    const auto width = x.size(-1);
    return course.stride == 1 ? x.contiguous().view({course.n_steps, course.batch, width})
                              : x.reshape({course.batch, course.n_steps, width}).transpose(0, 1).contiguous();
  }

  static std::pair<Tensor, Tensor> biases_of(const Job& job, at::TensorList all) {
    if (job.has_input_bias) return {all[job.input_bias()].contiguous(), all[job.hidden_bias()].contiguous()};
    const auto zeros = at::zeros({job.width()}, all[0].options());
    return {zeros, zeros};
  }

  static Tensors by_kernel(const Job& job, const Tensors& saved, const Tensors& grads, const std::vector<bool>& needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto& course = job.course;
    const auto n = job.n_tensors();
    const at::TensorList all(saved.data(), n);
    const auto [input_bias, hidden_bias] = biases_of(job, all);
    const auto of_out = grads[2].defined() ? std::optional(time_first(course, grads[2])) : std::nullopt;
    const auto of_state = [&](const Tensor& one) { return one.defined() ? std::optional(first(course, one)) : std::nullopt; };
    const auto [dx, d_input, d_hidden, d_bias, same, dh, dc] = at::mkldnn_rnn_layer_backward(
        time_first(course, all[0]), saved[n], saved[n + 1], input_bias, hidden_bias, first(course, all[1]),
        first(course, all[2]), saved[n + 4], first(course, saved[n + 2]), first(course, saved[n + 3]), of_out,
        of_state(grads[0]), of_state(grads[1]), course.is_reversed, lstm_of_torch, course.size, 1, true, true, false, {},
        false, saved[n + 5]);
    Tensors found(n);
    if (needs[0]) found[0] = (course.stride == 1 ? dx : dx.transpose(0, 1)).reshape(all[0].sizes());
    if (needs[1]) found[1] = dh.reshape(all[1].sizes());
    if (needs[2]) found[2] = dc.reshape(all[2].sizes());
    if (job.has_input_bias) found[job.input_bias()] = d_bias, found[job.hidden_bias()] = d_bias.clone();
    lead_back(job.input, job.of_input(all), d_input, wanted_of(needs, job.input_tensors(), job.input.n_tensors()),
              found.data() + job.input_tensors());
    lead_back(job.hidden, job.of_hidden(all), d_hidden, wanted_of(needs, job.hidden_tensors(), job.hidden.n_tensors()),
              found.data() + job.hidden_tensors());
    return found;
  }
};

// The last states, then the outputs in the order of the input's axes; nothing where no gradients are recorded.
inline std::optional<Tensors> call_by_torch(const Job& job, at::TensorList all) {
  if (!may_run_by_torch(job, all) || !records(all)) return std::nullopt;
  auto found = TorchFunction::apply(job, all);
  if (job.course.stride != 1) found[2] = found[2].transpose(0, 1);
  return found;
}

// -- a call ---------------------------------------------------------------------------------------------

// The last states, then the outputs if they are asked: rows in their order, or of all axes. All fit the job. Nothing where
// torch's kernel was to run and does not serve.
inline std::optional<Tensors> call(const Job& job, Tensors all) {
  return job.by_torch ? call_by_torch(job, all) : call_by_steps(job, std::move(all));
}

}  // namespace tensortrain::recurrent
