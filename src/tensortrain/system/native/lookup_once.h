// Rows and gradients of ids whose states all lie in the cache at once. Each core is read where it lies, some rows of a
// slice at a time, and its gradient is written in the order in which it lies: at few ids a table of slices would take
// longer to make than to use.
#pragma once

#include "lookup.h"

namespace tensortrain {

constexpr int64_t slice_rows_at_once = 16;

// Work that two threads share sooner than one does it, slices being read from memory that is far.
inline bool is_shared_work(int64_t n_products) { return n_products > 600000; }

template <typename T>
int64_t products_of_level(const Tree& tree, const TableShapes& shapes, size_t g, size_t n_digits) {
  const auto reading = static_cast<int64_t>(n_digits) * shapes.tables[g].slice() * products_of_a_number;
  return tree.levels[g].n() * shapes.products(g) + reading;
}

// Whether the states are few enough, and the digits enough for all threads.
template <typename T>
bool fits_at_once(const Asked<T>& asked, int64_t max_bytes) {
  if (asked.direction.is_turned) return false;
  const auto& shapes = asked.shapes();
  const auto& levels = asked.direction.whole->levels;
  const auto last = shapes.n() - 1;
  const int64_t n_threads = at::get_num_threads();
  auto numbers = levels[last].n() * shapes.state(last);
  for (size_t g = 0; g < last; ++g) numbers += 2 * levels[g].n() * shapes.state(g);
  for (size_t g = 1; g < last; ++g) {
    numbers += levels[g].n() * shapes.state(g - 1);
    const auto n_digits = static_cast<int64_t>(asked.digits[g].size());
    if (n_threads > 1 && n_digits < 2 * n_threads && is_large_work(levels[g].n() * shapes.products(g))) return false;
  }
  constexpr auto item = static_cast<int64_t>(sizeof(T));
  // Where tables are larger than the cache, more parts would read them more often.
  const auto most = std::max(std::min((int64_t{1} << 22) * n_threads, int64_t{1} << 24), 6 * item * shapes.n_numbers());
  return numbers * item <= std::min(max_bytes, most);
}

// Some rows of one slice, (n, width) with rows that lie `apart`; what is no number of the core is left as it is.
template <typename T>
void copy_rows(const Grid<const T>& core, const SliceTable& t, int64_t digit, int64_t start, int64_t n, int64_t apart,
               T* out) {
  for (int64_t k = 0; k < n; ++k)
    for (int64_t i = 0; i < t.i; ++i) {
      const T* const from = core.block(start + k, i) + digit * core.at_b;
      T* const to = out + k * apart + i * t.wide_s;
      if (core.at_s == 1)
        std::memcpy(to, from, t.s * sizeof(T));
      else
        for (int64_t s = 0; s < t.s; ++s) to[s] = from[s * core.at_s];
    }
}

// Rows of a slice lie so far apart in memory of their own: not a power of two, which few lines of the cache would share.
template <typename T>
int64_t apart_of(const SliceTable& t) {
  return t.width + 2 * lanes_of<T>;
}

// -- rows ---------------------------------------------------------------------------------------------

template <typename T>
std::vector<const T*> states_of(const Asked<T>& asked, size_t g) {
  std::vector<const T*> at(asked.direction.whole->levels[g].n());
  const T* const start = asked.states[g].template const_data_ptr<T>();
  for (size_t k = 0; k < at.size(); ++k) at[k] = start + static_cast<int64_t>(k) * asked.shapes().state(g);
  return at;
}

// The first level: its states are slices of one row.
template <typename T>
void first_states(const Tree& tree, const TableShapes& shapes, const Grid<const T>& core, T* states) {
  const auto& t = shapes.tables[0];
  const auto& digits = tree.levels[0].digits;
  for (size_t k = 0; k < digits.size(); ++k) {
    T* const state = states + static_cast<int64_t>(k) * t.width;
    if (t.wide_s != t.s) std::fill(state, state + t.width, T(0));
    copy_rows(core, t, digits[k], 0, 1, t.width, state);
  }
}

template <typename T>
void states_by_digit(const Tree& tree, const TableShapes& shapes, size_t g, const Grid<const T>& core,
                     const T* const* parents, size_t n_digits, T* states) {
  const auto& t = shapes.tables[g];
  const auto& level = tree.levels[g];
  const ByDigit by(level, t.j);
  const auto multiply = small_product<T>();
  const auto lead = shapes.leads[g], wide_r = shapes.tables[g - 1].wide_s, apart = apart_of<T>(t);
  const bool is_shared = is_shared_work(products_of_level<T>(tree, shapes, g, n_digits));
  on_threads(t.j, 1, is_shared, [&](int64_t first, int64_t last) {
    std::vector<T> rows(slice_rows_at_once * apart);
    const T* const b = rows.data();
    for (auto digit = first; digit < last; ++digit) {
      if (by.starts[digit] == by.starts[digit + 1]) continue;
      for (int64_t r = 0; r < t.r; r += slice_rows_at_once) {
        const auto n = std::min(slice_rows_at_once, t.r - r);
        copy_rows(core, t, digit, r, n, apart, rows.data());
        for (auto at = by.starts[digit]; at < by.starts[digit + 1]; ++at) {
          const auto node = by.nodes[at];
          const T* const a = parents[level.parents[node]] + r;
          multiply(lead, t.width, n, 1, &a, wide_r, 1, &b, apart, states + node * shapes.state(g), t.width, r > 0);
        }
      }
    }
  });
}

// Into `out` (ids, dim); the states stay with what was asked.
template <typename T>
void rows_at_once(Asked<T>& asked, const std::vector<Tensor>& cores, T* out) {
  const auto& shapes = asked.shapes();
  const auto& tree = *asked.direction.whole;
  const auto last = shapes.n() - 1;
  for (size_t g = 0; g < last; ++g) {
    asked.states.push_back(at::empty({tree.levels[g].n() * shapes.state(g)}, cores[0].options()));
    T* const made = asked.states[g].template mutable_data_ptr<T>();
    const auto core = asked.direction.grid(cores, g);
    if (g == 0)
      first_states(tree, shapes, core, made);
    else
      states_by_digit(tree, shapes, g, core, states_of(asked, g - 1).data(), asked.digits[g].size(), made);
  }
  Room room;
  T* const table = room.take<T>(shapes.tables[last].j * shapes.tables[last].slice());
  pack_slices<T>(asked.direction.grid(cores, last), shapes.tables[last], asked.digits[last], table);
  write_rows<T>(tree, shapes, states_of(asked, last - 1).data(), table, out);
}

// -- gradients ----------------------------------------------------------------------------------------

// One row (j, s) of a core's gradient from its numbers at the digits met, which lie `apart`.
template <typename T>
void put_digits(const SliceTable& t, const Digits& met, const T* numbers, int64_t apart, T* row) {
  int64_t next = 0;
  for (const auto digit : met) {
    std::fill(row + next * t.s, row + digit * t.s, T(0));
    if (t.s == 1)
      row[digit] = *numbers;
    else
      std::memcpy(row + digit * t.s, numbers, t.s * sizeof(T));
    numbers += apart;
    next = digit + 1;
  }
  std::fill(row + next * t.s, row + t.j * t.s, T(0));
}

// The gradient of a core's slices: states (lead, r), transposed, times gradients (lead, width) of all nodes of a digit.
template <typename T>
class SliceGradients {
 public:
  SliceGradients(const Tree& tree, const TableShapes& shapes, size_t g, const T* const* states,
                 const std::vector<const T*>& grads)
      : level_(tree.levels[g]), by_(level_, shapes.tables[g].j), states_(states), grads_(grads), lead_(shapes.leads[g]),
        wide_r_(shapes.tables[g - 1].wide_s), width_(shapes.tables[g].width) {}

  struct Terms {
    std::vector<const T*> lefts, rights;
  };
  // Of n rows and so many columns, whose rows then lie `apart`; the terms are memory to use again.
  void put(Terms& terms, int64_t digit, int64_t row, int64_t n, int64_t column, int64_t n_columns, T* out,
           int64_t apart) const {
    auto& [lefts, rights] = terms;
    lefts.clear(), rights.clear();
    for (auto at = by_.starts[digit]; at < by_.starts[digit + 1]; ++at) {
      lefts.push_back(states_[level_.parents[by_.nodes[at]]] + row);
      rights.push_back(grads_[by_.nodes[at]] + column);
    }
    multiply_(n, n_columns, lead_, static_cast<int64_t>(lefts.size()), lefts.data(), 1, wide_r_, rights.data(), width_,
              out, apart, false);
  }

 private:
  const Tree::Level& level_;
  ByDigit by_;
  const T* const* states_;
  const std::vector<const T*>& grads_;
  int64_t lead_, wide_r_, width_;
  Product<T> multiply_ = small_product<T>();
};

// A core's gradient (r, i, j, s) in the order in which it lies, some rows of all slices at a time.
template <typename T>
void write_gradient_by_rows(const SliceGradients<T>& slices, const SliceTable& t, const Digits& met, bool is_shared,
                            T* out) {
  const auto wide = t.is_last ? t.width : t.wide_s;
  const auto most = wide == lanes_of<T> ? int64_t{8} : int64_t{6};  // as many as the products take at a time
  const auto n_blocks = t.is_last ? int64_t{1} : t.i, n_in_block = t.is_last ? t.i : int64_t{1};
  on_threads((t.r + most - 1) / most, 1, is_shared, [&](int64_t first, int64_t last) {
    Room room;
    T* const sums = room.take<T>(static_cast<int64_t>(met.size()) * most * wide);
    typename SliceGradients<T>::Terms terms;
    for (auto r = first * most; r < std::min(last * most, t.r); r += most) {
      const auto n = std::min(most, t.r - r);
      for (int64_t block = 0; block < n_blocks; ++block) {
        T* sum = sums;
        for (const auto digit : met) slices.put(terms, digit, r, n, block * wide, wide, sum, wide), sum += most * wide;
        for (int64_t k = 0; k < n; ++k)
          for (int64_t at = 0; at < n_in_block; ++at)
            put_digits(t, met, sums + k * wide + at, most * wide, out + ((r + k) * t.i + block + at) * t.j * t.s);
      }
    }
  });
}

// The same slice by slice: where there are many nodes, their gradients are read once.
template <typename T>
void write_gradient_by_slices(const SliceGradients<T>& slices, const SliceTable& t, const Digits& met, T* out) {
  if (static_cast<int64_t>(met.size()) < t.j) std::fill(out, out + t.r * t.i * t.j * t.s, T(0));
  const auto apart = apart_of<T>(t);
  on_threads(static_cast<int64_t>(met.size()), 1, true, [&](int64_t first, int64_t last) {
    Room room;
    T* const sums = room.take<T>(t.r * apart);
    typename SliceGradients<T>::Terms terms;
    for (auto m = first; m < last; ++m) {
      slices.put(terms, met[m], 0, t.r, 0, t.width, sums, apart);
      for (int64_t r = 0; r < t.r; ++r)
        for (int64_t i = 0; i < t.i; ++i)
          std::memcpy(out + ((r * t.i + i) * t.j + met[m]) * t.s, sums + r * apart + i * t.wide_s, t.s * sizeof(T));
    }
  });
}

template <typename T>
void write_core_gradient(const Tree& tree, const TableShapes& shapes, size_t g, const Digits& met,
                         const T* const* states, const std::vector<const T*>& grads, T* out) {
  const auto& t = shapes.tables[g];
  const SliceGradients<T> slices(tree, shapes, g, states, grads);
  const auto n_bytes = tree.levels[g].n() * shapes.state(g) * static_cast<int64_t>(sizeof(T));
  if (!t.is_last && n_bytes > (int64_t{1} << 19))
    write_gradient_by_slices(slices, t, met, out);
  else
    write_gradient_by_rows(slices, t, met, is_shared_work(products_of_level<T>(tree, shapes, g, met.size())), out);
}

template <typename T>
void write_first_gradient(const Tree& tree, const TableShapes& shapes, const std::vector<const T*>& grads, T* out) {
  const auto& t = shapes.tables[0];
  std::fill(out, out + t.i * t.j * t.s, T(0));
  const auto& digits = tree.levels[0].digits;
  for (size_t k = 0; k < digits.size(); ++k)
    for (int64_t i = 0; i < t.i; ++i)
      std::memcpy(out + (i * t.j + digits[k]) * t.s, grads[k] + i * t.wide_s, t.s * sizeof(T));
}

// Gradients of the states before an inner core: every node's times its slice transposed, summed where parents are one.
template <typename T>
std::vector<const T*> state_gradients_by_digit(Room& room, const Tree& tree, const TableShapes& shapes, size_t g,
                                               const Grid<const T>& core, size_t n_digits,
                                               const std::vector<const T*>& grads) {
  const auto& t = shapes.tables[g];
  const auto& level = tree.levels[g];
  const ByDigit by(level, t.j);
  const auto multiply = four_dots<T>();
  const auto lead = shapes.leads[g], wide_r = shapes.tables[g - 1].wide_s, apart = apart_of<T>(t), size = lead * wide_r;
  T* const made = room.take<T>(level.n() * size);
  const bool is_shared = is_shared_work(products_of_level<T>(tree, shapes, g, n_digits));
  on_threads(t.j, 1, is_shared, [&](int64_t first, int64_t last) {
    std::vector<T> rows(4 * apart);
    for (auto digit = first; digit < last; ++digit) {
      if (by.starts[digit] == by.starts[digit + 1]) continue;
      for (int64_t r = 0; r < wide_r; r += 4) {
        const auto n = std::clamp<int64_t>(t.r - r, 0, 4);
        copy_rows(core, t, digit, r, n, apart, rows.data());
        std::fill(rows.data() + n * apart, rows.data() + 4 * apart, T(0));
        for (auto at = by.starts[digit]; at < by.starts[digit + 1]; ++at) {
          const auto node = by.nodes[at];
          multiply(lead, t.width, grads[node], t.width, rows.data(), apart, made + node * size + r, wide_r);
        }
      }
    }
  });
  const auto& parents = tree.levels[g - 1];
  const auto add = row_adder<T>();
  std::vector<const T*> at(parents.n());
  for (int64_t p = 0; p < parents.n(); ++p) {
    T* const total = made + parents.first_child[p] * size;
    for (auto k = parents.first_child[p] + 1; k < parents.first_child[p + 1]; ++k) add(total, made + k * size, size);
    at[p] = total;
  }
  return at;
}

// The same before the last core, which is thin: its table is made, and turned.
template <typename T>
std::vector<const T*> last_state_gradients(Room& room, const Tree& tree, const TableShapes& shapes,
                                           const Grid<const T>& core, const Digits& met,
                                           const std::vector<const T*>& grads) {
  const auto g = shapes.n() - 1;
  const auto& t = shapes.tables[g];
  T* const table = room.take<T>(t.j * t.slice());
  pack_slices<T>(core, t, met, table);
  const T* const transposed = transposed_slices<T>(room, table, t, met);
  std::vector<T*> made(tree.levels[g - 1].n());
  T* const start = room.take<T>(tree.levels[g - 1].n() * shapes.state(g - 1));
  for (size_t k = 0; k < made.size(); ++k) made[k] = start + static_cast<int64_t>(k) * shapes.state(g - 1);
  add_state_gradient(tree, shapes, g, grads, transposed, made, false);
  return {made.begin(), made.end()};
}

// Into `out`, memory of every core's size, null for those whose gradient nobody wants.
template <typename T>
void gradients_at_once(const Asked<T>& asked, const std::vector<Tensor>& cores, const T* grad,
                       const std::vector<T*>& out) {
  const auto& shapes = asked.shapes();
  const auto& tree = *asked.direction.whole;
  const auto first = static_cast<size_t>(
      std::find_if(out.begin(), out.end(), [](const T* one) { return one != nullptr; }) - out.begin());
  Room room;
  auto grads = row_gradients(room, tree, shapes, grad);
  for (auto g = shapes.n() - 1; g > 0; --g) {
    const auto& met = asked.digits[g];
    const auto core = asked.direction.grid(cores, g);
    if (out[g] != nullptr)
      write_core_gradient(tree, shapes, g, met, states_of(asked, g - 1).data(), grads, out[g]);
    if (first >= g) return;
    grads = g + 1 == shapes.n() ? last_state_gradients(room, tree, shapes, core, met, grads)
                                : state_gradients_by_digit(room, tree, shapes, g, core, met.size(), grads);
  }
  if (out[0] != nullptr) write_first_gradient(tree, shapes, grads, out[0]);
}

// -- either way ---------------------------------------------------------------------------------------

// Into `out` (ids, dim); gives what the way back needs.
template <typename T>
c10::intrusive_ptr<Asked<T>> rows_of_cores(const Tensor& ids, const std::vector<Tensor>& cores, int64_t max_bytes,
                                           const Tensor& out) {
  auto asked = c10::make_intrusive<Asked<T>>(ids, cores);
  T* const rows = out.template mutable_data_ptr<T>();
  if (fits_at_once(*asked, max_bytes))
    rows_at_once(*asked, cores, rows);
  else
    rows_in_parts(*asked, cores, max_bytes, rows);
  return asked;
}

// Undefined for cores that do not need one.
template <typename T>
std::vector<Tensor> gradients_of_cores(const Asked<T>& asked, const std::vector<Tensor>& cores, const Tensor& grad,
                                       int64_t max_bytes, const std::vector<bool>& needed) {
  std::vector<Tensor> found(cores.size());
  std::vector<T*> out(cores.size(), nullptr);
  for (size_t k = 0; k < cores.size(); ++k) {
    if (!needed[k]) continue;
    found[k] = at::empty(cores[k].sizes(), grad.options());
    out[k] = found[k].template mutable_data_ptr<T>();
  }
  const T* const rows = grad.const_data_ptr<T>();
  if (!asked.states.empty())
    gradients_at_once(asked, cores, rows, out);
  else
    gradients_in_parts(asked, cores, rows, max_bytes, out);
  return found;
}

}  // namespace tensortrain
