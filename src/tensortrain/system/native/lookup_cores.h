// Rows of ids, and the gradients of the cores that they are made of. Every core is read where it lies, and its gradient
// is written where it will lie: a table of slices would take longer to make than a training step uses it.
//
// The way through the chain begins at the first core or at the last one. Either way the numbers made so far are a matrix
// of a row for each combination of modes passed and a column for each rank ahead. From the first core, the next mode is
// the one that runs fastest; from the last, it is the slowest, so that rows of the table come out in their order too.
#pragma once

#include "lookup.h"

namespace tensortrain {

// One core on the way.
struct Stop {
  size_t core;  // its place in the chain
  int64_t n_digits;
  int64_t before;  // combinations of the modes passed
  int64_t inner;   // the rank towards them
  int64_t mode;
  int64_t beyond;  // the rank ahead
  int64_t wide() const { return mode * beyond; }
  int64_t coming() const { return before * inner; }
  int64_t state() const { return before * wide(); }
  int64_t products() const { return before * inner * wide(); }
};

struct Way {
  bool is_from_last;
  std::vector<Stop> stops;

  template <typename T>
  static Way of(const std::vector<Grid<const T>>& cores, bool is_from_last) {
    Way way{is_from_last, {}};
    int64_t before = 1;
    for (size_t k = 0; k < cores.size(); ++k) {
      const auto at = is_from_last ? cores.size() - 1 - k : k;
      const auto& core = cores[at];
      const auto inner = is_from_last ? core.s : core.r, beyond = is_from_last ? core.r : core.s;
      way.stops.push_back({at, core.b, before, inner, core.a, beyond});
      before *= core.a;
    }
    return way;
  }
  size_t last() const { return stops.size() - 1; }
  Sizes modes() const {
    Sizes found;
    for (const auto& stop : stops) found.push_back(stop.n_digits);
    return found;
  }
  // About how many cycles a step of training takes at so many nodes of every level: products, slices that are laid out
  // anew, numbers that are copied, calls.
  template <typename T>
  double cycles(const std::vector<double>& n_nodes) const {
    const double at_once = static_cast<double>(has_avx512() ? 4 * lanes_of<T> : 2 * lanes_of<T>);
    double sum = 0;
    for (size_t g = 1; g < stops.size(); ++g) {
      const auto& stop = stops[g];
      const double n = n_nodes[g], n_met = std::min(static_cast<double>(stop.n_digits), n);
      const auto slice = static_cast<double>(stop.inner * stop.wide());
      const auto padded = static_cast<double>(stop.coming() * whole_lanes<T>(stop.wide()));
      sum += n * padded * 4 / at_once + n_met * slice * (is_from_last ? 0.8 : 1.2);
      sum += n * (200 + 0.5 * static_cast<double>(stop.coming() + stop.state()));
    }
    return sum;
  }
  std::vector<double> most_nodes(int64_t n_distinct) const {
    std::vector<double> found;
    double n_prefixes = 1;
    for (const auto& stop : stops) {
      n_prefixes *= static_cast<double>(stop.n_digits);
      found.push_back(std::min(n_prefixes, static_cast<double>(n_distinct)));
    }
    return found;
  }
};

// -- blocks of numbers --------------------------------------------------------------------------------

// Rows so far apart that neither few lines of the cache hold all of them nor vectors cross lines.
template <typename T>
int64_t apart_for(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((n + line - 1) / line | 1) * line;
}

// What is read or written behind the numbers of a row, up to whole vectors, is of no account, but must be memory.
template <typename T>
constexpr int64_t slack = lanes_of<T>;

template <typename T>
inline void copy_block(int64_t n_rows, int64_t n, const T* from, int64_t from_row, T* to, int64_t to_row) {
  if (n == from_row && n == to_row) {
    std::memcpy(to, from, n_rows * n * sizeof(T));
  } else if (n >= 16) {
    for (int64_t k = 0; k < n_rows; ++k) std::memcpy(to + k * to_row, from + k * from_row, n * sizeof(T));
  } else {
    for (int64_t k = 0; k < n_rows; ++k, from += from_row, to += to_row)
      for (int64_t at = 0; at < n; ++at) to[at] = from[at];
  }
}

// -- one core for all nodes of a level ----------------------------------------------------------------

// Some nodes of one digit, whose rows are multiplied as one matrix.
struct Chunk {
  int64_t digit;
  const int64_t* nodes;
  int64_t n;
};

template <typename T>
class LevelProducts {
 public:
  LevelProducts(const Way& way, size_t g, const Tree& tree, const Grid<const T>& core)
      : stop_(way.stops[g]), from_last_(way.is_from_last), level_(tree.levels[g]), by_(level_, stop_.n_digits),
        core_(core) {
    for (int64_t digit = 0; digit < stop_.n_digits; ++digit)
      if (by_.starts[digit] < by_.starts[digit + 1]) met_.push_back(digit);
    const auto most = std::max<int64_t>(1, most_rows / stop_.before);
    for (const auto digit : met_)
      for (auto at = by_.starts[digit]; at < by_.starts[digit + 1]; at += most)
        chunks_.push_back({digit, by_.nodes.data() + at, std::min(most, by_.starts[digit + 1] - at)});
  }

  // States of nodes, from those of their parents.
  void states(const T* const* parents, T* const* out) const {
    over_chunks(stop_.inner * apart_for<T>(stop_.wide()), &LevelProducts::pack, [&](const auto& chunk, const T* slice) {
      states_of(chunk, slice, parents, out);
    });
  }

  // Gradients of the states before, one for each node, one after the other.
  void back(const T* const* grads, T* out) const {
    over_chunks(stop_.wide() * apart_for<T>(stop_.inner), &LevelProducts::pack_turned,
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
  static constexpr int64_t most_rows = 48;

  bool is_large() const { return level_.n() * stop_.products() > 1000000; }

  template <typename Pack, typename Work>
  void over_chunks(int64_t slice_size, const Pack& pack, const Work& work) const {
    const auto n = static_cast<int64_t>(chunks_.size());
    const auto grain = std::max<int64_t>(1, n / (4 * at::get_num_threads()));
    on_threads(n, grain, is_large(), [&](int64_t first, int64_t last) {
      Room room;
      T* const slice = room.take<T>(slice_size);
      for (auto k = first; k < last; ++k) {
        if (k == first || chunks_[k].digit != chunks_[k - 1].digit) (this->*pack)(chunks_[k].digit, slice);
        work(chunks_[k], slice);
      }
    });
  }

  // -- slices

  // As the second matrix of a table of low rank does.
  bool lies_turned() const { return !from_last_ && core_.at_r == 1 && core_.s == 1; }

  // A slice (inner, mode, beyond).
  void pack(int64_t digit, T* out) const {
    const T* const from = core_.data + digit * core_.at_b;
    const auto apart = apart_for<T>(stop_.wide());
    if (from_last_ && stop_.beyond == 1) return turn_(core_.a, core_.s, from, core_.at_a, out, apart);
    if (lies_turned()) return turn_(core_.a, core_.r, from, core_.at_a, out, apart);
    for (int64_t i = 0; i < core_.a; ++i) {
      const T* const block = from + i * core_.at_a;
      T* const to = out + i * stop_.beyond;
      if (from_last_)
        turn_(core_.r, core_.s, block, core_.at_r, to, apart);
      else if (core_.at_s == 1)
        copy_block(core_.r, core_.s, block, core_.at_r, to, apart);
      else
        copy_strided(block, to, apart, 1);
    }
  }

  // The same as (mode, beyond, inner).
  void pack_turned(int64_t digit, T* out) const {
    const T* const from = core_.data + digit * core_.at_b;
    const auto apart = apart_for<T>(stop_.inner);
    if (lies_turned()) return copy_block(core_.a, core_.r, from, core_.at_a, out, apart);
    for (int64_t i = 0; i < core_.a; ++i) {
      const T* const block = from + i * core_.at_a;
      T* const to = out + i * stop_.beyond * apart;
      if (from_last_)
        copy_block(core_.r, core_.s, block, core_.at_r, to, apart);
      else if (core_.at_s == 1)
        turn_(core_.r, core_.s, block, core_.at_r, to, apart);
      else
        copy_strided(block, to, 1, apart);
    }
  }

  void copy_strided(const T* block, T* out, int64_t out_r, int64_t out_s) const {
    for (int64_t r = 0; r < core_.r; ++r)
      for (int64_t s = 0; s < core_.s; ++s) out[r * out_r + s * out_s] = block[r * core_.at_r + s * core_.at_s];
  }

  // -- states

  const T* parent_of(int64_t node, const T* const* parents) const { return parents[level_.parents[node]]; }

  void states_of(const Chunk& chunk, const T* slice, const T* const* parents, T* const* out) const {
    Room room;
    const auto wide = stop_.wide(), width = whole_lanes<T>(wide), apart = apart_for<T>(wide);
    const auto n = chunk.n * stop_.before;
    const T* const rows = rows_of(chunk, room, stop_.coming(), [&](int64_t node) { return parent_of(node, parents); });
    const bool is_direct = chunk.n == 1 && width == wide && !from_last_;
    T* const made = is_direct ? out[chunk.nodes[0]] : room.take<T>(n * apart);
    const auto made_row = is_direct ? wide : apart;
    multiply_(n, width, stop_.inner, 1, &rows, stop_.inner, 1, &slice, apart, made, made_row, false);
    if (is_direct) return;
    for (int64_t k = 0; k < chunk.n; ++k) put_state(made + k * stop_.before * apart, apart, out[chunk.nodes[k]]);
  }

  void put_state(const T* made, int64_t apart, T* state) const {
    if (!from_last_) return copy_block(stop_.before, stop_.wide(), made, apart, state, stop_.wide());
    if (stop_.beyond == 1) return turn_(stop_.before, stop_.mode, made, apart, state, stop_.before);
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

  // A state's gradient as (before, mode, beyond).
  void take_grad(const T* grad, T* rows) const {
    if (!from_last_) return copy_block(1, stop_.state(), grad, stop_.state(), rows, stop_.state());
    if (stop_.beyond == 1) return turn_(stop_.mode, stop_.before, grad, stop_.before, rows, stop_.mode);
    for (int64_t i = 0; i < stop_.mode; ++i)
      copy_block(stop_.before, stop_.beyond, grad + i * stop_.before * stop_.beyond, stop_.beyond,
                 rows + i * stop_.beyond, stop_.wide());
  }

  void back_of(const Chunk& chunk, const T* turned, const T* const* grads, T* out) const {
    Room room;
    const auto width = whole_lanes<T>(stop_.inner), apart = apart_for<T>(stop_.inner), n = chunk.n * stop_.before;
    const T* rows = grads[chunk.nodes[0]];
    if (chunk.n > 1 || (from_last_ && stop_.before > 1)) {
      T* const taken = room.take<T>(chunk.n * stop_.state());
      for (int64_t k = 0; k < chunk.n; ++k) take_grad(grads[chunk.nodes[k]], taken + k * stop_.state());
      rows = taken;
    }
    T* const made = room.take<T>(n * apart);
    multiply_(n, width, stop_.wide(), 1, &rows, stop_.wide(), 1, &turned, apart, made, apart, false);
    for (int64_t k = 0; k < chunk.n; ++k)
      copy_block(stop_.before, stop_.inner, made + k * stop_.before * apart, apart,
                 out + chunk.nodes[k] * stop_.coming(), stop_.inner);
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
    const auto wide = stop_.wide(), width = whole_lanes<T>(wide), apart = apart_for<T>(wide);
    T* const sums = room.take<T>(n * apart);
    multiply_(n, width, stop_.before, terms.n(), terms.from(terms.states, start), 1, stop_.inner, terms.grads.data(), wide,
              sums, apart, false);
    T* const to = out.data + terms.digit * out.at_b + start * out.at_r;
    if (out.at_r == 1 && out.s == 1 && !adds) return turn_(n, out.a, sums, apart, to, out.at_a);
    for (int64_t i = 0; i < out.a; ++i) put(n, out.s, sums + i * out.s, apart, to + i * out.at_a, out.at_r, adds);
  }

  // Rows start .. start + n of the slice (mode, beyond, inner), which are rows of the core.
  void slice_from_last(Terms& terms, int64_t start, int64_t n, const Grid<T>& out, bool adds) const {
    Room room;
    const auto width = whole_lanes<T>(stop_.inner), apart = apart_for<T>(stop_.inner);
    T* const sums = room.take<T>(n * apart);
    for (int64_t row = start; row < start + n;) {
      const auto i = row / stop_.beyond, r = row % stop_.beyond;
      // Of a mode, or where the rank ahead is 1 of all modes at once.
      const auto here = stop_.beyond == 1 ? start + n - row : std::min(stop_.beyond - r, start + n - row);
      const auto a_row = stop_.beyond == 1 ? stop_.before : int64_t{1};
      const auto a_k = stop_.beyond;
      T* const made = sums + (row - start) * apart;
      multiply_(here, width, stop_.before, terms.n(), terms.from(terms.grads, i * stop_.before * stop_.beyond + r), a_row,
                a_k, terms.states.data(), stop_.inner, made, apart, false);
      T* const to = out.data + terms.digit * out.at_b + i * out.at_a + r * out.at_r;
      put(here, stop_.inner, made, apart, to, stop_.beyond == 1 ? out.at_a : out.at_r, adds);
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

// -- the first level: its states are slices of one rank, (mode, beyond) -------------------------------

template <typename T>
void first_states(const Tree::Level& level, const Grid<const T>& core, T* const* out) {
  const bool is_last = core.s == 1 && core.r > 1;
  const auto n = is_last ? core.r : core.s, apart = is_last ? core.at_r : core.at_s;
  for (int64_t k = 0; k < level.n(); ++k)
    for (int64_t i = 0; i < core.a; ++i) {
      const T* const from = core.data + i * core.at_a + level.digits[k] * core.at_b;
      T* const to = out[k] + i * n;
      if (apart == 1)
        std::memcpy(to, from, n * sizeof(T));
      else
        for (int64_t at = 0; at < n; ++at) to[at] = from[at * apart];
    }
}

template <typename T>
void first_slices(const Tree::Level& level, const T* const* grads, const Grid<T>& out, bool adds) {
  const bool is_last = out.s == 1 && out.r > 1;
  const auto n = is_last ? out.r : out.s, apart = is_last ? out.at_r : out.at_s;
  for (int64_t k = 0; k < level.n(); ++k)
    for (int64_t i = 0; i < out.a; ++i) {
      T* const to = out.data + i * out.at_a + level.digits[k] * out.at_b;
      const T* const from = grads[k] + i * n;
      if (apart == 1 && !adds)
        std::memcpy(to, from, n * sizeof(T));
      else
        for (int64_t at = 0; at < n; ++at) to[at * apart] = (adds ? to[at * apart] : T(0)) + from[at];
    }
}

// Zeros in the slices of a gradient that no id asks for; the others will be written.
template <typename T>
void clear_unmet(const Grid<T>& out, const Digits& met) {
  const auto n_unmet = out.b - static_cast<int64_t>(met.size()), n_runs = static_cast<int64_t>(met.size()) + 1;
  if (n_unmet == 0) return;
  if (out.at_b != out.s || n_unmet * out.s < 32 * n_runs) {
    std::fill(out.data, out.data + out.r * out.a * out.b * out.s, T(0));
    return;
  }
  for (int64_t k = 0; k < out.r * out.a; ++k) {
    T* const row = out.block(k / out.a, k % out.a);
    int64_t next = 0;
    for (const auto digit : met) {
      std::fill(row + next * out.s, row + digit * out.s, T(0));
      next = digit + 1;
    }
    std::fill(row + next * out.s, row + out.b * out.s, T(0));
  }
}

// -- all levels ---------------------------------------------------------------------------------------

template <typename T>
using Grids = std::vector<Grid<const T>>;

// Where every node of a level has its numbers, one after the other.
template <typename T>
std::vector<T*> places_of(T* start, int64_t n, int64_t size) {
  std::vector<T*> at(n);
  for (int64_t k = 0; k < n; ++k) at[k] = start + k * size;
  return at;
}

// The states of every level but the last, where the tree has them.
template <typename T>
class LevelStates {
 public:
  static int64_t size(const Tree& tree, const Way& way) {
    int64_t n = 0;
    for (size_t g = 0; g < way.last(); ++g) n += tree.levels[g].n() * way.stops[g].state();
    return n + slack<T>;
  }
  LevelStates(const Tree& tree, const Way& way, T* memory) {
    for (size_t g = 0; g < way.last(); ++g) {
      at.push_back(places_of(memory, tree.levels[g].n(), way.stops[g].state()));
      memory += tree.levels[g].n() * way.stops[g].state();
    }
  }
  void make(const Tree& tree, const Way& way, const Grids<T>& cores) const {
    first_states(tree.levels[0], cores[way.stops[0].core], at[0].data());
    for (size_t g = 1; g < way.last(); ++g)
      LevelProducts<T>(way, g, tree, cores[way.stops[g].core]).states(at[g - 1].data(), at[g].data());
  }

  std::vector<std::vector<T*>> at;
};

template <typename T>
void rows_of_tree(const Tree& tree, const Way& way, const Grids<T>& cores, T* memory, T* out) {
  const LevelStates<T> states(tree, way, memory);
  states.make(tree, way, cores);
  const auto g = way.last();
  const auto dim = way.stops[g].state();
  const auto& leaves = tree.levels[g];
  std::vector<T*> rows(leaves.n());
  for (int64_t k = 0; k < leaves.n(); ++k) rows[k] = out + tree.places[leaves.first_child[k]] * dim;
  LevelProducts<T>(way, g, tree, cores[way.stops[g].core]).states(states.at[g - 1].data(), rows.data());
  const auto n_copies = static_cast<int64_t>(tree.places.size()) - leaves.n();
  on_threads(leaves.n(), 16, is_large_work(n_copies * dim * products_of_a_number), [&](int64_t first, int64_t last) {
    for (auto k = first; k < last; ++k)
      for (auto at = leaves.first_child[k] + 1; at < leaves.first_child[k + 1]; ++at)
        std::memcpy(out + tree.places[at] * dim, rows[k], dim * sizeof(T));
  });
}

// The gradient of each distinct row: that of its place, or the sum over equal ids; never the one at the end of memory.
template <typename T>
std::vector<const T*> summed_rows(Room& room, const Tree& tree, const T* grad, int64_t dim) {
  const auto last_place = static_cast<int64_t>(tree.places.size()) - 1;
  const auto& leaves = tree.levels.back();
  std::vector<const T*> found(leaves.n());
  std::vector<T*> sums(leaves.n(), nullptr);
  for (int64_t k = 0; k < leaves.n(); ++k)
    if (leaves.first_child[k + 1] > leaves.first_child[k] + 1 || tree.places[leaves.first_child[k]] == last_place)
      sums[k] = room.take<T>(dim + slack<T>);
  const auto add = row_adder<T>();
  const auto n_places = static_cast<int64_t>(tree.places.size());
  const auto ask_for = [&](int64_t at) {  // rows lie all over memory
    if (at >= n_places) return;
    for (int64_t k = 0; k < dim; k += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(grad + tree.places[at] * dim + k);
  };
  const auto work = (n_places - leaves.n()) * dim * products_of_a_number;
  on_threads(leaves.n(), 64, is_large_work(work), [&](int64_t first, int64_t last) {
    for (auto k = first; k < last; ++k) {
      const auto start = leaves.first_child[k];
      found[k] = grad + tree.places[start] * dim;
      if (sums[k] == nullptr) continue;
      std::memcpy(sums[k], found[k], dim * sizeof(T));
      for (auto place = start + 1; place < leaves.first_child[k + 1]; ++place) {
        ask_for(place + 4);
        add(sums[k], grad + tree.places[place] * dim, dim);
      }
      found[k] = sums[k];
    }
  });
  return found;
}

// Gradients of nodes, those of one parent summed into the first's: children of a node follow each other.
template <typename T>
std::vector<const T*> summed_children(const Tree::Level& parents, int64_t size, T* made) {
  const auto add = row_adder<T>();
  std::vector<const T*> at(parents.n());
  for (int64_t p = 0; p < parents.n(); ++p) {
    T* const total = made + parents.first_child[p] * size;
    for (auto k = parents.first_child[p] + 1; k < parents.first_child[p + 1]; ++k) add(total, made + k * size, size);
    at[p] = total;
  }
  return at;
}

// Into gradients of the cores, with no memory where nobody wants one; `adds` to what another tree has put there.
template <typename T>
void gradients_of_tree(const Tree& tree, const Way& way, const Grids<T>& cores, const LevelStates<T>& states,
                       const T* grad, const std::vector<Grid<T>>& out, bool adds) {
  Room room;
  size_t least = way.last();  // levels that anybody wants a gradient of
  for (size_t g = way.stops.size(); g-- > 0;)
    if (out[way.stops[g].core].data != nullptr) least = g;
  auto grads = summed_rows(room, tree, grad, way.stops.back().state());
  for (auto g = way.last(); g > 0; --g) {
    const auto& stop = way.stops[g];
    const LevelProducts<T> step(way, g, tree, cores[stop.core]);
    const auto& gradient = out[stop.core];
    if (gradient.data != nullptr) {
      if (!adds) clear_unmet(gradient, step.met());
      step.slices(states.at[g - 1].data(), grads.data(), gradient, adds);
    }
    if (least == g) return;
    T* const made = room.take<T>(tree.levels[g].n() * stop.coming() + slack<T>);
    step.back(grads.data(), made);
    grads = summed_children(tree.levels[g - 1], stop.coming(), made);
  }
  const auto& gradient = out[way.stops[0].core];
  if (gradient.data == nullptr) return;
  auto met = tree.levels[0].digits;
  if (!adds) clear_unmet(gradient, met);
  first_slices(tree.levels[0], grads.data(), gradient, adds);
}

// -- ids and their parts ------------------------------------------------------------------------------

// Cores as (r, i, j, s); the two matrices of a table of low rank, (J, r) and (I, r), are such a chain too.
template <typename T, typename Data>
Grid<T> core_grid(const Tensor& core, size_t k, Data* data) {
  if (core.dim() == 4)
    return {data, core.size(0), core.size(1), core.size(2), core.size(3),
            core.stride(0), core.stride(1), core.stride(2), core.stride(3)};
  const auto n = core.size(0), rank = core.size(1);
  if (k == 0) return {data, 1, 1, n, rank, n * rank, n * rank, core.stride(0), core.stride(1)};
  return {data, rank, n, 1, 1, core.stride(1), core.stride(0), n * rank, 1};
}

template <typename T>
Grids<T> grids_of(const std::vector<Tensor>& cores) {
  Grids<T> grids;
  for (size_t k = 0; k < cores.size(); ++k) grids.push_back(core_grid<const T>(cores[k], k, cores[k].const_data_ptr<T>()));
  return grids;
}

// What ids ask for; kept for the way back, with the states where there are few.
template <typename T>
struct Asked final : torch::CustomClassHolder {
  Way way;
  Pairs pairs;
  std::optional<Tree> whole;  // of all ids
  int64_t part;               // ids at a time
  Tensor states;              // of the whole tree

  Asked(const Tensor& ids, const std::vector<Tensor>& tensors, int64_t max_bytes) {
    const auto cores = grids_of<T>(tensors);
    way = Way::of(cores, false);
    const auto* const given = ids.const_data_ptr<int64_t>();
    order(given, ids.numel());
    const auto n = whole->levels.back().n();
    const auto other = Way::of(cores, true);
    if (can_begin_at_last(cores) && other.template cycles<T>(other.most_nodes(n)) < way.template cycles<T>(met_nodes())) {
      way = other;
      order(turned(given, ids.numel()).data(), ids.numel());
    }
    part = ids_at_a_time(cores, max_bytes);
    if (part < ids.numel()) whole.reset();
  }

  // Calls work(tree, is_first) for all ids, in parts of which as much lies between the steps as the caches hold.
  template <typename Work>
  void over_parts(const Work& work) const {
    if (whole) return work(*whole, true);
    const auto modes = way.modes();
    const auto n = static_cast<int64_t>(pairs.size());
    for (int64_t first = 0; first < n; first += part)
      work(Tree(pairs.data() + first, std::min(part, n - first), modes), first == 0);
  }

 private:
  void order(const int64_t* ids, int64_t n) {
    const auto modes = way.modes();
    int64_t n_ids = 1;
    for (const auto mode : modes) n_ids *= mode;
    pairs = in_order(ids, n, n_ids - 1);
    whole.emplace(pairs.data(), n, modes);
  }

  std::vector<double> met_nodes() const {
    std::vector<double> found;
    for (const auto& level : whole->levels) found.push_back(static_cast<double>(level.n()));
    return found;
  }

  // Slices are then read as rows that lie equally far apart.
  static bool can_begin_at_last(const Grids<T>& cores) {
    return std::all_of(cores.begin(), cores.end(),
                       [](const auto& core) { return core.at_s == 1 && core.at_r == core.a * core.at_a; });
  }

  // Ids with their digits the other way round.
  std::vector<int64_t> turned(const int64_t* ids, int64_t n) const {
    std::vector<int64_t> found(n);
    for (int64_t k = 0; k < n; ++k) {
      auto rest = ids[k];
      for (const auto& stop : way.stops) {  // the first of which has an id's last digit
        const auto next = rest / stop.n_digits;
        found[k] = found[k] * stop.n_digits + (rest - next * stop.n_digits);
        rest = next;
      }
    }
    return found;
  }

  int64_t ids_at_a_time(const Grids<T>& cores, int64_t max_bytes) const {
    constexpr auto item = static_cast<int64_t>(sizeof(T));
    int64_t numbers = whole->levels.back().n() * way.stops.back().state(), n_core_numbers = 0;
    for (size_t g = 0; g < way.last(); ++g) numbers += 2 * whole->levels[g].n() * way.stops[g].state();
    for (size_t g = 1; g <= way.last(); ++g) numbers += whole->levels[g].n() * way.stops[g].coming();
    for (const auto& core : cores) n_core_numbers += core.r * core.a * core.b * core.s;
    // Every part reads all cores, and adds to all their gradients: large ones make for larger parts.
    const auto most = std::max(std::min((int64_t{1} << 22) * at::get_num_threads(), int64_t{1} << 24),
                               6 * item * n_core_numbers);
    const auto share = static_cast<double>(std::min(max_bytes, most)) / static_cast<double>(numbers * item);
    const auto n = static_cast<int64_t>(pairs.size());
    return share >= 1 ? n : std::max<int64_t>(1, static_cast<int64_t>(share * static_cast<double>(n)));
  }
};

// Into `out` (ids, dim); gives what the way back needs.
template <typename T>
c10::intrusive_ptr<Asked<T>> rows_of_cores(const Tensor& ids, const std::vector<Tensor>& tensors, int64_t max_bytes,
                                           const Tensor& out) {
  auto asked = c10::make_intrusive<Asked<T>>(ids, tensors, max_bytes);
  const auto cores = grids_of<T>(tensors);
  T* const rows = out.template mutable_data_ptr<T>();
  if (asked->whole) asked->states = at::empty({LevelStates<T>::size(*asked->whole, asked->way)}, out.options());
  asked->over_parts([&](const Tree& tree, bool) {
    Room room;
    T* const memory = asked->whole ? asked->states.template mutable_data_ptr<T>()
                                   : room.take<T>(LevelStates<T>::size(tree, asked->way));
    rows_of_tree(tree, asked->way, cores, memory, rows);
  });
  return asked;
}

// Undefined for cores that do not need one.
template <typename T>
std::vector<Tensor> gradients_of_cores(const Asked<T>& asked, const std::vector<Tensor>& tensors, const Tensor& grad,
                                       const std::vector<bool>& needed) {
  const auto cores = grids_of<T>(tensors);
  std::vector<Tensor> found(tensors.size());
  std::vector<Grid<T>> out(tensors.size());
  for (size_t k = 0; k < tensors.size(); ++k) {
    if (!needed[k]) continue;
    found[k] = at::empty(tensors[k].sizes(), grad.options());
    out[k] = core_grid<T>(found[k], k, found[k].template mutable_data_ptr<T>());
    if (!asked.whole) std::memset(out[k].data, 0, found[k].nbytes());
  }
  const T* const rows = grad.const_data_ptr<T>();
  asked.over_parts([&](const Tree& tree, bool) {
    Room room;
    // What the way there left is only read.
    T* const memory = asked.whole ? const_cast<T*>(asked.states.template const_data_ptr<T>())
                                  : room.take<T>(LevelStates<T>::size(tree, asked.way));
    const LevelStates<T> states(tree, asked.way, memory);
    if (!asked.whole) states.make(tree, asked.way, cores);
    gradients_of_tree(tree, asked.way, cores, states, rows, out, !asked.whole);
  });
  return found;
}

}  // namespace tensortrain
