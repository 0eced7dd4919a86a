// Layers of compiled programs at inference: by the short way that the same layer takes when it is called as it is, with
// weights that are kept while the cores stay as they are. A program that ran through the cores by itself would merge them
// in every call.
#pragma once

#include "layer_call.h"
#include "rows.h"

#include <torch/library.h>

#include <string>
#include <unordered_map>

namespace tensortrain {

// By first core and what is told of the layer. Everything happens under the GIL.
class KeptWays {
 public:
  template <typename AnyWay>
  struct Held {
    py::object object;
    AnyWay* way = nullptr;
  };

  // run(told, input, bias, cores): the long way, which leaves a short one here.
  void know_runner(py::object run) { run_ = new py::object(std::move(run)); }  // never destroyed

  template <typename AnyWay>
  void keep(const Tensor& core, std::string told, py::object object) {
    auto* const way = object.cast<AnyWay*>();
    auto& own = kept_[core.unsafeGetTensorImpl()];
    for (auto& one : own) {
      if (one.told != told) continue;
      std::swap(one.object, object);
      one.way = way;
      return;
    }
    own.push_back({std::move(told), std::move(object), way});
  }

  // Of cores of which the first has, or had, this address.
  void forget(int64_t address) {
    const auto found = kept_.find(reinterpret_cast<Place>(address));
    if (found == kept_.end()) return;
    const auto gone = std::move(found->second);  // may run Python as it ends
    kept_.erase(found);
  }

  template <typename AnyWay>
  Held<AnyWay> find(at::TensorList cores, c10::string_view told) const {
    if (is_idle) return {};
    const auto own = kept_.find(cores[0].unsafeGetTensorImpl());
    if (own == kept_.end()) return {};
    for (const auto& one : own->second)
      if (one.told.size() == told.size() && std::equal(told.begin(), told.end(), one.told.begin()))
        return {one.object, static_cast<AnyWay*>(one.way)};
    return {};
  }

  Tensor run(c10::string_view told, const Tensor& input, const Bias& bias, at::TensorList cores) const {
    TORCH_CHECK(run_ != nullptr, "nobody has said how layers are run");
    return (*run_)(std::string(told), input, bias, Tensors(cores.vec())).cast<Tensor>();
  }

 private:
  using Place = const c10::TensorImpl*;
  struct Kept {
    std::string told;
    py::object object;
    void* way;
  };

  py::object* run_ = nullptr;
  std::unordered_map<Place, std::vector<Kept>> kept_;
};

inline KeptWays& kept_ways() {
  static auto& kept = *new KeptWays();  // never destroyed
  return kept;
}

inline Tensor multiply_by_kept_weights(const Tensor& x, const Bias& bias, at::TensorList cores, int64_t,
                                       c10::string_view told) {
  const py::gil_scoped_acquire locked;
  const auto held = kept_ways().find<ShortWay>(cores, told);
  const auto found = held.way == nullptr ? std::nullopt : held.way->find(x, cores.vec());
  if (!found || !fits(*found->first, x, found->second, bias)) return kept_ways().run(told, x, bias, cores).contiguous();
  const py::gil_scoped_release unlocked;
  return multiply(found->first, x, found->second, bias).contiguous();
}

inline Tensor rows_of_kept_tables(const Tensor& ids, at::TensorList cores, int64_t, c10::string_view told) {
  const py::gil_scoped_acquire locked;
  const auto held = kept_ways().find<RowsWay>(cores, told);
  std::optional<Tensor> rows;
  if (held.way != nullptr) {
    const py::gil_scoped_release unlocked;
    rows = held.way->find(ids, cores.vec());
  }
  return (rows ? *rows : kept_ways().run(told, ids, std::nullopt, cores)).contiguous();
}

}  // namespace tensortrain

TORCH_LIBRARY_FRAGMENT(tensortrain, library) {
  library.def("multiply_by_kept_weights(Tensor x, Tensor? bias, Tensor[] cores, int n_out, str told) -> Tensor");
  library.def("rows_of_kept_tables(Tensor ids, Tensor[] cores, int n_out, str told) -> Tensor");
}

TORCH_LIBRARY_IMPL(tensortrain, CPU, library) {
  library.impl("multiply_by_kept_weights", &tensortrain::multiply_by_kept_weights);
  library.impl("rows_of_kept_tables", &tensortrain::rows_of_kept_tables);
}

// Run without gradients alone: what would record them takes longer than the products.
TORCH_LIBRARY_IMPL(tensortrain, Autograd, library) {
  library.impl("multiply_by_kept_weights", torch::CppFunction::makeFallthrough());
  library.impl("rows_of_kept_tables", torch::CppFunction::makeFallthrough());
}
