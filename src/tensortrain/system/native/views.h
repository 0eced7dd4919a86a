// Views of plain tensors at the price of an allocation. Products of small layers take less time than torch's dispatch
// of the reshapes and transposes between them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <vector>

namespace tensortrain {

using at::Tensor;
using Sizes = std::vector<int64_t>;

// A strided CPU tensor and nothing else: no subclass, no wrapper of a transform, no lazy conjugate.
inline bool has_plain_keys(const Tensor& tensor) {
  static const auto of_gradients =
      c10::autograd_dispatch_keyset | c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView);
  static const auto plain = [] {
    const c10::InferenceMode off(false);
    return at::detail::empty_cpu({0}, at::kFloat).key_set() | of_gradients;
  }();
  return (tensor.key_set() | of_gradients) == plain;
}

// Whether no mode, tracer or transform listens to the operations of a thread.
inline bool is_unheard(const c10::impl::LocalDispatchKeySet& keys) {
  static const auto usual = c10::DispatchKeySet({c10::DispatchKey::BackendSelect, c10::DispatchKey::ADInplaceOrView});
  return (keys.included_ - usual).empty();
}

// Whether nobody but the CPU's own functions would see an operation on this tensor.
inline bool is_unseen(const Tensor& tensor) {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return keys.excluded_.isSupersetOf(c10::autograd_dispatch_keyset_with_ADInplaceOrView) && is_unheard(keys) &&
         has_plain_keys(tensor);
}

inline Tensor strided(const Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(tensor.storage()),
                                                       tensor.key_set(), tensor.dtype());
  auto* const impl = view.unsafeGetTensorImpl();
  impl->set_storage_offset(tensor.storage_offset());
  impl->set_sizes_and_strides(sizes, strides);
  return view;
}

inline Tensor shaped(const Tensor& tensor, at::IntArrayRef sizes) {
  if (tensor.sizes() == sizes) return tensor;
  if (!is_unseen(tensor)) return tensor.reshape(sizes);
  const auto whole = tensor.contiguous();
  c10::SmallVector<int64_t, 6> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = sizes.size(); k-- > 0; stride *= sizes[k]) strides[k] = stride;
  return strided(whole, sizes, strides);
}

inline Tensor permuted(const Tensor& tensor, std::initializer_list<int64_t> order) {
  if (!is_unseen(tensor)) return tensor.permute(order);
  c10::SmallVector<int64_t, 6> sizes, strides;
  for (const auto k : order) {
    sizes.push_back(tensor.size(k));
    strides.push_back(tensor.stride(k));
  }
  return strided(tensor, sizes, strides);
}

inline Tensor transposed(const Tensor& matrix) { return permuted(matrix, {1, 0}); }

// One matrix as a batch of n, without copies.
inline Tensor repeated(const Tensor& matrix, int64_t n) {
  if (!is_unseen(matrix)) return matrix.unsqueeze(0).expand({n, matrix.size(0), matrix.size(1)});
  return strided(matrix, {n, matrix.size(0), matrix.size(1)}, {0, matrix.stride(0), matrix.stride(1)});
}

}  // namespace tensortrain
