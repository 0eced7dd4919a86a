// The shortest way through a layer: everything between Python's call and the products, in C++.
#pragma once

#include "small.h"

#include <ATen/Context.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/linear.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <pybind11/pytypes.h>

#include <array>

namespace tensortrain {

// Steps of all optimizers, counted in Python: fused ones write without raising a tensor's version.
inline int64_t n_optimizer_steps = 0;

inline bool is_plain(const Tensor& tensor) { return has_plain_keys(tensor) && !tensor._fw_grad(0).defined(); }

// Whether nobody listens to, rewrites or casts the operations of this thread.
inline bool is_undisturbed() {
  return is_unheard(c10::impl::tls_local_dispatch_key_set()) && !at::impl::torch_function_mode_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

inline bool fits(const Sweep& sweep, const Tensor& x, at::TensorList tensors, const Bias& bias) {
  if (!is_plain(x) || x.dim() == 0 || x.size(-1) != sweep.in_features || x.numel() == 0) return false;
  const auto dtype = x.scalar_type();
  if (!at::isFloatingType(dtype) || tensors.size() != sweep.shapes.size()) return false;
  for (size_t k = 0; k < tensors.size(); ++k)
    if (!is_plain(tensors[k]) || tensors[k].scalar_type() != dtype || tensors[k].sizes() != sweep.shapes[k])
      return false;
  return !bias || (is_plain(*bias) && bias->scalar_type() == dtype && bias->dim() == 1 &&
                   bias->size(0) == sweep.out_features);
}

inline Tensor multiply(const c10::intrusive_ptr<Sweep>& sweep, const Tensor& x, at::TensorList tensors,
                       const Bias& bias) {
  const bool differentiates = c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
                              (x.requires_grad() || (bias && bias->requires_grad()) || any_requires_grad(tensors));
  // A ready weight is a layer of torch's: the long way takes it so, and checkpointing must find the same saved.
  if (differentiates && sweep->ready && sweep->is_one_product()) return at::linear(x, tensors[0], bias);
  const auto layout = small_layout(*sweep, x);
  if (differentiates && layout) return SmallSweepFunction::apply(sweep, x, bias, tensors);
  if (differentiates) return differentiable(sweep, x, tensors, bias);
  const at::AutoDispatchBelowADInplaceOrView below;
  if (layout && !sweep->is_one_product()) return small_product(*sweep, *layout, x, tensors, bias);
  return sweep->forward(x, tensors, bias, nullptr);
}

// A core and the state it was in; the storage is held so that its address is not reused.
struct Stamp {
  c10::weak_intrusive_ptr<c10::TensorImpl> tensor;
  c10::Storage storage;
  const void* data;
  uint32_t version;

  explicit Stamp(const Tensor& core)
      : tensor(core.getIntrusivePtr()), storage(core.storage()), data(core.const_data_ptr()), version(core._version()) {}
  bool is_of(const Tensor& core) const {
    return tensor._unsafe_get_target() == core.unsafeGetTensorImpl() && data == core.const_data_ptr() &&
           version == core._version();
  }
};

// How one layer ran at the sizes it has met, rounded up to powers of two: plans, and weights that lie ready.
class ShortWay {
 public:
  // Settings of the layer that it holds for.
  const pybind11::list options;

  explicit ShortWay(pybind11::list given) : options(std::move(given)) {}

  void keep_training(int64_t rows, c10::intrusive_ptr<Sweep> sweep) { training_[bucket(rows)] = std::move(sweep); }

  void keep_inference(int64_t rows, c10::intrusive_ptr<Sweep> sweep, Tensors weights, const Tensors& cores) {
    Kept gone;
    if (!is_current(cores)) {
      std::swap(gone, kept_);
      for (const auto& core : cores) kept_.stamps.emplace_back(core);
      kept_.n_steps = n_optimizer_steps;
    }
    std::swap(gone.inference[bucket(rows)], kept_.inference[bucket(rows)]);
    kept_.inference[bucket(rows)] = {std::move(sweep), std::move(weights)};
    may_be_cached_ = true;
  }

  // The plan and its tensors for an input; none where the long way must be taken.
  std::optional<std::pair<c10::intrusive_ptr<Sweep>, Tensors>> find(const Tensor& x, Tensors cores) {
    // Deterministic mode takes plans that were predicted, not timed.
    if (!is_undisturbed() || at::globalContext().deterministicAlgorithms()) return std::nullopt;
    if (x.dim() == 0 || x.size(-1) == 0) return std::nullopt;
    const auto k = bucket(x.numel() / x.size(-1));
    if (c10::GradMode::is_enabled() && any_requires_grad(cores)) {
      if (!training_[k] || may_be_cached_) return std::nullopt;  // the long way clears the cache
      return std::make_pair(training_[k], std::move(cores));
    }
    const auto& ready = kept_.inference[k];
    if (!ready.sweep || !is_current(cores)) return std::nullopt;
    return std::make_pair(ready.sweep, ready.weights);
  }

  void forget_weights() {
    Kept gone;
    std::swap(gone, kept_);
    may_be_cached_ = false;
  }

  void note_cached() { may_be_cached_ = true; }

 private:
  struct Ready {
    c10::intrusive_ptr<Sweep> sweep;
    Tensors weights;
  };
  static constexpr size_t n_buckets = 63;
  // Tensors that end may let another thread take the GIL and come here: they are moved out first, and end last.
  struct Kept {
    std::array<Ready, n_buckets> inference;
    std::vector<Stamp> stamps;
    int64_t n_steps = 0;
  };

  static size_t bucket(int64_t rows) {
    size_t k = 0;
    while (k + 1 < n_buckets && (int64_t{1} << k) < rows) ++k;
    return k;
  }

  bool is_current(const Tensors& cores) const {
    if (kept_.stamps.size() != cores.size() || kept_.n_steps != n_optimizer_steps) return false;
    for (size_t k = 0; k < cores.size(); ++k)
      if (cores[k].is_inference() || !kept_.stamps[k].is_of(cores[k])) return false;
    return true;
  }

  std::array<c10::intrusive_ptr<Sweep>, n_buckets> training_;
  Kept kept_;
  bool may_be_cached_ = true;  // whether the layer's cache may hold weights, which leave memory when training goes on
};

}  // namespace tensortrain
