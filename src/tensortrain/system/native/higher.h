// All time steps of a higher-order recurrent cell in one call: its gates are a train whose cores all meet the last states.
#pragma once

#include "recurrent.h"
#include "small_products.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <numeric>

namespace tensortrain::higher {

using recurrent::Kept;
using recurrent::Kind;
using Int = int64_t;

// Sizes of a call. Every core (left, 1 + n_lags size, width) meets (1, states), and what its products with them are lies
// in `columns` numbers: core after core, row after row.
struct Walk {
  Kind kind;
  Int batch, n_steps, size, n_lags;
  Int n_read;  // steps before the feed sets in
  Sizes left, width;

  size_t order() const { return left.size(); }
  Int gates() const { return recurrent::gates_of(kind) * size; }
  Int seen() const { return n_lags * size; }
  Int start(size_t p) const { return std::inner_product(left.begin(), left.begin() + static_cast<Int>(p), width.begin(), Int{0}); }
  Int head() const { return start(order() - 1); }  // columns of all cores but the last
  Int columns() const { return head() + left.back() * width.back(); }
  Int widest() const { return *std::max_element(left.begin(), left.end()); }
  // Where the states lie that so many steps before step t gave; the first ones lie before step 0.
  Int at(Int t, Int before) const { return (n_lags + t - before) * batch * size; }
};

// The cores for products with states: the narrow ones side by side, and the last one as it lies, or for many rows by
// pieces as wide as the products are, row after row: the rows of a wide matrix lie on few lines of the cache.
template <typename T>
struct Weights {
  static constexpr Int wide = 128 / sizeof(T), many = 256;
  const Walk& walk;
  std::vector<const T*> cores;
  T *head, *constants;  // (1 + seen, columns before the last core); what the 1 gives
  T* pieces = nullptr;

  Weights(const Walk& walk, const Tensors& given, Room& room)
      : walk(walk), head(room.take<T>((1 + walk.seen()) * walk.head())), constants(room.take<T>(walk.columns())) {
    for (const auto& core : given) cores.push_back(core.const_data_ptr<T>());
    const Int m = 1 + walk.seen(), n_head = walk.head();
    for (size_t p = 0; p < walk.order(); ++p)
      for (Int a = 0; a < walk.left[p]; ++a) {
        const Int at = walk.start(p) + a * walk.width[p], n_rows = p + 1 < walk.order() ? m : 0;
        const T* const from = cores[p] + a * m * walk.width[p];
        std::copy_n(from, walk.width[p], constants + at);
        for (Int i = 0; i < n_rows; ++i) std::copy_n(from + i * walk.width[p], walk.width[p], head + i * n_head + at);
      }
    if (walk.n_steps > 1 && walk.n_steps * walk.batch >= many) cut(room);
  }

  void cut(Room& room) {
    const Int seen = walk.seen(), gates = walk.gates();
    T* to = pieces = room.take<T>(walk.left.back() * seen * gates);
    for (Int a = 0; a < walk.left.back(); ++a)
      for (Int at = 0; at < gates; at += wide)
        for (Int i = 0, n = std::min(wide, gates - at); i < seen; ++i, to += n) std::copy_n(last_of(a, 0) + i * gates + at, n, to);
  }

  // Rows of a lag.
  const T* head_of(Int lag) const { return head + (1 + lag * walk.size) * walk.head(); }
  const T* last_of(Int row, Int lag) const {
    return cores.back() + (row * (1 + walk.seen()) + 1 + lag * walk.size) * walk.gates();
  }

  // Their columns (columns, size) for each lag, turned.
  const T* turned(Room& room) const {
    const Int size = walk.size, n_head = walk.head(), gates = walk.gates();
    T* const found = room.take<T>(walk.columns() * walk.seen());
    const auto turn = block_turner<T>();
    for (Int k = 0; k < walk.n_lags; ++k) {
      T* const here = found + k * walk.columns() * size;
      if (n_head) turn(size, n_head, head_of(k), n_head, here, size);
      for (Int a = 0; a < walk.left.back(); ++a) turn(size, gates, last_of(a, k), gates, here + (n_head + a * gates) * size, size);
    }
    return found;
  }
};

// What the feed adds to the gates from step `n_read` on: (state before) times `matrix` (size, gates), where `own` says so.
template <typename T>
struct Feed {
  const T *matrix, *own;  // null: there is none; of all examples alike. Own: (steps that are fed, batch)
};

// States (n_lags + n_steps, batch, size), the first ones given; c the last cells; products and kept null where nothing
// is led back.
template <typename T>
struct There {
  const T* gates;  // of the inputs: (batch, n_steps, gates)
  T *states, *c, *products;
  Kept<T> kept;
};

// The vectors between the cores, `states` behind one another; the gates where they are asked for.
template <typename T>
void follow(const Walk& walk, const T* products, T* vectors, T* gates) {
  const auto product = small_product<T>();
  if (walk.order() == 1 && gates) std::copy_n(products, walk.gates(), gates);
  const T* vector = products;
  for (size_t p = 1; p < walk.order(); ++p) {
    const bool is_last = p + 1 == walk.order();
    if (is_last && !gates) return;
    const T* const matrix = products + walk.start(p);
    T* const out = is_last ? gates : vectors;
    product(1, walk.width[p], walk.left[p], 1, &vector, walk.left[p], 1, &matrix, walk.width[p], out, walk.width[p], false);
    vector = out, vectors += walk.width[p];
  }
}

// States of step t - 1, scaled by `own` where that is given.
template <typename T>
const T* fed_states(const Walk& walk, const Feed<T>& feed, const T* states, Int t, Int from, Int n, T* scaled) {
  const T* const before = states + walk.at(t, 1) + from * walk.size;
  if (!feed.own) return before;
  const T* const own = feed.own + (t - walk.n_read) * walk.batch + from;
  for (Int e = 0; e < n; ++e)
    for (Int j = 0; j < walk.size; ++j) scaled[e * walk.size + j] = own[e] * before[e * walk.size + j];
  return scaled;
}

template <typename T>
void forward_part(const Weights<T>& weights, const Feed<T>& feed, const There<T>& there, Int from, Int to) {
  const auto& walk = weights.walk;
  const Int n = to - from, size = walk.size, gates = walk.gates(), columns = walk.columns(), n_head = walk.head();
  const auto product = small_product<T>();
  Room room;
  T *const one = there.products ? nullptr : room.take<T>(n * columns), *const given = room.take<T>(n * gates);
  T *const vectors = room.take<T>(static_cast<Int>(walk.order()) * walk.widest()), *const scaled = room.take<T>(n * size);
  const auto n_lags = static_cast<size_t>(walk.n_lags);
  std::vector<const T*> seen(n_lags), matrices(n_lags);
  for (Int t = 0; t < walk.n_steps; ++t) {
    T* const made = one ? one : there.products + (t * walk.batch + from) * columns;
    for (Int e = 0; e < n; ++e) std::copy_n(weights.constants, columns, made + e * columns);
    for (size_t k = 0; k < n_lags; ++k) seen[k] = there.states + walk.at(t, static_cast<Int>(k) + 1) + from * size;
    const auto put = [&](T* out, Int width, const T* first) {
      for (size_t k = 0; k < n_lags; ++k) matrices[k] = first + static_cast<Int>(k) * size * width;
      product(n, width, size, walk.n_lags, seen.data(), size, 1, matrices.data(), width, out, columns, true);
    };
    if (n_head) put(made, n_head, weights.head_of(0));
    for (Int a = 0; a < walk.left.back(); ++a) {
      T* const out = made + n_head + a * gates;
      if (!weights.pieces) put(out, gates, weights.last_of(a, 0));
      for (Int at = 0; weights.pieces && at < gates; at += weights.wide)
        put(out + at, std::min(weights.wide, gates - at), weights.pieces + (a * gates + at) * walk.seen());
    }
    for (Int e = 0; e < n; ++e) follow<T>(walk, made + e * columns, vectors, given + e * gates);
    if (feed.matrix && t >= walk.n_read) {
      const T* const fed = fed_states(walk, feed, static_cast<const T*>(there.states), t, from, n, scaled);
      product(n, gates, size, 1, &fed, size, 1, &feed.matrix, gates, given, gates, true);
    }
    for (Int e = 0; e < n; ++e) {
      const Int example = from + e, row = t * walk.batch + example;
      const Kept<T> kept{there.kept.gates ? there.kept.gates + row * gates : nullptr,
                         there.kept.state ? there.kept.state + row * size : nullptr};
      recurrent::step_forward(walk.kind, size, there.gates + (example * walk.n_steps + t) * gates,
                              static_cast<const T*>(given) + e * gates, kept, there.states + walk.at(t, 0) + example * size,
                              there.c ? there.c + example * size : nullptr);
    }
  }
}

// Of the way back: what the way there left, and gradients. Those of the states come in and become complete step by step;
// of the products only those of the steps at work are kept.
template <typename T>
struct Back {
  const T *products, *states, *c0, *turned, *turned_feed;
  Kept<T> kept;
  T *of_gates, *of_states, *of_c, *of_products;
  bool wants_first;  // gradients of the first states
};

// Gradients of one example's products from those of its gates.
template <typename T>
void follow_back(const Walk& walk, const T* products, const T* vectors, const T* of_gates, T* of_products, T* one, T* other) {
  const auto dot = row_dotter<T>();
  const T* arriving = of_gates;
  std::vector<const T*> behind(walk.order());  // the vector that meets each core
  for (size_t p = 1; p < walk.order(); ++p) {
    behind[p] = p == 1 ? products : vectors;
    if (p > 1) vectors += walk.left[p];
  }
  for (size_t p = walk.order(); p-- > 1;) {
    const Int at = walk.start(p), width = walk.width[p];
    for (Int a = 0; a < walk.left[p]; ++a) {
      const T factor = behind[p][a];
      T* const out = of_products + at + a * width;
      for (Int s = 0; s < width; ++s) out[s] = factor * arriving[s];
      one[a] = dot(products + at + a * width, arriving, width);
    }
    arriving = one;
    std::swap(one, other);
  }
  std::copy_n(arriving, walk.width[0], of_products);
}

// Steps `first` .. `end`, the last one first.
template <typename T>
void backward_part(const Walk& walk, const Feed<T>& feed, const Back<T>& back, Int first, Int end, Int from, Int to) {
  const Int n = to - from, size = walk.size, gates = walk.gates(), columns = walk.columns();
  const auto product = small_product<T>();
  Room room;
  T* const vectors = room.take<T>(static_cast<Int>(walk.order()) * walk.widest());
  T *const one = room.take<T>(walk.widest()), *const other = room.take<T>(walk.widest());
  T* const through = room.take<T>(n * size);
  for (Int t = end; t-- > first;) {
    T* const of_made = back.of_products + ((t - first) * walk.batch + from) * columns;
    for (Int e = 0; e < n; ++e) {
      const Int example = from + e, row = t * walk.batch + example;
      T* const of_gates = back.of_gates + (example * walk.n_steps + t) * gates;
      const Kept<T> kept{back.kept.gates ? back.kept.gates + row * gates : nullptr,
                         back.kept.state ? back.kept.state + row * size : nullptr};
      const T* const c_before = !back.of_c ? nullptr : t > 0 ? back.kept.state + (row - walk.batch) * size : back.c0 + example * size;
      recurrent::step_backward(walk.kind, size, kept, back.states + walk.at(t, 0) + example * size,
                               static_cast<const T*>(nullptr), c_before, back.of_states + walk.at(t, 0) + example * size,
                               back.of_c ? back.of_c + example * size : nullptr, of_gates, static_cast<T*>(nullptr));
      const T* const made = back.products + row * columns;
      follow<T>(walk, made, vectors, nullptr);
      follow_back<T>(walk, made, vectors, of_gates, of_made + e * columns, one, other);
    }
    if (feed.matrix && t >= walk.n_read && (t > 0 || back.wants_first)) {
      T* const out = back.of_states + walk.at(t, 1) + from * size;
      const T* const arriving = back.of_gates + (from * walk.n_steps + t) * gates;
      product(n, size, gates, 1, &arriving, walk.n_steps * gates, 1, &back.turned_feed, size, feed.own ? through : out, size,
              !feed.own);
      const T* const own = feed.own ? feed.own + (t - walk.n_read) * walk.batch + from : nullptr;
      for (Int e = 0; own && e < n; ++e)
        for (Int j = 0; j < size; ++j) out[e * size + j] += own[e] * through[e * size + j];
    }
    const T* const arriving = of_made;
    for (Int k = 0; k < walk.n_lags && (t > k || back.wants_first); ++k) {
      const T* const matrix = back.turned + k * columns * size;
      product(n, size, columns, 1, &arriving, columns, 1, &matrix, size, back.of_states + walk.at(t, k + 1) + from * size, size,
              true);
    }
  }
}

// Gradients of all weights (1 + seen, columns) and of the feed, from those of the steps `first` .. `end`.
template <typename T>
void weights_back(const Walk& walk, const Feed<T>& feed, const Back<T>& back, Int first, Int end, T* of_weights, T* of_feed,
                  bool is_large) {
  constexpr Int wide = 128 / sizeof(T);
  const Int size = walk.size, gates = walk.gates(), columns = walk.columns(), n_rows = (end - first) * walk.batch;
  const auto n_threads = is_large ? static_cast<Int>(at::get_num_threads()) : 1;
  const Int block = ((columns + n_threads - 1) / n_threads + wide - 1) / wide * wide, n_blocks = (columns + block - 1) / block;
  const auto product = small_product<T>();
  const auto add = row_adder<T>();
  on_threads(n_blocks, 1, is_large, [&](Int part, Int last_part) {
    std::vector<const T*> seen, arriving;
    for (; part < last_part; ++part) {
      const Int at = part * block, width = std::min(block, columns - at);
      for (Int row = 0; row < n_rows; ++row) add(of_weights + at, back.of_products + row * columns + at, width);
      for (Int k = 0; k < walk.n_lags; ++k) {
        seen.clear(), arriving.clear();
        for (Int t = first; t < end; ++t) {
          seen.push_back(back.states + walk.at(t, k + 1));
          arriving.push_back(back.of_products + (t - first) * walk.batch * columns + at);
        }
        product(size, width, walk.batch, end - first, seen.data(), 1, size, arriving.data(), columns,
                of_weights + (1 + k * size) * columns + at, columns, true);
      }
    }
  });
  if (!of_feed) return;
  Room room;
  T* const scaled = room.take<T>(walk.batch * size);
  for (Int t = std::max(first, walk.n_read); t < end; ++t) {
    const T* const fed = fed_states(walk, feed, back.states, t, Int{0}, walk.batch, scaled);
    const T* const arriving = back.of_gates + t * gates;
    product(size, gates, walk.batch, 1, &fed, 1, size, &arriving, walk.n_steps * gates, of_feed, gates, true);
  }
}

// -- tensors ----------------------------------------------------------------------------------------------

// Gates of the inputs (batch, n_steps, gates), first states (batch, n_lags, size) with the newest first, first cells and
// feed where there are any.
struct Given {
  Int kind, n_read;
  Tensor gates, lags;
  Bias c, feed, own;
  Tensors cores;
};

// Row after row in memory.
inline Given laid_out(Given given) {
  const at::AutoDispatchBelowADInplaceOrView below;
  for (auto* const one : {&given.gates, &given.lags}) *one = one->contiguous();
  for (auto* const one : {&given.c, &given.feed, &given.own})
    if (*one) *one = (*one)->contiguous();
  for (auto& core : given.cores) core = core.contiguous();
  return given;
}

inline Walk walk_of(const Given& given) {
  Walk walk{static_cast<Kind>(given.kind), given.gates.size(0), given.gates.size(1), given.lags.size(2), given.lags.size(1),
            given.n_read, {}, {}};
  for (const auto& core : given.cores) walk.left.push_back(core.size(0)), walk.width.push_back(core.size(2));
  return walk;
}

inline bool fits(const Given& given) {
  const auto dtype = given.gates.scalar_type();
  const auto is_fit = [&](const Tensor& tensor, at::IntArrayRef sizes) {
    return is_plain(tensor) && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.sizes() == sizes;
  };
  if ((dtype != at::kFloat && dtype != at::kDouble) || given.gates.dim() != 3 || given.lags.dim() != 3) return false;
  if (given.cores.empty() || given.gates.numel() == 0) return false;
  for (const auto& core : given.cores)
    if (core.dim() != 3) return false;
  const auto walk = walk_of(given);
  if (!is_fit(given.gates, {walk.batch, walk.n_steps, walk.gates()})) return false;
  if (!is_fit(given.lags, {walk.batch, walk.n_lags, walk.size})) return false;
  for (size_t p = 0; p < walk.order(); ++p) {
    const Int left = p == 0 ? 1 : walk.width[p - 1];
    if (!is_fit(given.cores[p], {left, 1 + walk.seen(), walk.width[p]})) return false;
  }
  const bool has_cells = recurrent::gates_of(walk.kind) > 1;
  if (walk.width.back() != walk.gates() || given.c.has_value() != has_cells) return false;
  if (has_cells && !is_fit(*given.c, {walk.batch, walk.size})) return false;
  if (given.feed && !is_fit(*given.feed, {walk.size, walk.gates()})) return false;
  return !given.own || is_fit(*given.own, {walk.n_steps - walk.n_read, walk.batch});
}

template <typename T>
Feed<T> feed_of(const Given& given) {
  return {given.feed ? given.feed->const_data_ptr<T>() : nullptr, given.own ? given.own->const_data_ptr<T>() : nullptr};
}

inline bool is_large(const Walk& walk) {
  return walk.batch > 1 && walk.n_steps * walk.batch * walk.seen() * walk.columns() > 1'000'000;
}

template <typename Part>
void by_examples(const Walk& walk, const Part& part) {
  const auto threads = static_cast<Int>(at::get_num_threads());
  on_threads(walk.batch, (walk.batch + threads - 1) / threads, is_large(walk), part);
}

// States, the last ones (batch, n_lags, size) with the newest first, last cells; and what the way back takes: gates and
// cells of all steps, products.
using Left = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// (batch, n_lags, size), the newest first, from or to states before a step.
template <typename T>
void copy_lags(const Walk& walk, const T* from, T* to, bool are_states) {
  for (Int k = 0; k < walk.n_lags; ++k)
    for (Int e = 0; e < walk.batch; ++e) {
      const Int state = (walk.n_lags - 1 - k) * walk.batch * walk.size + e * walk.size, lag = (e * walk.n_lags + k) * walk.size;
      std::copy_n(from + (are_states ? state : lag), walk.size, to + (are_states ? lag : state));
    }
}

template <typename T>
Left go(const Given& given, bool keeps) {
  const auto walk = walk_of(given);
  const auto options = given.gates.options();
  const auto states = at::empty({walk.n_lags + walk.n_steps, walk.batch, walk.size}, options);
  Tensor c, gates, cells, products;
  if (given.c) c = given.c->clone();
  if (keeps) products = at::empty({walk.n_steps, walk.batch, walk.columns()}, options);
  if (keeps && given.c) {
    gates = at::empty({walk.n_steps, walk.batch, walk.gates()}, options);
    cells = at::empty({walk.n_steps, walk.batch, walk.size}, options);
  }
  T* const at = states.mutable_data_ptr<T>();
  copy_lags<T>(walk, given.lags.const_data_ptr<T>(), at, false);
  Room room;
  const Weights<T> weights(walk, given.cores, room);
  const There<T> there{given.gates.const_data_ptr<T>(), at, recurrent::data<T>(c), recurrent::data<T>(products),
                       {recurrent::data<T>(gates), recurrent::data<T>(cells)}};
  by_examples(walk, [&](Int from, Int to) { forward_part(weights, feed_of<T>(given), there, from, to); });
  const auto last = at::empty(given.lags.sizes(), options);
  copy_lags<T>(walk, at + walk.at(walk.n_steps, walk.n_lags), last.mutable_data_ptr<T>(), true);
  return {states, last, c, gates, cells, products};
}

template <typename T>
const T* read(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// Gradients of the gates of the inputs, the first states, the first cells, the feed and the cores.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensors>;

template <typename T>
Gradients go_back(const Given& given, const Left& left, const Bias& of_states, const Bias& of_last, const Bias& of_c,
                  bool wants_first) {
  const auto walk = walk_of(given);
  const auto& [states, last, c, gates, cells, products] = left;
  const auto options = given.gates.options();
  const Int columns = walk.columns(), at_once = std::clamp<Int>((256 + walk.batch - 1) / walk.batch, 1, walk.n_steps);
  const auto of_gates = at::empty(given.gates.sizes(), options);
  const auto all_states = of_states ? of_states->clone(at::MemoryFormat::Contiguous) : at::zeros(states.sizes(), options);
  if (of_last) all_states.narrow(0, walk.n_steps, walk.n_lags).add_(of_last->transpose(0, 1).flip(0));
  Tensor cells_back, of_feed;
  if (given.c) cells_back = of_c ? of_c->clone(at::MemoryFormat::Contiguous) : at::zeros(given.c->sizes(), options);
  if (given.feed) of_feed = at::zeros(given.feed->sizes(), options);
  Room room;
  const Weights<T> weights(walk, given.cores, room);
  T *const of_products = room.take<T>(at_once * walk.batch * columns), *const of_weights = room.take<T>((1 + walk.seen()) * columns);
  std::fill_n(of_weights, (1 + walk.seen()) * columns, T(0));
  const auto feed = feed_of<T>(given);
  T* turned_feed = nullptr;
  if (feed.matrix) {
    turned_feed = room.take<T>(walk.size * walk.gates());
    block_turner<T>()(walk.size, walk.gates(), feed.matrix, walk.gates(), turned_feed, walk.size);
  }
  const Back<T> back{products.const_data_ptr<T>(), states.const_data_ptr<T>(), given.c ? given.c->const_data_ptr<T>() : nullptr,
                     weights.turned(room), turned_feed, {recurrent::data<T>(gates), recurrent::data<T>(cells)},
                     of_gates.mutable_data_ptr<T>(), all_states.mutable_data_ptr<T>(), recurrent::data<T>(cells_back),
                     of_products, wants_first};
  for (Int end = walk.n_steps; end > 0; end -= at_once) {
    const Int first = std::max<Int>(end - at_once, 0);
    by_examples(walk, [&](Int from, Int to) { backward_part(walk, feed, back, first, end, from, to); });
    weights_back(walk, feed, back, first, end, of_weights, recurrent::data<T>(of_feed), is_large(walk));
  }
  Tensors of_cores;
  const Int m = 1 + walk.seen();
  for (size_t p = 0; p < walk.order(); ++p) {
    of_cores.push_back(at::empty(given.cores[p].sizes(), options));
    T* const out = of_cores.back().template mutable_data_ptr<T>();
    for (Int a = 0; a < walk.left[p]; ++a)
      for (Int i = 0; i < m; ++i)
        std::copy_n(of_weights + i * columns + walk.start(p) + a * walk.width[p], walk.width[p], out + (a * m + i) * walk.width[p]);
  }
  Tensor of_lags;
  if (wants_first) of_lags = all_states.narrow(0, 0, walk.n_lags).flip(0).transpose(0, 1);
  return {of_gates, of_lags, cells_back, of_feed, of_cores};
}

inline std::optional<Left> there(Int kind, Int n_read, const Tensor& gates, const Tensor& lags, const Bias& c, const Bias& feed,
                                 const Bias& own, const Tensors& cores, bool keeps) {
  const auto given = laid_out({kind, n_read, gates, lags, c, feed, own, cores});
  if (!fits(given)) return std::nullopt;
  const pybind11::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  return gates.scalar_type() == at::kFloat ? go<float>(given, keeps) : go<double>(given, keeps);
}

inline Gradients back(Int kind, Int n_read, const Tensor& gates, const Tensor& lags, const Bias& c, const Bias& feed,
                      const Bias& own, const Tensors& cores, const Tensors& left, const Bias& of_states, const Bias& of_last,
                      const Bias& of_c, bool wants_first) {
  const auto given = laid_out({kind, n_read, gates, lags, c, feed, own, cores});
  TORCH_CHECK(fits(given) && left.size() >= 2, "what was kept must be as it was");
  const pybind11::gil_scoped_release unlocked;
  const at::AutoDispatchBelowADInplaceOrView below;
  const Left parts{left[0], {}, {}, left.size() > 2 ? left[2] : Tensor(), left.size() > 2 ? left[3] : Tensor(), left[1]};
  return gates.scalar_type() == at::kFloat ? go_back<float>(given, parts, of_states, of_last, of_c, wants_first)
                                           : go_back<double>(given, parts, of_states, of_last, of_c, wants_first);
}

inline void bind(pybind11::module_& m) {
  m.def("higher_there", &there);
  m.def("higher_back", &back);
}

}  // namespace tensortrain::higher
