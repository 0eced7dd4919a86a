// Rows of ids, and the gradients of the cores that they are made of.
#pragma once

#include "lookup_last.h"
#include "lookup_level.h"

namespace tensortrain {

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
    return n;
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

// The distinct rows, each to its place.
template <typename T>
void rows_of_tree(const Tree& tree, const Way& way, const Grids<T>& cores, T* memory, T* const* rows) {
  const LevelStates<T> states(tree, way, memory);
  states.make(tree, way, cores);
  const auto g = way.last();
  const auto& core = cores[way.stops[g].core];
  if (LastProducts<T>::serves(way))
    LastProducts<T>(way, tree, core).rows(states.at[g - 1].data(), rows);
  else
    LevelProducts<T>(way, g, tree, core).states(states.at[g - 1].data(), rows);
}

// The same for all ids, at their places in `out`.
template <typename T>
void rows_of_ids(const Tree& tree, const Way& way, const Grids<T>& cores, T* memory, T* out) {
  const auto& leaves = tree.levels.back();
  const auto dim = way.stops.back().state();
  std::vector<T*> rows(leaves.n());
  for (int64_t k = 0; k < leaves.n(); ++k) rows[k] = out + tree.places[leaves.first_child[k]] * dim;
  rows_of_tree(tree, way, cores, memory, rows.data());
  const auto n_copies = static_cast<int64_t>(tree.places.size()) - leaves.n();
  on_threads(leaves.n(), 16, is_large_work(n_copies * dim * products_of_a_number), [&](int64_t first, int64_t last) {
    for (auto k = first; k < last; ++k)
      for (auto at = leaves.first_child[k] + 1; at < leaves.first_child[k + 1]; ++at)
        std::memcpy(out + tree.places[at] * dim, rows[k], dim * sizeof(T));
  });
}

// Row after row: what is summed stays in the first cache.
template <typename T>
void sum_rows(int64_t n, int64_t dim, const T* const* shares, const T* const* rows, T* out) {
  static const auto multiply = small_product<T>();
  if (n == 0) std::fill(out, out + dim, T(0));
  for (int64_t k = 0; k < n; ++k) multiply(1, dim, 1, 1, shares + k, 1, 1, rows + k, dim, out, dim, k > 0);
}

// The gradient of each distinct row: that of its place, or the sum over equal ids. `row_at(place)` is the gradient of a
// place, of which the share `*share_of(place)` counts.
template <typename T, typename RowAt, typename ShareOf>
std::vector<const T*> summed_rows(Room& room, const Tree& tree, int64_t dim, const RowAt& row_at, const ShareOf& share_of) {
  const auto& leaves = tree.levels.back();
  const auto n_places = static_cast<int64_t>(tree.places.size());
  std::vector<const T*> found(leaves.n()), rows(n_places), shares(n_places);
  for (int64_t at = 0; at < n_places; ++at) rows[at] = row_at(tree.places[at]), shares[at] = share_of(tree.places[at]);
  std::vector<T*> sums(leaves.n(), nullptr);
  int64_t n_summed = 0;
  for (int64_t k = 0; k < leaves.n(); ++k) {
    const auto first = leaves.first_child[k], n = leaves.first_child[k + 1] - first;
    if (n > 1 || *shares[first] != T(1)) sums[k] = room.take<T>(dim), n_summed += n;
  }
  on_threads(leaves.n(), 64, is_large_work(n_summed * dim * products_of_a_number), [&](int64_t start, int64_t end) {
    for (auto k = start; k < end; ++k) {
      const auto first = leaves.first_child[k];
      found[k] = sums[k] == nullptr ? rows[first] : sums[k];
      if (sums[k] != nullptr)
        sum_rows(leaves.first_child[k + 1] - first, dim, shares.data() + first, rows.data() + first, sums[k]);
    }
  });
  return found;
}

// Gradients of nodes, those of one parent summed into the first's: children of a node follow each other.
template <typename T>
std::vector<const T*> summed_children(const Tree::Level& parents, int64_t size, T* made) {
  const auto add = row_adder<T>();
  std::vector<const T*> at(parents.n());
  const auto work = parents.first_child[parents.n()] * size * products_of_a_number;
  on_threads(parents.n(), 8, is_large_work(work), [&](int64_t first, int64_t last) {
    for (auto p = first; p < last; ++p) {
      T* const total = made + parents.first_child[p] * size;
      for (auto k = parents.first_child[p] + 1; k < parents.first_child[p + 1]; ++k) add(total, made + k * size, size);
      at[p] = total;
    }
  });
  return at;
}

// One core on the way back: its gradient, and those of the states before it, if anybody wants them.
template <typename T>
struct WayBack {
  const Tree& tree;
  const Way& way;
  const Grids<T>& cores;
  const LevelStates<T>& states;
  const std::vector<Grid<T>>& out;
  bool adds;

  std::vector<const T*> through_last(Room& room, const std::vector<const T*>& grads, bool goes_on) const {
    const auto g = way.last();
    if (!LastProducts<T>::serves(way)) return through(room, g, grads, goes_on);
    const auto& gradient = out[way.stops[g].core];
    const LastProducts<T> step(way, tree, cores[way.stops[g].core]);
    T* const made = goes_on ? room.take<T>(tree.levels[g - 1].n() * way.stops[g].coming()) : nullptr;
    if (gradient.data == nullptr) return step.back(grads.data(), made);
    if (!adds) clear_unmet(gradient, step.met());
    return step.slices_and_back(states.at[g - 1].data(), grads.data(), gradient, adds, made);
  }

  std::vector<const T*> through(Room& room, size_t g, const std::vector<const T*>& grads, bool goes_on) const {
    const auto size = way.stops[g].coming();
    const LevelProducts<T> step(way, g, tree, cores[way.stops[g].core]);
    if (out[way.stops[g].core].data != nullptr) {
      if (!adds) clear_unmet(out[way.stops[g].core], step.met());
      step.slices(states.at[g - 1].data(), grads.data(), out[way.stops[g].core], adds);
    }
    if (!goes_on) return {};
    T* const made = room.take<T>(tree.levels[g].n() * size);
    step.back(grads.data(), made);
    return summed_children(tree.levels[g - 1], size, made);
  }
};

// From gradients of the distinct rows into those of the cores, with no memory where nobody wants one; `adds` to what
// another tree has put there.
template <typename T>
void gradients_of_tree(const Tree& tree, const Way& way, const Grids<T>& cores, const LevelStates<T>& states,
                       std::vector<const T*> grads, const std::vector<Grid<T>>& out, bool adds) {
  Room room;
  size_t least = way.last();  // levels that anybody wants a gradient of
  for (size_t g = way.stops.size(); g-- > 0;)
    if (out[way.stops[g].core].data != nullptr) least = g;
  const WayBack<T> back{tree, way, cores, states, out, adds};
  for (auto g = way.last(); g > 0; --g) {
    grads = g == way.last() ? back.through_last(room, grads, least < g) : back.through(room, g, grads, least < g);
    if (least == g) return;
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

  Asked(const int64_t* given, int64_t n, const std::vector<Tensor>& tensors, int64_t max_bytes) {
    const auto cores = grids_of<T>(tensors);
    way = Way::of(cores, false);
    const auto other = Way::of(cores, true);
    if (can_begin_at_last(cores) && is_faster(other, given, n)) {
      way = other;
      order(turned(given, n).data(), n);
    } else {
      order(given, n);
    }
    part = ids_at_a_time(cores, max_bytes);
    if (part < n) whole.reset();
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

  bool is_faster(const Way& other, const int64_t* ids, int64_t n) const {
    std::vector<double> from_first, from_last;
    int64_t n_rows = 1;
    for (const auto& stop : way.stops) n_rows *= stop.n_digits;
    int64_t n_prefixes = 1;
    for (const auto& stop : way.stops) {
      n_prefixes *= stop.n_digits;
      const auto rest = n_rows / n_prefixes;
      from_first.push_back(n_distinct(ids, n, n_prefixes, [&](int64_t id) { return quotient(id, rest); }));
    }
    n_prefixes = 1;
    for (const auto& stop : other.stops) {
      n_prefixes *= stop.n_digits;
      from_last.push_back(n_prefixes == n_rows ? from_first.back()
                                               : n_distinct(ids, n, n_prefixes, [&](int64_t id) { return id - quotient(id, n_prefixes) * n_prefixes; }));
    }
    return other.template cycles<T>(from_last) < way.template cycles<T>(from_first);
  }

  // How many numbers of so many possible ones are met; not counted where that is more than the sorting takes.
  template <typename Of>
  static double n_distinct(const int64_t* ids, int64_t n, int64_t n_possible, const Of& of) {
    if (n_possible > 16 * n) return static_cast<double>(n);
    std::vector<char> seen(n_possible);
    int64_t found = 0;
    for (int64_t k = 0; k < n; ++k) {
      const auto at = of(ids[k]);
      found += 1 - seen[at];
      seen[at] = 1;
    }
    return static_cast<double>(found);
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
        const auto next = quotient(rest, stop.n_digits);
        found[k] = found[k] * stop.n_digits + (rest - next * stop.n_digits);
        rest = next;
      }
    }
    return found;
  }

  int64_t ids_at_a_time(const Grids<T>& cores, int64_t max_bytes) const {
    constexpr auto item = static_cast<int64_t>(sizeof(T));
    const bool is_by_parents = LastProducts<T>::serves(way);
    int64_t numbers = whole->levels.back().n() * way.stops.back().state(), n_core_numbers = 0;
    for (size_t g = 0; g < way.last(); ++g) numbers += whole->levels[g].n() * way.stops[g].state();
    for (size_t g = 1; g <= way.last(); ++g)
      numbers += whole->levels[g - (g == way.last() && is_by_parents)].n() * way.stops[g].coming();
    for (const auto& core : cores) n_core_numbers += core.r * core.a * core.b * core.s;
    // Every part reads all cores, adds to all their gradients, and makes its states again on the way back.
    const auto most = std::max(int64_t{1} << 26, 6 * item * n_core_numbers);
    const auto share = static_cast<double>(std::min(max_bytes, most)) / static_cast<double>(numbers * item);
    const auto n = static_cast<int64_t>(pairs.size());
    return share >= 1 ? n : std::max<int64_t>(1, static_cast<int64_t>(share * static_cast<double>(n)));
  }
};

// Into `out` (ids, dim); gives what the way back needs.
template <typename T>
c10::intrusive_ptr<Asked<T>> rows_of_cores(const Tensor& ids, const std::vector<Tensor>& tensors, int64_t max_bytes,
                                           const Tensor& out) {
  auto asked = c10::make_intrusive<Asked<T>>(ids.const_data_ptr<int64_t>(), ids.numel(), tensors, max_bytes);
  const auto cores = grids_of<T>(tensors);
  T* const rows = out.template mutable_data_ptr<T>();
  if (asked->whole) asked->states = at::empty({LevelStates<T>::size(*asked->whole, asked->way)}, out.options());
  asked->over_parts([&](const Tree& tree, bool) {
    Room room;
    T* const memory = asked->whole ? asked->states.template mutable_data_ptr<T>()
                                   : room.take<T>(LevelStates<T>::size(tree, asked->way));
    rows_of_ids(tree, asked->way, cores, memory, rows);
  });
  return asked;
}

// Undefined for cores that do not need one. `grads_of(room, tree)` are gradients of the distinct rows.
template <typename T, typename GradsOf>
std::vector<Tensor> gradients_of_rows(const Asked<T>& asked, const std::vector<Tensor>& tensors,
                                      const std::vector<bool>& needed, const GradsOf& grads_of) {
  const auto cores = grids_of<T>(tensors);
  std::vector<Tensor> found(tensors.size());
  std::vector<Grid<T>> out(tensors.size());
  for (size_t k = 0; k < tensors.size(); ++k) {
    if (!needed[k]) continue;
    found[k] = at::empty(tensors[k].sizes(), tensors[k].options());
    out[k] = core_grid<T>(found[k], k, found[k].template mutable_data_ptr<T>());
    if (!asked.whole) std::memset(out[k].data, 0, found[k].nbytes());
  }
  asked.over_parts([&](const Tree& tree, bool) {
    Room room;
    // What the way there left is only read.
    T* const memory = asked.whole ? const_cast<T*>(asked.states.template const_data_ptr<T>())
                                  : room.take<T>(LevelStates<T>::size(tree, asked.way));
    const LevelStates<T> states(tree, asked.way, memory);
    if (!asked.whole) states.make(tree, asked.way, cores);
    gradients_of_tree(tree, asked.way, cores, states, grads_of(room, tree), out, !asked.whole);
  });
  return found;
}

template <typename T>
std::vector<Tensor> gradients_of_cores(const Asked<T>& asked, const std::vector<Tensor>& tensors, const Tensor& grad,
                                       const std::vector<bool>& needed) {
  const T one(1), *const first = grad.const_data_ptr<T>();
  const auto dim = asked.way.stops.back().state();
  return gradients_of_rows<T>(asked, tensors, needed, [&](Room& room, const Tree& tree) {
    return summed_rows<T>(room, tree, dim, [&](int64_t place) { return first + place * dim; },
                          [&](int64_t) { return &one; });
  });
}

}  // namespace tensortrain
