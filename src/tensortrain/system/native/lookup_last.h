// The last core on the way, whose states are rows of the table: each row, and each row's gradient, is met once, where it
// lies among all. Rows with the same state before follow each other.
#pragma once

#include "lookup_way.h"

namespace tensortrain {

template <typename T>
class LastProducts {
 public:
  // Not where a state has so few rows that those of several nodes must be multiplied as one.
  static bool serves(const Way& way) { return way.stops.size() > 1 && (way.is_from_last || way.stops.back().before >= 4); }

  LastProducts(const Way& way, const Tree& tree, const Grid<const T>& core)
      : stop_(way.stops.back()), from_last_(way.is_from_last), leaves_(tree.levels.back()),
        parents_(tree.levels[way.last() - 1]), by_(leaves_, stop_.n_digits), core_(core) {
    for (int64_t digit = 0; digit < stop_.n_digits; ++digit)
      if (by_.starts[digit] < by_.starts[digit + 1]) met_.push_back(digit);
  }

  // Rows of leaves, from the states before.
  void rows(const T* const* states, T* const* out) const {
    Room room;
    const T* const slices = from_last_ ? nullptr : packed(room, stop_.inner * apart_for<T>(stop_.mode), apart_for<T>(stop_.mode), 1);
    over_parents(16, [&](int64_t first, int64_t last) {
      Room inside;
      T* const turned = inside.take<T>(stop_.inner * apart_for<T>(stop_.before));
      T* const padded = inside.take<T>(stop_.before * apart_for<T>(stop_.mode));
      for (auto p = first; p < last; ++p)
        from_last_ ? rows_from_last(p, states[p], turned, out) : rows_from_first(p, states[p], slices, padded, out);
    });
  }

  // Gradients of the states before, each at its place in `out`; nothing where that is none.
  std::vector<const T*> back(const T* const* grads, T* out) const {
    if (out == nullptr) return {};
    Room room;
    const Backward to_states(*this, room);
    std::vector<const T*> found(parents_.n());
    over_parents(16, [&](int64_t first, int64_t last) {
      for (auto p = first; p < last; ++p) to_states(p, grads, out + p * stop_.coming());
    });
    for (int64_t p = 0; p < parents_.n(); ++p) found[p] = out + p * stop_.coming();
    return found;
  }

  // The gradient of the core, of its digits met: put there, or added; and back with it, so that states and gradients are
  // read once.
  std::vector<const T*> slices_and_back(const T* const* states, const T* const* grads, const Grid<T>& to, bool adds,
                                        T* out) const {
    const auto n_threads = is_large() ? int64_t{at::get_num_threads()} : int64_t{1};
    const auto size = stop_.n_digits * stop_.mode * stop_.inner;
    if (size * static_cast<int64_t>(sizeof(T)) > most_sums_bytes || size > leaves_.n() * stop_.products()) {
      slices(states, grads, to, adds);
      return back(grads, out);
    }
    Room room;
    const Backward to_states(*this, room);
    T* const sums = room.take<T>(n_threads * size);
    std::vector<const T*> found(out == nullptr ? 0 : parents_.n());
    on_threads(n_threads, 1, is_large(), [&](int64_t part, int64_t end) {
      for (; part < end; ++part) {
        T* const its = sums + part * size;
        std::fill(its, its + size, T(0));
        for (auto p = part_start(part, n_threads); p < part_start(part + 1, n_threads); ++p) {
          for (auto k = parents_.first_child[p]; k < parents_.first_child[p + 1]; ++k)
            multiply_(stop_.mode, stop_.inner, stop_.before, 1, grads + k, row_of_grad(), rank_of_grad(), states + p,
                      stop_.inner, its + leaves_.digits[k] * stop_.mode * stop_.inner, stop_.inner, true);
          if (out == nullptr) continue;
          found[p] = out + p * stop_.coming();
          to_states(p, grads, out + p * stop_.coming());
        }
      }
    });
    for (int64_t part = 1; part < n_threads; ++part) add_(sums, sums + part * size, size);
    for (const auto digit : met_) put_slice(sums + digit * stop_.mode * stop_.inner, to, digit, adds);
    return found;
  }

  const Digits& met() const { return met_; }

 private:
  static constexpr int64_t most_sums_bytes = int64_t{1} << 18;  // that stay in the cache of a core

  bool is_large() const { return leaves_.n() * stop_.products() > 400000; }

  // A row's gradient as (mode, before).
  int64_t row_of_grad() const { return from_last_ ? stop_.before : int64_t{1}; }
  int64_t rank_of_grad() const { return from_last_ ? int64_t{1} : stop_.mode; }

  // The first of the parents of a part; parts have about as many leaves.
  int64_t part_start(int64_t part, int64_t n_parts) const {
    const auto& starts = parents_.first_child;
    return std::lower_bound(starts.begin(), starts.end() - 1, leaves_.n() * part / n_parts) - starts.begin();
  }

  template <typename Work>
  void over_parents(int64_t n_parts, const Work& work) const {
    const auto n = parents_.n();
    on_threads(n, std::max<int64_t>(1, n / (n_parts * at::get_num_threads())), is_large(), work);
  }

  // All slices met, `size` numbers each: those of one rank `at_k` apart, those of one mode `at_i`.
  const T* packed(Room& room, int64_t size, int64_t at_k, int64_t at_i) const {
    T* const slices = room.take<T>(stop_.n_digits * size);
    const auto at_rank = from_last_ ? core_.at_s : core_.at_r;
    for (const auto digit : met_)
      for (int64_t i = 0; i < stop_.mode; ++i) {
        const T* const from = core_.data + digit * core_.at_b + i * core_.at_a;
        T* const to = slices + digit * size + i * at_i;
        for (int64_t k = 0; k < stop_.inner; ++k) to[k * at_k] = from[k * at_rank];
      }
    return slices;
  }

  // The slice's turn (mode, inner) times the state's.
  void rows_from_last(int64_t p, const T* state, T* turned, T* const* out) const {
    const auto before = stop_.before, inner = stop_.inner, apart = apart_for<T>(before);
    turn_(before, inner, state, inner, turned, apart);
    const T* const right = turned;
    for (auto k = parents_.first_child[p]; k < parents_.first_child[p + 1]; ++k) {
      const T* const slice = core_.data + leaves_.digits[k] * core_.at_b;
      multiply_(stop_.mode, before, inner, 1, &slice, core_.at_a, core_.at_s, &right, apart, out[k], before, false);
    }
  }

  void rows_from_first(int64_t p, const T* state, const T* slices, T* padded, T* const* out) const {
    const auto before = stop_.before, inner = stop_.inner, mode = stop_.mode, apart = apart_for<T>(mode);
    for (auto k = parents_.first_child[p]; k < parents_.first_child[p + 1]; ++k) {
      const T* const slice = slices + leaves_.digits[k] * inner * apart;
      const bool is_thin = mode < lanes_of<T> / 2;  // as many columns as make a vector cost no more
      multiply_(before, is_thin ? lanes_of<T> / 2 : mode, inner, 1, &state, inner, 1, &slice, apart,
                is_thin ? padded : out[k], is_thin ? apart : mode, false);
      if (is_thin) copy_block(before, mode, padded, apart, out[k], mode);
    }
  }

  // The gradient of a state: over all its leaves, their gradients times slices (mode, inner).
  struct Backward {
    const LastProducts& all;
    bool is_turned;  // the sum is made the other way round, where that has fewer vectors
    const T* slices;
    int64_t at_digit, at_mode;

    Backward(const LastProducts& last, Room& room) : all(last) {
      const auto& stop = last.stop_;
      const bool is_thinner = stop.inner * vectors_of<T>(stop.before) < stop.before * vectors_of<T>(stop.inner);
      is_turned = last.from_last_ && is_thinner;
      at_mode = last.from_last_ ? last.core_.at_a : apart_for<T>(stop.inner);
      at_digit = last.from_last_ ? last.core_.at_b : stop.mode * at_mode;
      slices = last.from_last_ ? last.core_.data : last.packed(room, at_digit, 1, at_mode);
    }

    void operator()(int64_t p, const T* const* grads, T* out) const {
      Room room;
      const auto& stop = all.stop_;
      const auto first = all.parents_.first_child[p], n = all.parents_.first_child[p + 1] - first;
      const T** const its = room.take<const T*>(n);
      for (int64_t k = 0; k < n; ++k) its[k] = slices + all.leaves_.digits[first + k] * at_digit;
      if (!is_turned)
        return all.multiply_(stop.before, stop.inner, stop.mode, n, grads + first, all.rank_of_grad(), all.row_of_grad(),
                             its, at_mode, out, stop.inner, false);
      const auto apart = apart_for<T>(stop.before);
      T* const made = room.take<T>(stop.inner * apart);
      all.multiply_(stop.inner, stop.before, stop.mode, n, its, 1, at_mode, grads + first, stop.before, made, apart, false);
      all.turn_(stop.inner, stop.before, made, apart, out, stop.inner);
    }
  };

  // Gradients of leaves of one digit, as (mode, before), times states: (mode, inner).
  void slices(const T* const* states, const T* const* grads, const Grid<T>& out, bool adds) const {
    on_threads(static_cast<int64_t>(met_.size()), 1, is_large(), [&](int64_t first, int64_t last) {
      Room room;
      T* const made = room.take<T>(stop_.mode * stop_.inner);
      std::vector<const T*> its_states, its_grads;
      for (auto m = first; m < last; ++m) {
        its_states.clear(), its_grads.clear();
        for (auto at = by_.starts[met_[m]]; at < by_.starts[met_[m] + 1]; ++at) {
          its_states.push_back(states[leaves_.parents[by_.nodes[at]]]);
          its_grads.push_back(grads[by_.nodes[at]]);
        }
        multiply_(stop_.mode, stop_.inner, stop_.before, static_cast<int64_t>(its_grads.size()), its_grads.data(),
                  row_of_grad(), rank_of_grad(), its_states.data(), stop_.inner, made, stop_.inner, false);
        put_slice(made, out, met_[m], adds);
      }
    });
  }

  void put_slice(const T* made, const Grid<T>& out, int64_t digit, bool adds) const {
    const auto at_k = from_last_ ? out.at_s : out.at_r;
    for (int64_t i = 0; i < stop_.mode; ++i, made += stop_.inner) {
      T* const to = out.data + digit * out.at_b + i * out.at_a;
      if (at_k == 1 && adds)
        add_(to, made, stop_.inner);
      else if (at_k == 1)
        std::memcpy(to, made, stop_.inner * sizeof(T));
      else
        for (int64_t k = 0; k < stop_.inner; ++k) to[k * at_k] = (adds ? to[k * at_k] : T(0)) + made[k];
    }
  }

  const Stop& stop_;
  bool from_last_;
  const Tree::Level &leaves_, &parents_;
  ByDigit by_;
  Grid<const T> core_;
  Digits met_;
  Product<T> multiply_ = small_product<T>();
  Adder<T> add_ = row_adder<T>();
  Turner<T> turn_ = block_turner<T>();
};

}  // namespace tensortrain
