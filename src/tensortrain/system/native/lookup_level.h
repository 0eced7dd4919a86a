// One core on the way for all nodes of a level: their states, and back.
#pragma once

#include "lookup_way.h"

namespace tensortrain {

// Some nodes of one digit.
struct Chunk {
  int64_t digit;
  const int64_t* nodes;
  int64_t n;
  bool is_alone;  // no other node has its digit
};

template <typename T>
class LevelProducts {
 public:
  LevelProducts(const Way& way, size_t g, const Tree& tree, const Grid<const T>& core)
      : stop_(way.stops[g]), from_last_(way.is_from_last), level_(tree.levels[g]), by_(level_, stop_.n_digits),
        core_(core) {
    for (int64_t digit = 0; digit < stop_.n_digits; ++digit)
      if (by_.starts[digit] < by_.starts[digit + 1]) met_.push_back(digit);
    const auto most = stacks() ? 48 / stop_.before : int64_t{16};
    for (const auto digit : met_) {
      const auto first = by_.starts[digit], last = by_.starts[digit + 1];
      for (auto at = first; at < last; at += most)
        chunks_.push_back({digit, by_.nodes.data() + at, std::min(most, last - at), last == first + 1});
    }
  }

  // States of nodes, from those of their parents.
  void states(const T* const* parents, T* const* out) const {
    over_chunks(stop_.inner * apart_for<T>(stop_.wide()), &LevelProducts::pack, !from_last_,
                [&](const auto& chunk, const T* slice) { states_of(chunk, slice, parents, out); });
  }

  // Gradients of the states before, one for each node, one after the other.
  void back(const T* const* grads, T* out) const {
    over_chunks(stop_.wide() * apart_for<T>(stop_.inner), &LevelProducts::pack_turned, from_last_,
                [&](const auto& chunk, const T* slice) { back_of(chunk, slice, grads, out); });
  }

  // The gradient of the core, of its digits met: put there, or added.
  void slices(const T* const* parents, const T* const* grads, const Grid<T>& out, bool adds) const {
    const auto n_met = static_cast<int64_t>(met_.size()), n_threads = int64_t{at::get_num_threads()};
    // The rows of few slices are divided among the threads.
    const auto n_rows = from_last_ ? stop_.wide() : stop_.inner;
    const auto n_parts = is_large() && n_met < 2 * n_threads ? std::min(n_threads, n_rows / 16 + 1) : int64_t{1};
    const auto part = (n_rows + n_parts - 1) / n_parts;
    on_threads(n_met * n_parts, 1, is_large(), [&](int64_t first, int64_t last) {
      Terms terms;
      for (auto at = first; at < last; ++at) {
        const auto start = at % n_parts * part, n = std::min(part, n_rows - start);
        terms.take(*this, met_[at / n_parts], parents, grads);
        if (n > 0) from_last_ ? slice_from_last(terms, start, n, out, adds) : slice_from_first(terms, start, n, out, adds);
      }
    });
  }

  const Digits& met() const { return met_; }

 private:
  // Products with fewer columns than two of the longest vectors have idle units.
  static constexpr int64_t many_columns = 4 * lanes_of<T>;

  // What a tile needs of a matrix stays in the first cache.
  static constexpr int64_t few_numbers = 24576 / sizeof(T);

  bool is_large() const { return level_.n() * stop_.products() > 400000; }

  // Whether the rows of several nodes are multiplied as one matrix: those of one do not fill a tile.
  bool stacks() const { return stop_.before < 4; }

  // Slices are laid out anew for the nodes of a digit, unless there is only one and the core can be read as it lies.
  template <typename Pack, typename Work>
  void over_chunks(int64_t slice_size, const Pack& pack, bool can_stay, const Work& work) const {
    const auto n = static_cast<int64_t>(chunks_.size());
    const auto grain = std::max<int64_t>(1, n / (4 * at::get_num_threads()));
    const bool stays = can_stay && can_read_in_place();
    on_threads(n, grain, is_large(), [&](int64_t first, int64_t last) {
      Room room;
      T* const slice = room.take<T>(slice_size);
      for (auto k = first; k < last; ++k) {
        const bool is_here = stays && chunks_[k].is_alone;
        const bool is_new = k == first || chunks_[k].digit != chunks_[k - 1].digit;
        if (!is_here && is_new) (this->*pack)(chunks_[k].digit, slice);
        work(chunks_[k], is_here ? nullptr : slice);
      }
    });
  }

  // -- slices

  // As the second matrix of a table of low rank does.
  bool lies_turned() const { return core_.at_r == 1 && core_.s == 1; }

  // Row by row of the rank towards the first core.
  bool can_read_in_place() const {
    return core_.at_s == 1 && (from_last_ || stop_.beyond >= many_columns);
  }

  const T* in_place(int64_t digit, int64_t i) const { return core_.data + digit * core_.at_b + i * core_.at_a; }

  // A slice (inner, mode, beyond).
  void pack(int64_t digit, T* out) const {
    const auto apart = apart_for<T>(stop_.wide());
    if (lies_turned()) return turn_(core_.a, core_.r, in_place(digit, 0), core_.at_a, out, apart);
    for (int64_t i = 0; i < core_.a; ++i) {
      T* const to = out + i * stop_.beyond;
      if (from_last_)
        turn_(core_.r, core_.s, in_place(digit, i), core_.at_r, to, apart);
      else if (core_.at_s == 1)
        copy_block(core_.r, core_.s, in_place(digit, i), core_.at_r, to, apart);
      else
        copy_strided(in_place(digit, i), to, apart, 1);
    }
  }

  // The same as (mode, beyond, inner).
  void pack_turned(int64_t digit, T* out) const {
    const auto apart = apart_for<T>(stop_.inner);
    if (lies_turned()) return copy_block(core_.a, core_.r, in_place(digit, 0), core_.at_a, out, apart);
    for (int64_t i = 0; i < core_.a; ++i) {
      T* const to = out + i * stop_.beyond * apart;
      if (from_last_)
        copy_block(core_.r, core_.s, in_place(digit, i), core_.at_r, to, apart);
      else if (core_.at_s == 1)
        turn_(core_.r, core_.s, in_place(digit, i), core_.at_r, to, apart);
      else
        copy_strided(in_place(digit, i), to, 1, apart);
    }
  }

  void copy_strided(const T* block, T* out, int64_t out_r, int64_t out_s) const {
    for (int64_t r = 0; r < core_.r; ++r)
      for (int64_t s = 0; s < core_.s; ++s) out[r * out_r + s * out_s] = block[r * core_.at_r + s * core_.at_s];
  }

  // -- states

  const T* parent_of(int64_t node, const T* const* parents) const { return parents[level_.parents[node]]; }

  // `slice` is none where the core is read as it lies.
  void states_of(const Chunk& chunk, const T* slice, const T* const* parents, T* const* out) const {
    const bool has_blocks = from_last_ && stop_.beyond >= many_columns;
    if (slice == nullptr || (has_blocks && !(stacks() && chunk.n > 1)))
      for (int64_t i = 0; i < stop_.mode; ++i) {
        const T* const block = slice == nullptr ? in_place(chunk.digit, i) : slice + i * stop_.beyond;
        const auto row = slice == nullptr ? core_.at_r : apart_for<T>(stop_.wide());
        over_strips(chunk, stop_.beyond, block, row, from_last_ ? stop_.beyond : stop_.wide(), parents, [&](int64_t node) {
          return out[node] + i * (from_last_ ? stop_.before : 1) * stop_.beyond;
        });
      }
    else if (!from_last_ && stop_.wide() >= lanes_of<T> / 2 && !(stacks() && chunk.n > 1))
      over_strips(chunk, stop_.wide(), slice, apart_for<T>(stop_.wide()), stop_.wide(), parents,
                  [&](int64_t node) { return out[node]; });
    else
      stacked_states(chunk, slice, parents, out);
  }

  // Some columns for all nodes, then the next ones: those of a slice stay in the first cache.
  template <typename Of>
  void over_strips(const Chunk& chunk, int64_t width, const T* slice, int64_t row, int64_t out_row, const T* const* parents,
                   const Of& out_of) const {
    for (int64_t at = 0, next; at < width; at = next) {
      next = width - at < 2 * many_columns ? width : at + many_columns;
      for (int64_t k = 0; k < chunk.n; ++k) {
        const T *const state = parent_of(chunk.nodes[k], parents), *const block = slice + at;
        multiply_(stop_.before, next - at, stop_.inner, 1, &state, stop_.inner, 1, &block, row,
                  out_of(chunk.nodes[k]) + at, out_row, false);
      }
    }
  }

  void stacked_states(const Chunk& chunk, const T* slice, const T* const* parents, T* const* out) const {
    Room room;
    const auto before = stop_.before, inner = stop_.inner, apart = apart_for<T>(stop_.wide()), n = chunk.n * before;
    const T* const rows = rows_of(chunk, room, stop_.coming(), [&](int64_t node) { return parent_of(node, parents); });
    T* const made = room.take<T>(n * apart);
    const auto width = std::max(stop_.wide(), lanes_of<T> / 2);  // fewer columns cost as much
    multiply_(n, width, inner, 1, &rows, inner, 1, &slice, apart, made, apart, false);
    for (int64_t k = 0; k < chunk.n; ++k) put_state(made + k * before * apart, apart, out[chunk.nodes[k]]);
  }

  void put_state(const T* made, int64_t apart, T* state) const {
    if (!from_last_) return copy_block(stop_.before, stop_.wide(), made, apart, state, stop_.wide());
    for (int64_t i = 0; i < stop_.mode; ++i)
      copy_block(stop_.before, stop_.beyond, made + i * stop_.beyond, apart, state + i * stop_.before * stop_.beyond,
                 stop_.beyond);
  }

  // Numbers of all nodes below each other; those of one node lie so already.
  template <typename Of>
  const T* rows_of(const Chunk& chunk, Room& room, int64_t size, const Of& of) const {
    if (chunk.n == 1) return of(chunk.nodes[0]);
    T* const rows = room.take<T>(chunk.n * size);
    for (int64_t k = 0; k < chunk.n; ++k) std::memcpy(rows + k * size, of(chunk.nodes[k]), size * sizeof(T));
    return rows;
  }

  // -- gradients of the states before

  void back_of(const Chunk& chunk, const T* turned, const T* const* grads, T* out) const {
    if (turned != nullptr && stacks() && chunk.n > 1) return stacked_back(chunk, turned, grads, out);
    Room room;
    const auto mode = stop_.mode, beyond = stop_.beyond, inner = stop_.inner;
    const T** const left = room.take<const T*>(2 * mode);
    const T** const right = left + mode;
    for (int64_t i = 0; i < mode; ++i)
      right[i] = turned == nullptr ? in_place(chunk.digit, i) : turned + i * beyond * apart_for<T>(inner);
    const auto row = turned == nullptr ? core_.at_r : apart_for<T>(inner);
    // Block by block for all nodes, where a slice does not stay in the first cache.
    const auto n_here = chunk.n > 1 && stop_.wide() * inner > few_numbers ? int64_t{1} : mode;
    for (int64_t i = 0; i < mode; i += n_here)
      for (int64_t k = 0; k < chunk.n; ++k) {
        const auto node = chunk.nodes[k];
        for (auto one = i; one < i + n_here; ++one)
          left[one] = grads[node] + one * (from_last_ ? stop_.before : 1) * beyond;
        multiply_(stop_.before, inner, beyond, n_here, left + i, from_last_ ? beyond : stop_.wide(), 1, right + i, row,
                  out + node * stop_.coming(), inner, i > 0);
      }
  }

  void stacked_back(const Chunk& chunk, const T* turned, const T* const* grads, T* out) const {
    Room room;
    const auto before = stop_.before, inner = stop_.inner, apart = apart_for<T>(inner);
    T* const rows = room.take<T>(chunk.n * stop_.state());
    for (int64_t k = 0; k < chunk.n; ++k) take_grad(grads[chunk.nodes[k]], rows + k * stop_.state());
    T* const made = room.take<T>(chunk.n * before * apart);
    const T* const all = rows;
    multiply_(chunk.n * before, inner, stop_.wide(), 1, &all, stop_.wide(), 1, &turned, apart, made, apart, false);
    for (int64_t k = 0; k < chunk.n; ++k)
      copy_block(before, inner, made + k * before * apart, apart, out + chunk.nodes[k] * stop_.coming(), inner);
  }

  // A state's gradient as (before, mode, beyond).
  void take_grad(const T* grad, T* rows) const {
    if (!from_last_) return copy_block(1, stop_.state(), grad, stop_.state(), rows, stop_.state());
    for (int64_t i = 0; i < stop_.mode; ++i)
      copy_block(stop_.before, stop_.beyond, grad + i * stop_.before * stop_.beyond, stop_.beyond,
                 rows + i * stop_.beyond, stop_.wide());
  }

  // -- the gradient of a slice: over all nodes of its digit, states before, turned, times gradients

  struct Terms {
    int64_t digit = -1;
    std::vector<const T*> states, grads;
    std::vector<const T*> moved;  // some pointers, further on

    void take(const LevelProducts& level, int64_t its, const T* const* parents, const T* const* all) {
      if (its == digit) return;
      digit = its, states.clear(), grads.clear();
      for (auto at = level.by_.starts[its]; at < level.by_.starts[its + 1]; ++at) {
        states.push_back(level.parent_of(level.by_.nodes[at], parents));
        grads.push_back(all[level.by_.nodes[at]]);
      }
    }
    int64_t n() const { return static_cast<int64_t>(states.size()); }
    const T* const* from(const std::vector<const T*>& some, int64_t at) {
      moved = some;
      for (auto& one : moved) one += at;
      return moved.data();
    }
  };

  // Rows start .. start + n of the slice (inner, wide).
  void slice_from_first(Terms& terms, int64_t start, int64_t n, const Grid<T>& out, bool adds) const {
    Room room;
    const auto wide = stop_.wide(), apart = apart_for<T>(wide);
    T* const sums = room.take<T>(n * apart);
    multiply_(n, wide, stop_.before, terms.n(), terms.from(terms.states, start), 1, stop_.inner, terms.grads.data(), wide,
              sums, apart, false);
    T* const to = out.data + terms.digit * out.at_b + start * out.at_r;
    if (out.at_r == 1 && out.s == 1 && !adds) return turn_(n, out.a, sums, apart, to, out.at_a);
    for (int64_t i = 0; i < out.a; ++i) put(n, out.s, sums + i * out.s, apart, to + i * out.at_a, out.at_r, adds);
  }

  // Rows start .. start + n of the slice (mode, beyond, inner), which are rows of the core.
  void slice_from_last(Terms& terms, int64_t start, int64_t n, const Grid<T>& out, bool adds) const {
    const auto before = stop_.before, beyond = stop_.beyond;
    for (auto row = start; row < start + n;) {
      const auto i = row / beyond, r = row % beyond, here = std::min(beyond - r, start + n - row);
      T* const to = out.data + terms.digit * out.at_b + i * out.at_a + r * out.at_r;
      multiply_(here, stop_.inner, before, terms.n(), terms.from(terms.grads, i * before * beyond + r), 1, beyond,
                terms.states.data(), stop_.inner, to, out.at_r, adds);
      row += here;
    }
  }

  void put(int64_t n_rows, int64_t n, const T* from, int64_t from_row, T* to, int64_t to_row, bool adds) const {
    if (!adds) return copy_block(n_rows, n, from, from_row, to, to_row);
    for (int64_t k = 0; k < n_rows; ++k) add_(to + k * to_row, from + k * from_row, n);
  }

  const Stop& stop_;
  bool from_last_;
  const Tree::Level& level_;
  ByDigit by_;
  Grid<const T> core_;
  Digits met_;
  std::vector<Chunk> chunks_;
  Product<T> multiply_ = small_product<T>();
  Adder<T> add_ = row_adder<T>();
  Turner<T> turn_ = block_turner<T>();
};

}  // namespace tensortrain
