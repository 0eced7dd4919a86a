// All time steps of a recurrent layer in one call: the hidden map by a sweep over ready matrices, on plain memory.
#pragma once

#include "processor.h"
#include "room.h"
#include "small.h"
#include "threads.h"

#include <type_traits>

namespace tensortrain::recurrent {

// The last one has its gates in the order i, g, f, o.
enum class Kind : int64_t { tanh, relu, gru, lstm, sigmoid, linear, igfo };

inline int64_t gates_of(Kind kind) {
  return kind == Kind::lstm || kind == Kind::igfo ? 4 : kind == Kind::gru ? 3 : 1;
}

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

template <typename... Args>
void step_forward(Args&&... args) {
#ifdef TENSORTRAIN_RECURRENT_WIDE
  if (has_avx2()) return wide::step_forward(std::forward<Args>(args)...);
#endif
  narrow::step_forward(std::forward<Args>(args)...);
}

template <typename... Args>
void step_backward(Args&&... args) {
#ifdef TENSORTRAIN_RECURRENT_WIDE
  if (has_avx2()) return wide::step_backward(std::forward<Args>(args)...);
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

  void pack(Sizes counts) {
    count = std::move(counts);
    first.clear();
    int64_t at = 0;
    for (const auto n : count) first.push_back(at), at += n;
  }
  int64_t row(int64_t step, int64_t example) const {
    return (first.empty() ? step * step_rows : first[static_cast<size_t>(step)]) + example * stride;
  }
  int64_t examples(int64_t step) const { return count.empty() ? batch : count[static_cast<size_t>(step)]; }
  int64_t rows() const {
    return count.empty() ? n_steps * batch : first.back() + count.back();
  }
  int64_t step(int64_t k) const { return is_reversed ? n_steps - 1 - k : k; }  // the k-th that runs
};

// The hidden map, by its matrices, for up to so many rows.
template <typename T>
class Hidden {
 public:
  Hidden(const Sweep& ready, const std::vector<const T*>& matrices, int64_t most)
      : ready_(ready), matrices_(matrices), kept_(room_.take<T>(layout_of(ready, most)->size)) {}

  SmallSweep<T>& at(int64_t rows) {
    if (rows != rows_) {
      layout_ = layout_of(ready_, rows);
      sweep_at_.emplace(ready_, *layout_, matrices_, kept_);
      rows_ = rows;
    }
    return *sweep_at_;
  }

 private:
  Room room_;
  const Sweep& ready_;
  const std::vector<const T*>& matrices_;
  T* const kept_;  // fewer rows need no more
  std::shared_ptr<const Layout> layout_;
  std::optional<SmallSweep<T>> sweep_at_;
  int64_t rows_ = -1;
};

template <typename T>
T* data(const Tensor& tensor) {
  return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr;
}

// What both ways need of one call.
template <typename T>
struct Call {
  const Course& course;
  const Sweep& ready;                     // the hidden map over its matrices
  const std::vector<const T*>& matrices;
  const T* bias;                          // of the hidden map; null: none
};

// Calls part(first, last) for ranges of examples, on all threads where that pays.
template <typename Part>
void by_examples(const Course& course, const Part& part) {
  const auto threads = static_cast<int64_t>(at::get_num_threads());
  const auto work = course.rows() * course.size * gates_of(course.kind);
  on_threads(course.batch, (course.batch + threads - 1) / threads, course.batch > 1 && work > 100'000, part);
}

// What the input map gave, the states that follow each other in place, and where the outputs and what the way back takes
// go; nothing of the latter is kept where it is null.
template <typename T>
struct Steps {
  const T* x;
  T *h, *c, *out;
  Kept<T> kept;
};

template <typename T>
void forward_part(const Call<T>& call, const Steps<T>& steps, int64_t from, int64_t to) {
  const auto& course = call.course;
  const auto size = course.size, width = gates_of(course.kind) * size;
  Room room;
  Hidden<T> hidden(call.ready, call.matrices, to - from);
  T* const given = room.take<T>((to - from) * width);
  T *const h = steps.h + from * size, *const c = steps.c ? steps.c + from * size : nullptr;
  T *const kg = steps.kept.gates, *const ks = steps.kept.state;
  for (int64_t k = 0; k < course.n_steps; ++k) {
    const auto step = course.step(k), n = std::min(course.examples(step), to) - from;
    if (n <= 0) continue;
    hidden.at(n).forward(h, call.bias, given, n * width);
    for (int64_t e = 0; e < n; ++e) {
      const auto row = course.row(step, from + e);
      const Kept<T> kept{kg ? kg + row * width : nullptr, ks ? ks + row * size : nullptr};
      step_forward(course.kind, size, steps.x + row * width, static_cast<const T*>(given) + e * width, kept, h + e * size,
                   c ? c + e * size : nullptr);
      std::memcpy(steps.out + row * size, h + e * size, static_cast<size_t>(size) * sizeof(T));
    }
  }
}

// What the way back through the steps reads: gradient of the outputs (null: none), first states, outputs, what the steps
// kept. And what it leaves: gradients of what the input map (dx) and the hidden map (du) gave, the states before every
// step, gradients of the last states replaced by those of the first ones.
template <typename T>
struct StepsBack {
  const T *grad, *h0, *c0, *out;
  Kept<T> kept;
  T *dx, *du, *before, *dh, *dc;
  bool wants_first;  // gradients of the first states
};

template <typename T>
void backward_part(const Call<T>& call, const StepsBack<T>& back, int64_t from, int64_t to) {
  const auto& course = call.course;
  const auto size = course.size, width = gates_of(course.kind) * size;
  const bool is_gru = course.kind == Kind::gru;
  Room room;
  Hidden<T> hidden(call.ready, call.matrices, to - from);
  T *const of_map = room.take<T>((to - from) * width), *const through = room.take<T>((to - from) * size);
  const std::vector<T*> none(call.ready.shapes.size(), nullptr);
  T *const dh = back.dh + from * size, *const dc = back.dc ? back.dc + from * size : nullptr;
  T *const kg = back.kept.gates, *const ks = back.kept.state;
  for (int64_t k = course.n_steps; k-- > 0;) {
    const auto step = course.step(k), n = std::min(course.examples(step), to) - from;
    if (n <= 0) continue;
    for (int64_t e = 0; e < n; ++e) {
      const auto row = course.row(step, from + e);
      const bool has_earlier = k > 0 && from + e < course.examples(course.step(k - 1));
      const auto earlier = has_earlier ? course.row(course.step(k - 1), from + e) : 0;
      const T* const h_before = has_earlier ? back.out + earlier * size : back.h0 + (from + e) * size;
      const T* const c_before = !dc ? nullptr : has_earlier ? ks + earlier * size : back.c0 + (from + e) * size;
      T* const here = dh + e * size;
      if (back.grad)
        for (int64_t j = 0; j < size; ++j) here[j] += back.grad[row * size + j];
      T *const mapped = of_map + e * width, *const dx = back.dx + row * width;
      step_backward(course.kind, size, Kept<T>{kg ? kg + row * width : nullptr, ks ? ks + row * size : nullptr},
                    back.out + row * size, h_before, c_before, here, dc ? dc + e * size : nullptr, dx,
                    is_gru ? mapped : nullptr);
      if (is_gru)
        std::memcpy(back.du + row * width, mapped, static_cast<size_t>(width) * sizeof(T));
      else
        std::memcpy(mapped, dx, static_cast<size_t>(width) * sizeof(T));
      std::memcpy(back.before + row * size, h_before, static_cast<size_t>(size) * sizeof(T));
    }
    if (k == 0 && !back.wants_first) return;
    hidden.at(n).backward(nullptr, of_map, through, none);
    for (int64_t j = 0; j < n * size; ++j) dh[j] += through[j];
  }
}

}  // namespace tensortrain::recurrent
