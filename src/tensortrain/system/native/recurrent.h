// All time steps of a recurrent layer in one call: the hidden map by a sweep over ready matrices, on plain memory.
#pragma once

#include "room.h"
#include "small.h"
#include "threads.h"

#include <ATen/ops/zeros.h>

#include <type_traits>

namespace tensortrain::recurrent {

enum class Kind : int64_t { tanh, relu, gru, lstm };

inline int64_t gates_of(Kind kind) { return kind == Kind::lstm ? 4 : kind == Kind::gru ? 3 : 1; }

// What a step leaves of one example: values of the gates; the cell state (LSTM) or what the hidden map gave to the new
// state (GRU).
template <typename T>
struct Kept {
  T *gates, *state;
};

namespace narrow {
constexpr size_t register_bytes = 16;
#include "recurrent_loops.h"
}  // namespace narrow
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define TENSORTRAIN_RECURRENT_WIDE 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace wide {
constexpr size_t register_bytes = 32;
#include "recurrent_loops.h"
}  // namespace wide
#pragma GCC pop_options
#endif

inline bool has_wide() {
#ifdef TENSORTRAIN_RECURRENT_WIDE
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
#else
  return false;
#endif
}

template <typename... Args>
void step_forward(Args&&... args) {
#ifdef TENSORTRAIN_RECURRENT_WIDE
  if (has_wide()) return wide::step_forward(std::forward<Args>(args)...);
#endif
  narrow::step_forward(std::forward<Args>(args)...);
}

template <typename... Args>
void step_backward(Args&&... args) {
#ifdef TENSORTRAIN_RECURRENT_WIDE
  if (has_wide()) return wide::step_backward(std::forward<Args>(args)...);
#endif
  narrow::step_backward(std::forward<Args>(args)...);
}

// Where the examples of every step lie among all rows: padded, or packed with the longest sequences first.
struct Course {
  Kind kind;
  int64_t size, n_steps, batch;
  bool is_reversed;
  int64_t stride;      // rows from one example to the next
  Sizes first, count;  // row of the first example of a step; examples. Packed only
  int64_t step_rows;   // rows from one step to the next. Padded only

  int64_t row(int64_t step, int64_t example) const {
    return (first.empty() ? step * step_rows : first[static_cast<size_t>(step)]) + example * stride;
  }
  int64_t examples(int64_t step) const { return count.empty() ? batch : count[static_cast<size_t>(step)]; }
  int64_t rows() const {
    return count.empty() ? n_steps * batch : first.back() + count.back();
  }
  int64_t step(int64_t k) const { return is_reversed ? n_steps - 1 - k : k; }  // the k-th that runs
};

// The hidden map ready for some number of rows.
template <typename T>
class Hidden {
 public:
  Hidden(const Sweep& sweep, const Tensors& weights, int64_t most) : sweep_(sweep), weights_(weights) {
    size_t n = 0;
    for (auto rows = most; rows > 0; rows = rows > 1 ? (rows + 1) / 2 : 0)
      n = std::max(n, static_cast<size_t>(layout_of(sweep, rows)->size));
    kept_.resize(n + static_cast<size_t>(layout_of(sweep, most)->scratch));
  }

  SmallSweep<T>& at(int64_t rows) {
    if (rows != rows_) {
      layout_ = layout_of(sweep_, rows);
      if (kept_.size() < static_cast<size_t>(layout_->size)) kept_.resize(static_cast<size_t>(layout_->size));
      sweep_at_.emplace(sweep_, *layout_, weights_, kept_.data());
      rows_ = rows;
    }
    return *sweep_at_;
  }

 private:
  const Sweep& sweep_;
  const Tensors& weights_;
  std::vector<T> kept_;
  std::shared_ptr<const Layout> layout_;
  std::optional<SmallSweep<T>> sweep_at_;
  int64_t rows_ = -1;
};

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// What both ways need of one call.
struct Call {
  const Course& course;
  const Sweep& sweep;
  const Tensors& weights;
  const Tensor& bias;
};

// Calls part(first, last) for ranges of examples, on all threads where that pays.
template <typename Part>
void by_examples(const Call& call, const Part& part) {
  const auto& course = call.course;
  const auto threads = static_cast<int64_t>(at::get_num_threads());
  const auto work = course.rows() * course.size * gates_of(course.kind);
  on_threads(course.batch, (course.batch + threads - 1) / threads, course.batch > 1 && work > 100'000, part);
}

template <typename T>
void forward_part(const Call& call, const Tensor& gates, const Tensors& states, const Tensor& out, const Tensor& kept_gates,
                  const Tensor& kept_state, int64_t from, int64_t to) {
  const auto& course = call.course;
  const auto size = course.size, width = gates_of(course.kind) * size;
  Hidden<T> hidden(call.sweep, call.weights, to - from);
  std::vector<T> given(static_cast<size_t>((to - from) * width));
  T* const h = data<T>(states[0]) + from * size;
  T* const c = states.size() > 1 ? data<T>(states[1]) + from * size : nullptr;
  const T* const x = gates.const_data_ptr<T>();
  const T* const bias = call.bias.defined() ? call.bias.const_data_ptr<T>() : nullptr;
  T *const y = data<T>(out), *const kg = data<T>(kept_gates), *const ks = data<T>(kept_state);
  for (int64_t k = 0; k < course.n_steps; ++k) {
    const auto step = course.step(k), n = std::min(course.examples(step), to) - from;
    if (n <= 0) continue;
    hidden.at(n).forward(h, bias, given.data(), n * width);
    for (int64_t e = 0; e < n; ++e) {
      const auto row = course.row(step, from + e);
      const Kept<T> kept{kg ? kg + row * width : nullptr, ks ? ks + row * size : nullptr};
      step_forward(course.kind, size, x + row * width, static_cast<const T*>(given.data()) + e * width, kept,
                   h + e * size, c ? c + e * size : nullptr);
      std::memcpy(y + row * size, h + e * size, static_cast<size_t>(size) * sizeof(T));
    }
  }
}

// Gradients of what the input map gave (dx) and the hidden map (du), the states before every step, and the first states.
struct Found {
  Tensor dx, du, before;
  Tensors states;  // gradients of the last states on the way in, of the first ones on the way out
};

template <typename T>
void backward_part(const Call& call, const Tensor& grad, const Tensors& firsts, const Tensor& out, const Tensor& kept_gates,
                   const Tensor& kept_state, const Found& found, int64_t from, int64_t to) {
  const auto& course = call.course;
  const auto size = course.size, width = gates_of(course.kind) * size;
  const bool is_gru = course.kind == Kind::gru;
  Hidden<T> hidden(call.sweep, call.weights, to - from);
  std::vector<T> of_map(static_cast<size_t>((to - from) * width)), through(static_cast<size_t>((to - from) * size));
  const std::vector<T*> none(call.sweep.shapes.size(), nullptr);
  T* const dh = data<T>(found.states[0]) + from * size;
  T* const dc = found.states.size() > 1 ? data<T>(found.states[1]) + from * size : nullptr;
  const T* const dy = grad.defined() ? grad.const_data_ptr<T>() : nullptr;
  const T *const y = out.const_data_ptr<T>(), *const h0 = firsts[0].const_data_ptr<T>();
  const T* const c0 = firsts.size() > 1 ? firsts[1].const_data_ptr<T>() : nullptr;
  T *const kg = data<T>(kept_gates), *const ks = data<T>(kept_state);
  T *const dx = data<T>(found.dx), *const du = data<T>(found.du), *const before = data<T>(found.before);
  for (int64_t k = course.n_steps; k-- > 0;) {
    const auto step = course.step(k), n = std::min(course.examples(step), to) - from;
    if (n <= 0) continue;
    for (int64_t e = 0; e < n; ++e) {
      const auto row = course.row(step, from + e);
      const bool has_earlier = k > 0 && from + e < course.examples(course.step(k - 1));
      const auto earlier = has_earlier ? course.row(course.step(k - 1), from + e) : 0;
      const T* const h_before = has_earlier ? y + earlier * size : h0 + (from + e) * size;
      const T* const c_before = !dc ? nullptr : has_earlier ? ks + earlier * size : c0 + (from + e) * size;
      T* const here = dh + e * size;
      if (dy)
        for (int64_t j = 0; j < size; ++j) here[j] += dy[row * size + j];
      T* const mapped = of_map.data() + e * width;
      step_backward(course.kind, size, Kept<T>{kg ? kg + row * width : nullptr, ks ? ks + row * size : nullptr},
                    y + row * size, h_before, c_before, here, dc ? dc + e * size : nullptr, dx + row * width,
                    is_gru ? mapped : nullptr);
      const T* const source = is_gru ? mapped : dx + row * width;
      if (!is_gru) std::memcpy(mapped, source, static_cast<size_t>(width) * sizeof(T));
      if (is_gru) std::memcpy(du + row * width, mapped, static_cast<size_t>(width) * sizeof(T));
      std::memcpy(before + row * size, h_before, static_cast<size_t>(size) * sizeof(T));
    }
    hidden.at(n).backward(nullptr, of_map.data(), through.data(), none);
    for (int64_t j = 0; j < n * size; ++j) dh[j] += through[static_cast<size_t>(j)];
  }
}

}  // namespace tensortrain::recurrent
