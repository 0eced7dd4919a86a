// Many small products with few distinct right sides: the loops of grouped.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mm.h>

#include <atomic>
#include <vector>

namespace tensortrain {

// Calls work(k, first row, rows) for every group that has rows. Groups differ in size, so threads take them as they
// come; a product inside a thread is that thread's alone. Built without OpenMP, as now, this is a plain loop.
template <typename Work>
void for_groups(const std::vector<int64_t>& counts, const Work& work) {
  std::vector<int64_t> starts;
  int64_t total = 0;
  for (const auto count : counts) {
    starts.push_back(total);
    total += count;
  }
  const auto n_groups = static_cast<int64_t>(counts.size());
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t k = next++; k < n_groups; k = next++)
      if (counts[k] > 0) work(k, starts[k], counts[k]);
  });
}

inline at::Tensor rows_of(const at::Tensor& tensor, int64_t start, int64_t n) {
  return tensor.narrow(0, start, n).reshape({-1, tensor.size(2)});
}

// The first counts[0] states (lead, r) times table[0] (r, w), the next counts[1] times table[1], and so on.
inline void multiply_groups(const at::Tensor& states, const at::Tensor& table, const std::vector<int64_t>& counts,
                            const at::Tensor& out) {
  for_groups(counts, [&](int64_t k, int64_t start, int64_t n) {
    auto into = rows_of(out, start, n);
    at::mm_out(into, rows_of(states, start, n), table[k]);
  });
}

// out[k], of zeros, becomes the gradient of table[k]: the group's states, transposed, times its gradients.
inline void multiply_groups_backward(const at::Tensor& states, const at::Tensor& grad,
                                     const std::vector<int64_t>& counts, const at::Tensor& out) {
  for_groups(counts, [&](int64_t k, int64_t start, int64_t n) {
    auto into = out[k];
    at::mm_out(into, rows_of(states, start, n).t(), rows_of(grad, start, n));
  });
}

}  // namespace tensortrain
