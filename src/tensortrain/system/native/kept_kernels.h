// Convolutions of compiled programs at inference: by the dense kernel that the cores make, kept while these stay as they
// are. A program that merged them in every call would take several times as long for a small layer.
#pragma once

#include "conv_call.h"

#include <torch/library.h>

#include <mutex>
#include <string>
#include <unordered_map>

namespace tensortrain {

class KeptKernels {
 public:
  // build(spec, is_transposed, cores): the kernel in torch's layout.
  void know_builder(py::object build) { build_ = new py::object(std::move(build)); }  // never destroyed

  Tensor kernel(at::TensorList cores, c10::string_view spec, bool is_transposed) {
    const bool may_keep = std::none_of(cores.begin(), cores.end(), [](const Tensor& core) { return core.is_inference(); });
    if (may_keep) {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto found = kept_.find(cores[0].unsafeGetTensorImpl());
      if (found != kept_.end() && found->second.is_current(cores)) return found->second.kernel;
    }
    std::optional<Kept> made;
    if (may_keep) made.emplace(cores);  // before the cores are read
    auto kernel = built(cores, spec, is_transposed);
    if (made) {
      made->kernel = kernel;
      keep(cores[0].unsafeGetTensorImpl(), std::move(*made));
    }
    return kernel;
  }

  // Of cores of which the first has, or had, this address.
  void forget(int64_t address) {
    std::vector<Kept> gone;  // outlives the lock
    const std::lock_guard<std::mutex> lock(mutex_);
    take(reinterpret_cast<Place>(address), gone);
  }

  int64_t n_bytes(const Tensors& cores) {
    if (cores.empty()) return 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = kept_.find(cores[0].unsafeGetTensorImpl());
    const bool is_there = found != kept_.end() && found->second.is_current(cores);
    return is_there ? static_cast<int64_t>(found->second.kernel.nbytes()) : 0;
  }

 private:
  struct Kept {
    std::vector<Stamp> stamps;
    int64_t n_steps;
    Tensor kernel;

    explicit Kept(at::TensorList cores) : n_steps(n_optimizer_steps) {
      for (const auto& core : cores) stamps.emplace_back(core);
    }
    bool is_current(at::TensorList cores) const {
      if (stamps.size() != cores.size() || n_steps != n_optimizer_steps) return false;
      for (size_t k = 0; k < cores.size(); ++k)
        if (!stamps[k].is_of(cores[k])) return false;
      return true;
    }
    bool is_gone() const {
      return std::any_of(stamps.begin(), stamps.end(), [](const Stamp& one) { return one.tensor.expired(); });
    }
  };
  using Place = const c10::TensorImpl*;

  Tensor built(at::TensorList cores, c10::string_view spec, bool is_transposed) const {
    const py::gil_scoped_acquire locked;
    TORCH_CHECK(build_ != nullptr, "nobody has said how kernels are built");
    return (*build_)(std::string(spec), is_transposed, Tensors(cores.vec())).cast<Tensor>();
  }

  void keep(Place place, Kept made) {
    std::vector<Kept> gone;
    const std::lock_guard<std::mutex> lock(mutex_);
    take(place, gone);
    for (auto one = kept_.begin(); one != kept_.end();) {
      const bool is_gone = one->second.is_gone();
      if (is_gone) gone.push_back(std::move(one->second));
      one = is_gone ? kept_.erase(one) : std::next(one);
    }
    kept_.emplace(place, std::move(made));
  }

  void take(Place place, std::vector<Kept>& gone) {
    const auto found = kept_.find(place);
    if (found == kept_.end()) return;
    gone.push_back(std::move(found->second));
    kept_.erase(found);
  }

  py::object* build_ = nullptr;
  std::mutex mutex_;
  std::unordered_map<Place, Kept> kept_;
};

inline KeptKernels& kept_kernels() {
  static auto& kept = *new KeptKernels();  // never destroyed
  return kept;
}

inline Tensor convolve_by_kept_kernel(const Tensor& x, const Bias& bias, at::TensorList cores, at::IntArrayRef stride,
                                      at::IntArrayRef padding, at::IntArrayRef dilation, bool is_transposed,
                                      at::IntArrayRef output_padding, int64_t groups, c10::string_view spec) {
  const auto kernel = kept_kernels().kernel(cores, spec, is_transposed);
  return at::convolution(x, kernel, bias, stride, padding, dilation, is_transposed, output_padding, groups);
}

}  // namespace tensortrain

TORCH_LIBRARY_FRAGMENT(tensortrain, library) {
  library.def(
      "convolve_by_kept_kernel(Tensor x, Tensor? bias, Tensor[] cores, int[] stride, int[] padding, int[] dilation, "
      "bool is_transposed, int[] output_padding, int groups, str spec) -> Tensor");
}

TORCH_LIBRARY_IMPL(tensortrain, CPU, library) {
  library.impl("convolve_by_kept_kernel", &tensortrain::convolve_by_kept_kernel);
}
