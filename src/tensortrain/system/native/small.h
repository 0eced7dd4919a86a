// Sweeps over small layers: the steps of sweep.h on plain memory. Their products take less time than a tensor each.
#pragma once

#include "blas.h"
#include "sweep.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cstring>
#include <map>
#include <memory>

namespace tensortrain {

// Above so many operations, or numbers held between the steps, the price of tensors no longer shows.
constexpr int64_t small_flops = 4'000'000, small_numbers = 1 << 19;

// Where everything of one call lies in its memory, for so many rows.
struct Layout {
  struct Pair {
    int64_t left, right, product;  // offsets of merged runs; an input of the step has offset -1 - its number
    int64_t l[4], r[4];            // their sizes
  };
  struct Part {
    int64_t m, n, lead, width;           // matrix (m, n) times states (lead, n, width)
    int64_t mode, rank, i, p;            // as in Cut
    int64_t core[4];                     // of the merged core
    int64_t operand, matrix, product;    // offsets; operand -1: what the step before left, or the input
    std::vector<Pair> pairs;
    bool batched, copied, is_core;       // is_core: the matrix is the only core as it lies
    int64_t in() const { return lead * n * width; }
    int64_t out() const { return lead * m * width; }
  };
  std::vector<Part> parts;
  int64_t size = 0;        // numbers kept for the way back
  int64_t scratch = 0;     // the largest that any step needs beside
  int64_t flops = 0;

  Layout(const Sweep& sweep, int64_t rows) {
    int64_t state[3] = {sweep.leftward ? rows * sweep.in_features : rows, 1, sweep.leftward ? 1 : sweep.in_features};
    for (size_t k = 0; k < sweep.steps.size(); ++k) {
      parts.push_back(part_of(sweep, sweep.steps[k], state));
      auto& part = parts.back();
      part.operand = part.copied ? take(part.in()) : -1;
      part.product = k + 1 < sweep.steps.size() ? take(part.out()) : -1;
      scratch = std::max({scratch, part.in(), part.out(), part.m * part.n});
      flops += 2 * part.m * part.n * part.lead * part.width;
      state[0] = part.lead, state[1] = part.m, state[2] = part.width;
    }
  }

 private:
  int64_t take(int64_t n) {
    const auto at = size;
    size += (n + 15) / 16 * 16;
    return at;
  }

  Part part_of(const Sweep& sweep, const Step& step, const int64_t (&state)[3]) {
    Part part{};
    const Cut cut({state[0], state[1], state[2]}, step, sweep.leftward);
    part.lead = cut.lead, part.width = cut.width, part.i = cut.i, part.p = cut.p;
    part.mode = step.mode, part.rank = step.rank, part.n = step.mode * step.rank;
    part.batched = step.is_batched();
    part.copied = !part.batched && cut.width > 1;
    place_weight(part, sweep, step);
    return part;
  }

  void place_weight(Part& part, const Sweep& sweep, const Step& step) {
    if (sweep.ready) {
      part.m = sweep.shapes[step.start][0];
      part.is_core = true;
      part.matrix = -1 - step.start;
      return;
    }
    std::vector<Sizes> runs(sweep.shapes.begin() + step.start, sweep.shapes.begin() + step.stop);
    Sizes at(runs.size());
    for (size_t k = 0; k < runs.size(); ++k) at[k] = -1 - (step.start + static_cast<int64_t>(k));
    for (const auto& merge : step.merges) {
      const auto &l = runs[merge.start], &r = runs[merge.middle];
      Pair pair{at[merge.start], at[merge.middle], 0, {l[0], l[1], l[2], l[3]}, {r[0], r[1], r[2], r[3]}};
      const auto numel = l[0] * l[1] * l[2] * r[1] * r[2] * r[3];
      pair.product = take(numel);
      scratch = std::max(scratch, numel);
      flops += 2 * numel * l[3];
      part.pairs.push_back(pair);
      runs[merge.start] = {l[0], l[1] * r[1], l[2] * r[2], r[3]};
      at[merge.start] = pair.product;
    }
    const auto& s = runs[0];
    std::copy(s.begin(), s.end(), part.core);
    part.m = sweep.leftward ? s[0] * s[1] : s[1] * s[3];
    part.is_core = sweep.leftward;
    part.matrix = sweep.leftward ? at[0] : take(s[0] * s[1] * s[2] * s[3]);
    if (!sweep.leftward) part.pairs.push_back({at[0], 0, -1, {s[0], s[1], s[2], s[3]}, {}});  // laid out anew
  }
};

// to (a, c, b, d) from (a, b, c, d).
template <typename T>
void swap_middle(T* to, const T* from, int64_t a, int64_t b, int64_t c, int64_t d) {
  if (b == 1 || c == 1) {
    std::memcpy(to, from, static_cast<size_t>(a * b * c * d) * sizeof(T));
    return;
  }
  for (int64_t x = 0; x < a; ++x, from += b * c * d)
    for (int64_t z = 0; z < c; ++z)
      for (int64_t y = 0; y < b; ++y, to += d) {
        const T* const source = from + (y * c + z) * d;
        for (int64_t w = 0; w < d; ++w) to[w] = source[w];
      }
}

// Memory that holds nothing yet.
template <typename T>
std::unique_ptr<T[]> room_for(int64_t n) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(n)]);
}

// The memory of one small sweep at work.
template <typename T>
class SmallSweep {
  using Room = std::unique_ptr<T[]>;

 public:
  SmallSweep(const Sweep& sweep, const Layout& layout, const Tensors& tensors, T* kept)
      : sweep_(sweep), layout_(layout), kept_(kept) {
    for (const auto& tensor : tensors) given_.push_back(tensor.template const_data_ptr<T>());
  }
  SmallSweep(const Sweep& sweep, const Layout& layout, std::vector<const T*> given, T* kept)
      : sweep_(sweep), layout_(layout), kept_(kept), given_(std::move(given)) {}

  void forward(const T* x, const T* bias, T* y, int64_t n_numbers) {
    merge();
    multiply_all(x, bias, y, n_numbers);
  }

  // The matrices of all steps, made of the cores.
  void merge() {
    for (const auto& part : layout_.parts) make_matrix(part);
  }

  // Where they lie then.
  std::vector<const T*> matrices() const {
    std::vector<const T*> found;
    for (const auto& part : layout_.parts) found.push_back(at(part.matrix));
    return found;
  }

  // The products by these matrices.
  void multiply_all(const T* x, const T* bias, T* y, int64_t n_numbers) {
    const auto& parts = layout_.parts;
    const T* state = x;
    for (size_t k = 0; k < parts.size(); ++k) {
      const auto& part = parts[k];
      T* const out = part.product < 0 ? y : kept_ + part.product;
      state = part.copied ? copied_operand(part, state) : state;
      multiply(part, state, out);
      state = out;
    }
    if (bias)
      for (int64_t at = 0; at < n_numbers; at += sweep_.out_features)
        for (int64_t k = 0; k < sweep_.out_features; ++k) y[at + k] += bias[k];
  }

  // Gradients of what is wanted: null pointers of the others. `kept` holds what forward left.
  void backward(const T* x, const T* grad_y, T* grad_x, const std::vector<T*>& grads) {
    for (auto* const room : {&now_, &next_, &turned_})
      if (!*room) *room = room_for<T>(layout_.scratch);
    const T* arriving = grad_y;
    for (size_t k = layout_.parts.size(); k-- > 0;) {
      const auto& part = layout_.parts[k];
      const T* const operand = part.copied ? kept_ + part.operand : k == 0 ? x : kept_ + layout_.parts[k - 1].product;
      arriving = arrived(part, arriving);
      if (any_wanted(k, grads)) weight_backward(part, arriving, operand, sweep_.steps[k], grads);
      if (k == 0 && !grad_x) return;
      if (k > 0 && !grad_x && !any_wanted_before(k, grads)) return;
      operand_backward(part, arriving, k == 0 ? grad_x : now_.get());
      std::swap(now_, next_);
      arriving = next_.get();
    }
  }

 private:
  const T* at(int64_t offset) const { return offset < 0 ? given_[static_cast<size_t>(-1 - offset)] : kept_ + offset; }

  T* scratch() {
    if (!scratch_) scratch_ = room_for<T>(layout_.scratch);
    return scratch_.get();
  }

  // modes (i i2 j j2) of a merged pair, from (i j i2 j2)
  void make_matrix(const Layout::Part& part) {
    for (const auto& pair : part.pairs) {
      const auto &l = pair.l, &r = pair.r;
      if (pair.product < 0) {  // (i s, r j) from (r, i, j, s)
        lay_out(kept_ + part.matrix, at(pair.left), l);
        continue;
      }
      const auto rows = l[0] * l[1] * l[2], columns = r[1] * r[2] * r[3];
      T* const out = kept_ + pair.product;
      const bool in_order = l[2] == 1 || r[1] == 1;
      T* const raw = in_order ? out : scratch();
      multiply_into<T>(raw, columns, {at(pair.left), l[3]}, {at(pair.right), columns}, rows, columns, l[3]);
      if (!in_order) swap_middle(out, raw, l[0] * l[1], l[2], r[1], r[2] * r[3]);
    }
  }

  static void lay_out(T* to, const T* core, const int64_t (&s)[4]) {
    for (int64_t i = 0; i < s[1]; ++i)
      for (int64_t e = 0; e < s[3]; ++e)
        for (int64_t r = 0; r < s[0]; ++r) {
          const T* from = core + ((r * s[1] + i) * s[2]) * s[3] + e;
          for (int64_t j = 0; j < s[2]; ++j) *to++ = from[j * s[3]];
        }
  }

  static void lay_back(T* core, const T* from, const int64_t (&s)[4]) {
    for (int64_t i = 0; i < s[1]; ++i)
      for (int64_t e = 0; e < s[3]; ++e)
        for (int64_t r = 0; r < s[0]; ++r) {
          T* const to = core + ((r * s[1] + i) * s[2]) * s[3] + e;
          for (int64_t j = 0; j < s[2]; ++j) to[j * s[3]] = *from++;
        }
  }

  // (lead, i, p, mode, rank) from (lead, mode, rank, i, p); rightward (lead, p, rank, mode) from (lead, rank, mode, p)
  const T* copied_operand(const Layout::Part& part, const T* state) {
    T* const to = kept_ + part.operand;
    swap_middle(to, state, part.lead, part.n, part.width, int64_t{1});
    return to;
  }

  void multiply(const Layout::Part& part, const T* operand, T* out) {
    const T* const matrix = at(part.matrix);
    if (part.batched) {
      for (int64_t b = 0; b < part.lead; ++b)
        multiply_into<T>(out + b * part.m * part.width, part.width, {matrix, part.n},
                         {operand + b * part.n * part.width, part.width}, part.m, part.width, part.n);
      return;
    }
    const auto rows = part.lead * part.width;
    T* const raw = part.width > 1 ? scratch() : out;
    multiply_into<T>(raw, part.m, {operand, part.n}, {matrix, part.n, true}, rows, part.m, part.n);
    if (part.width > 1) swap_middle(out, raw, part.lead, part.width, part.m, int64_t{1});
  }

  // The gradient that arrives, laid out as the product made it.
  const T* arrived(const Layout::Part& part, const T* grad) {
    if (part.batched || part.width == 1) return grad;
    swap_middle(turned_.get(), grad, part.lead, part.m, part.width, int64_t{1});
    return turned_.get();
  }

  void operand_backward(const Layout::Part& part, const T* grad, T* to) {
    const T* const matrix = at(part.matrix);
    if (part.batched) {
      for (int64_t b = 0; b < part.lead; ++b)
        multiply_into<T>(to + b * part.n * part.width, part.width, {matrix, part.n, true},
                         {grad + b * part.m * part.width, part.width}, part.n, part.width, part.m);
      return;
    }
    const auto rows = part.lead * part.width;
    if (part.width == 1) {
      multiply_into<T>(to, part.n, {grad, part.m}, {matrix, part.n}, rows, part.n, part.m);
      return;
    }
    multiply_into<T>(scratch(), part.n, {grad, part.m}, {matrix, part.n}, rows, part.n, part.m);
    swap_middle(to, scratch(), part.lead, part.width, part.n, int64_t{1});
  }

  void weight_backward(const Layout::Part& part, const T* grad, const T* operand, const Step& step,
                       const std::vector<T*>& grads) {
    const bool is_plain = part.pairs.empty();
    auto own = is_plain ? Room() : room_for<T>(part.m * part.n);
    T* const of_matrix = is_plain ? grads[static_cast<size_t>(step.start)] : own.get();
    if (part.batched) {
      for (int64_t b = 0; b < part.lead; ++b)
        multiply_into<T>(of_matrix, part.n, {grad + b * part.m * part.width, part.width},
                         {operand + b * part.n * part.width, part.width, true}, part.m, part.n, part.width,
                         T(b > 0 ? 1 : 0));
    } else {
      multiply_into<T>(of_matrix, part.n, {grad, part.m, true}, {operand, part.n}, part.m, part.n,
                       part.lead * part.width);
    }
    if (!is_plain) unmerge(part, std::move(own), grads);
  }

  void unmerge(const Layout::Part& part, Room whole, const std::vector<T*>& grads) {
    std::map<int64_t, Room> of_runs;  // gradients by offset
    auto last = part.pairs.rbegin();
    if (last->product < 0) {
      if (last->left < 0) {
        if (T* const to = gradient_of(last->left, grads)) lay_back(to, whole.get(), last->l);
        return;
      }
      auto core = room_for<T>(part.m * part.n);
      lay_back(core.get(), whole.get(), last->l);
      of_runs[last->left] = std::move(core);
      ++last;
    } else {
      of_runs[last->product] = std::move(whole);
    }
    for (; last != part.pairs.rend(); ++last) {
      const auto grad = std::move(of_runs[last->product]);
      pair_backward(*last, grad.get(), grads, of_runs);
    }
  }

  void pair_backward(const Layout::Pair& pair, const T* grad, const std::vector<T*>& grads,
                     std::map<int64_t, Room>& of_runs) {
    const auto &l = pair.l, &r = pair.r;
    const auto rows = l[0] * l[1] * l[2], columns = r[1] * r[2] * r[3];
    if (l[2] > 1 && r[1] > 1) {
      swap_middle(scratch(), grad, l[0] * l[1], r[1], l[2], r[2] * r[3]);
      grad = scratch();
    }
    const auto place = [&](int64_t offset, int64_t n) {
      if (offset < 0) return gradient_of(offset, grads);
      return (of_runs[offset] = room_for<T>(n)).get();
    };
    if (T* const left = place(pair.left, rows * l[3]))
      multiply_into<T>(left, l[3], {grad, columns}, {at(pair.right), columns, true}, rows, l[3], columns);
    if (T* const right = place(pair.right, l[3] * columns))
      multiply_into<T>(right, columns, {at(pair.left), l[3], true}, {grad, columns}, l[3], columns, rows);
  }

  static T* gradient_of(int64_t offset, const std::vector<T*>& grads) { return grads[static_cast<size_t>(-1 - offset)]; }

  bool any_wanted(size_t k, const std::vector<T*>& grads) const {
    const auto& step = sweep_.steps[k];
    return std::any_of(grads.begin() + step.start, grads.begin() + step.stop, [](T* one) { return one != nullptr; });
  }
  bool any_wanted_before(size_t k, const std::vector<T*>& grads) const {
    for (size_t j = 0; j < k; ++j)
      if (any_wanted(j, grads)) return true;
    return false;
  }

  const Sweep& sweep_;
  const Layout& layout_;
  T* kept_;
  std::vector<const T*> given_;
  Room scratch_, turned_, now_, next_;
};

// -- calls ------------------------------------------------------------------------------------------

// Layouts that this thread has used last: one takes longer to make than a small product.
inline std::shared_ptr<const Layout> layout_of(const Sweep& sweep, int64_t rows) {
  struct Entry {
    const Sweep* sweep = nullptr;  // sweeps stay for as long as the process, see module.cpp
    int64_t rows = 0;
    std::shared_ptr<const Layout> layout;
  };
  thread_local std::array<Entry, 64> known;
  auto& entry = known[(reinterpret_cast<uintptr_t>(&sweep) / 64 + static_cast<uintptr_t>(rows)) % known.size()];
  if (entry.sweep != &sweep || entry.rows != rows) entry = {&sweep, rows, std::make_shared<const Layout>(sweep, rows)};
  return entry.layout;
}

// The layout of a call that is small; null where tensors carry it. `tensors` and x are plain and fit the sweep.
inline std::shared_ptr<const Layout> small_layout(const Sweep& sweep, const Tensor& x) {
  const auto dtype = x.scalar_type();
  if (!has_blas() || (dtype != at::kFloat && dtype != at::kDouble)) return nullptr;
  const auto rows = x.numel() / sweep.in_features;
  if (rows * std::max(sweep.in_features, sweep.out_features) > small_numbers) return nullptr;
  auto layout = layout_of(sweep, rows);
  const bool is_small = layout->flops <= small_flops && layout->size <= small_numbers && layout->scratch <= small_numbers;
  return is_small ? layout : nullptr;
}

inline Tensors contiguous_all(at::TensorList tensors) {
  Tensors found;
  found.reserve(tensors.size());
  for (const auto& tensor : tensors) found.push_back(tensor.is_contiguous() ? tensor : tensor.contiguous());
  return found;
}

template <typename T>
void small_forward(const Sweep& sweep, const Layout& layout, const Tensor& x, const Tensors& tensors, const Tensor& bias,
                   T* kept, Tensor& y) {
  SmallSweep<T>(sweep, layout, tensors, kept)
      .forward(x.const_data_ptr<T>(), bias.defined() ? bias.const_data_ptr<T>() : nullptr, y.mutable_data_ptr<T>(),
               y.numel());
}

// Without gradients. Nothing is kept.
inline Tensor small_product(const Sweep& sweep, const Layout& layout, const Tensor& x, at::TensorList tensors,
                            const Bias& bias) {
  const auto input = x.contiguous(), added = bias ? bias->contiguous() : Tensor();
  const auto given = contiguous_all(tensors);
  auto y = at::empty(sizes_with(x, sweep.out_features), x.options());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto kept = room_for<T>(layout.size);
    small_forward<T>(sweep, layout, input, given, added, kept.get(), y);
  };
  x.scalar_type() == at::kFloat ? run(0.0f) : run(0.0);
  return y;
}

struct SmallSweepFunction : torch::autograd::Function<SmallSweepFunction> {
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* ctx, const c10::intrusive_ptr<Sweep>& sweep, const Tensor& x, const Bias& bias,
                        at::TensorList tensors) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto layout = layout_of(*sweep, x.numel() / sweep->in_features);
    const auto input = x.contiguous(), added = bias ? bias->contiguous() : Tensor();
    const auto given = contiguous_all(tensors);
    auto y = at::empty(sizes_with(x, sweep->out_features), x.options());
    auto kept = at::empty({layout->size}, x.options());
    x.scalar_type() == at::kFloat
        ? small_forward<float>(*sweep, *layout, input, given, added, kept.mutable_data_ptr<float>(), y)
        : small_forward<double>(*sweep, *layout, input, given, added, kept.mutable_data_ptr<double>(), y);
    Tensors saved{any_requires_grad(tensors) ? x : Tensor()};  // frozen cores: gradients do not depend on it
    saved.insert(saved.end(), tensors.begin(), tensors.end());
    saved.push_back(std::move(kept));
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["course"] = Sizes{reinterpret_cast<int64_t>(sweep.get()), bias.has_value()};
    return y;
  }

  static Tensors backward(Context* ctx, Tensors grads) {
    const auto course = ctx->saved_data["course"].toIntVector();
    const auto& sweep = *reinterpret_cast<const Sweep*>(course[0]);
    if (!grads[0].defined()) return Tensors(3 + sweep.shapes.size());
    const auto saved = ctx->get_saved_variables();
    const size_t n_leading = course[1] ? 2 : 1;  // x and bias, before the cores
    SweepFunction::Needs needs{ctx->needs_input_grad(0), course[1] && ctx->needs_input_grad(1), {}};
    for (size_t k = 0; k < sweep.shapes.size(); ++k) needs.tensors.push_back(ctx->needs_input_grad(n_leading + k));
    const at::TensorList tensors(saved.data() + 1, sweep.shapes.size());
    auto found = is_unread(grads[0], saved) ? by_tensors(sweep, saved[0], tensors, grads[0], needs)
                                            : by_memory(sweep, saved, tensors, grads[0], needs);
    found.insert(found.begin(), Tensor());  // the sweep itself
    return found;
  }

 private:
  // Whether gradients that have gradients are wanted, or somebody else looks on.
  static bool is_unread(const Tensor& grad, const Tensors& saved) {
    if (c10::GradMode::is_enabled() || !is_unheard(c10::impl::tls_local_dispatch_key_set())) return true;
    if (!has_plain_keys(grad) || grad._fw_grad(0).defined() || grad.scalar_type() != saved.back().scalar_type())
      return true;
    return !std::all_of(saved.begin(), saved.end(), [](const Tensor& one) { return !one.defined() || has_plain_keys(one); });
  }

  static Tensors by_tensors(const Sweep& sweep, const Tensor& x, at::TensorList tensors, const Tensor& grad,
                            const SweepFunction::Needs& needs) {
    return c10::GradMode::is_enabled() ? SweepFunction::again(sweep, x, tensors, grad, needs)
                                       : SweepFunction::first_again(sweep, x, tensors, grad, needs);
  }

  static Tensors by_memory(const Sweep& sweep, const Tensors& saved, at::TensorList tensors, const Tensor& grad_y,
                           const SweepFunction::Needs& needs) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const auto layout = layout_of(sweep, grad_y.numel() / sweep.out_features);
    const auto grad = grad_y.contiguous(), x = saved[0].defined() ? saved[0].contiguous() : Tensor();
    const auto given = contiguous_all(tensors);
    Tensors found{needs.x ? at::empty(sizes_with(grad_y, sweep.in_features), grad.options()) : Tensor(),
                  needs.bias ? summed_rows(grad) : Tensor()};
    for (size_t k = 0; k < needs.tensors.size(); ++k)
      found.push_back(needs.tensors[k] ? at::empty(sweep.shapes[k], grad.options()) : Tensor());
    grad.scalar_type() == at::kFloat ? fill<float>(sweep, *layout, x, given, saved.back(), grad, found)
                                     : fill<double>(sweep, *layout, x, given, saved.back(), grad, found);
    return found;
  }

  template <typename T>
  static void fill(const Sweep& sweep, const Layout& layout, const Tensor& x, const Tensors& given, const Tensor& kept,
                   const Tensor& grad, Tensors& found) {
    const auto place = [](Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr<T>() : nullptr; };
    std::vector<T*> grads;
    for (size_t k = 2; k < found.size(); ++k) grads.push_back(place(found[k]));
    // what forward left is only read
    SmallSweep<T>(sweep, layout, given, const_cast<T*>(kept.const_data_ptr<T>()))
        .backward(x.defined() ? x.const_data_ptr<T>() : nullptr, grad.const_data_ptr<T>(), place(found[0]), grads);
  }
};

}  // namespace tensortrain
