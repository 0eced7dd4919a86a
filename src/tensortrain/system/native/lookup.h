// Rows of a table that is a chain of cores: the digits of every id pick a slice of each core, and the slices are
// multiplied. Ids are put in order, so that equal ids and common leading digits are computed once.
#pragma once

#include "merge.h"
#include "room.h"
#include "small_products.h"
#include "threads.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/empty.h>

#include <cstring>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

namespace tensortrain {

// A core (r, i, j, s) as a table of slices (j, r, i, s), where s, and i in the last core, is filled up with zeros to
// whole vectors; each slice (r, width) lies in panels.
struct SliceTable {
  int64_t r, i, j, s;
  bool is_last;
  int64_t wide_s, width;  // of a row of a slice, zeros included

  template <typename T>
  static SliceTable of(const Sizes& core, bool is_last) {
    SliceTable t{core[0], core[1], core[2], core[3], is_last, 0, 0};
    t.wide_s = is_last ? 1 : whole_lanes<T>(t.s);
    t.width = is_last ? whole_lanes<T>(t.i) : t.i * t.wide_s;
    return t;
  }
  int64_t used_width() const { return is_last ? i : width; }
  int64_t slice() const { return r * width; }
};

struct TableShapes {
  std::vector<SliceTable> tables;
  std::vector<int64_t> leads;  // output modes before each table
  std::vector<int64_t> places;  // in a row, of its numbers as the tables make them; empty where these are in order

  template <typename T>
  static TableShapes of(const std::vector<Sizes>& cores) {
    TableShapes shapes;
    int64_t lead = 1;
    for (size_t g = 0; g < cores.size(); ++g) {
      shapes.tables.push_back(SliceTable::of<T>(cores[g], g + 1 == cores.size()));
      shapes.leads.push_back(lead);
      lead *= cores[g][1];
    }
    shapes.leads.push_back(lead);
    return shapes;
  }
  size_t n() const { return tables.size(); }
  int64_t dim() const { return leads.back(); }
  int64_t n_ids() const {
    int64_t n = 1;
    for (const auto& table : tables) n *= table.j;
    return n;
  }
  // Products for so many nodes of every level.
  double work(const std::vector<double>& n_nodes) const {
    double sum = 0;
    for (size_t g = 1; g < n(); ++g) sum += n_nodes[g] * static_cast<double>(products(g));
    return sum;
  }
  // Nodes of every level at so many distinct ids, at most.
  std::vector<double> most_nodes(int64_t n_distinct) const {
    std::vector<double> found;
    double n_prefixes = 1;
    for (const auto& table : tables) {
      n_prefixes *= static_cast<double>(table.j);
      found.push_back(std::min(n_prefixes, static_cast<double>(n_distinct)));
    }
    return found;
  }
  int64_t n_numbers() const {
    int64_t n = 0;
    for (const auto& table : tables) n += table.j * table.slice();
    return n;
  }
  // Numbers of a state after table g.
  int64_t state(size_t g) const { return leads[g] * tables[g].width; }
  int64_t products(size_t g) const { return leads[g] * tables[g].slice(); }
};

inline bool is_large_work(int64_t n_products) { return n_products > 2000000; }

// -- cores and tables ---------------------------------------------------------------------------------

// Which slices of a table are asked for.
using Digits = std::vector<int64_t>;

inline Digits all_digits(int64_t n) {
  Digits digits(n);
  std::iota(digits.begin(), digits.end(), int64_t{0});
  return digits;
}

template <typename T>
void pack_slices(const Grid<const T>& core, const SliceTable& t, const Digits& digits, T* out) {
  const auto n = static_cast<int64_t>(digits.size());
  on_threads(n, 1, is_large_work(n * t.slice()), [&](int64_t first, int64_t last) {
    std::vector<T> row(t.width);
    for (auto k = first; k < last; ++k)
      for (int64_t r = 0; r < t.r; ++r) {
        const T* const from = core.data + digits[k] * core.at_b + r * core.at_r;
        for (int64_t i = 0; i < t.i; ++i) {
          T* const to = row.data() + i * t.wide_s;
          const T* const numbers = from + i * core.at_a;
          if (core.at_s == 1 || t.s == 1)
            std::memcpy(to, numbers, t.s * sizeof(T));
          else
            for (int64_t s = 0; s < t.s; ++s) to[s] = numbers[s * core.at_s];
        }
        put_row(row.data(), r, t.r, t.width, out + digits[k] * t.slice());
      }
  });
}

template <typename T>
Tensor pack_core(const Tensor& core, bool is_last) {
  const auto t = SliceTable::of<T>(core.sizes().vec(), is_last);
  const Tensor table = at::empty({t.j, t.r, t.width}, core.options());
  pack_slices<T>(grid_of<T>(core), t, all_digits(t.j), table.mutable_data_ptr<T>());
  return table;
}

// The core's gradient (r, i, j, s) from that of the slices asked for, the others being zero.
template <typename T>
void unpack_slices(const T* table, const SliceTable& t, const Digits& digits, T* out) {
  const bool is_full = static_cast<int64_t>(digits.size()) == t.j;
  on_threads(t.r, 1, is_large_work(t.j * t.slice()), [&](int64_t first, int64_t last) {
    for (auto r = first; r < last; ++r)
      for (int64_t i = 0; i < t.i; ++i) {
        T* const row = out + (r * t.i + i) * t.j * t.s;
        if (!is_full) std::fill(row, row + t.j * t.s, T(0));
        for (const auto j : digits) {
          const T* const from = table + (j * t.r + r) * t.width + i * t.wide_s;
          if (t.s == 1)
            row[j] = *from;
          else
            std::memcpy(row + j * t.s, from, t.s * sizeof(T));
        }
      }
  });
}

// The same of a core whose ranks have changed places.
template <typename T>
void unpack_turned(const T* table, const SliceTable& t, const Digits& digits, T* out) {
  const auto plane = t.i * t.j * t.r;  // of the core (s, i, j, r)
  if (static_cast<int64_t>(digits.size()) != t.j) std::fill(out, out + t.s * plane, T(0));
  const auto n = static_cast<int64_t>(digits.size());
  on_threads(n, 1, is_large_work(n * t.slice()), [&](int64_t first, int64_t last) {
    for (auto k = first; k < last; ++k)
      for (int64_t i = 0; i < t.i; ++i) {
        const T* const from = table + digits[k] * t.slice() + i * t.wide_s;
        T* const to = out + (i * t.j + digits[k]) * t.r;
        for (int64_t s = 0; s < t.s; ++s)
          for (int64_t r = 0; r < t.r; ++r) to[s * plane + r] = from[r * t.width + s];
      }
  });
}

// Slices (r, width) as (used width, r), in panels too, with r filled up to whole vectors.
template <typename T>
T* transposed_slices(Room& room, const T* table, const SliceTable& t, const Digits& digits) {
  const auto wide_r = whole_lanes<T>(t.r), width = t.used_width();
  T* const out = room.take<T>(t.j * width * wide_r);
  const auto n = static_cast<int64_t>(digits.size());
  constexpr int64_t side = 2 * lanes_of<T>;
  on_threads(n, 1, is_large_work(n * t.slice()), [&](int64_t first, int64_t last) {
    for (auto k = first; k < last; ++k) {
      const T* const from = table + digits[k] * t.slice();
      T* const to = out + digits[k] * width * wide_r;
      if (wide_r != t.r) std::fill(to, to + width * wide_r, T(0));
      for (int64_t r0 = 0; r0 < t.r; r0 += side)  // squares that lie in few lines of the cache on both sides
        for (int64_t w0 = 0; w0 < width; w0 += side) {
          const auto r1 = std::min(r0 + side, t.r), n_w = std::min(side, width - w0);
          const auto lines = wide_r - r0 < side ? lanes_of<T> : side;
          for (auto r = r0; r < r1; ++r) {
            const T* const row = from + in_panels<T>(r, w0, t.r, t.width);
            T* const column = to + in_panels<T>(w0, r, width, wide_r);
            for (int64_t w = 0; w < n_w; ++w) column[w * lines] = row[w];
          }
        }
    }
  });
  return out;
}

// -- ids in order -------------------------------------------------------------------------------------

using Pairs = std::vector<std::pair<int64_t, int64_t>>;

// Ids with the place of each, sorted by id and then by place.
inline Pairs in_order(const int64_t* ids, int64_t n, int64_t most) {
  Pairs pairs(n), other;
  for (int64_t k = 0; k < n; ++k) pairs[k] = {ids[k], k};
  if (n < 256) {
    std::sort(pairs.begin(), pairs.end());
    return pairs;
  }
  other.resize(n);
  constexpr int bits = 11;
  std::vector<int64_t> starts(1 << bits);
  for (int shift = 0; shift < 63 && (most >> shift) > 0; shift += bits) {
    std::fill(starts.begin(), starts.end(), 0);
    const auto digit = [&](int64_t id) { return (id >> shift) & ((1 << bits) - 1); };
    for (const auto& pair : pairs) ++starts[digit(pair.first)];
    for (int64_t total = 0, d = 0; d < (1 << bits); ++d) total += std::exchange(starts[d], total);
    for (const auto& pair : pairs) other[starts[digit(pair.first)]++] = pair;
    std::swap(pairs, other);
  }
  return pairs;
}

// Distinct prefixes of ids in order, level by level; children of a node follow each other.
struct Tree {
  struct Level {
    std::vector<int64_t> digits, parents, first_child;  // of the last level: where its places begin
    int64_t n() const { return static_cast<int64_t>(digits.size()); }
  };
  std::vector<Level> levels;
  std::vector<int64_t> places;

  Tree(const std::pair<int64_t, int64_t>* pairs, int64_t n, const TableShapes& shapes)
      : levels(shapes.n()), places(n) {
    const auto last = shapes.n() - 1;
    std::vector<int64_t> before(shapes.n(), -1), digits(shapes.n());  // prefixes of the id before, digits of this one
    for (int64_t k = 0; k < n; ++k) {
      places[k] = pairs[k].second;
      auto prefix = pairs[k].first;
      if (prefix == before[last]) continue;
      size_t first = 0;  // level that is new
      for (auto g = last; g > 0; --g) {
        if (prefix == before[g]) {
          first = g + 1;
          break;
        }
        before[g] = prefix;
        const auto parent = quotient(prefix, shapes.tables[g].j);
        digits[g] = prefix - parent * shapes.tables[g].j;
        prefix = parent;
      }
      if (first == 0 && prefix == before[0]) first = 1;
      if (first == 0) before[0] = digits[0] = prefix;
      for (auto g = first; g <= last; ++g) {
        auto& level = levels[g];
        level.digits.push_back(digits[g]);
        level.parents.push_back(g == 0 ? 0 : levels[g - 1].n() - 1);
        level.first_child.push_back(g == last ? k : levels[g + 1].n());
      }
    }
    for (size_t g = 0; g <= last; ++g) levels[g].first_child.push_back(g == last ? n : levels[g + 1].n());
  }

 private:
  // Short numbers are divided several times as fast.
  static int64_t quotient(int64_t a, int64_t b) {
    if (static_cast<uint64_t>(a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return a / b;
  }
};

template <typename T>
using Tables = std::vector<const T*>;  // slices of each core, filled where they are asked for

template <typename T>
Tables<T> tables_of(const std::vector<Tensor>& tensors) {
  Tables<T> tables;
  for (const auto& tensor : tensors) tables.push_back(tensor.const_data_ptr<T>());
  return tables;
}

// Calls work(first, n) for parts of ids in order, of which as much lies between the steps as the cache of a core holds:
// larger blocks come fresh from the system, and the first touch of their pages costs more than the products.
template <typename Work>
void in_parts(const TableShapes& shapes, int64_t n, int64_t item, int64_t max_bytes, const Work& work,
              int64_t least_bytes = 0) {
  double each = static_cast<double>(shapes.state(shapes.n() - 1));
  double n_prefixes = static_cast<double>(shapes.tables[0].j);
  for (size_t g = 1; g + 1 < shapes.n(); ++g) {
    n_prefixes *= static_cast<double>(shapes.tables[g].j);
    each += 2.0 * static_cast<double>(shapes.state(g)) * std::min(1.0, n_prefixes / static_cast<double>(n));
  }
  const auto bytes = std::min(max_bytes, std::max((int64_t{1} << 20) * at::get_num_threads(), least_bytes));
  const auto part = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(bytes / item) / each));
  for (int64_t first = 0; first < n; first += part) work(first, std::min(part, n - first));
}

// -- rows ---------------------------------------------------------------------------------------------

// The states of a level from those of the level before: (lead, r) times the slice (r, width).
template <typename T>
void next_states(const Tree& tree, const TableShapes& shapes, size_t g, const T* const* parents, const T* table,
                 T* states) {
  const auto& t = shapes.tables[g];
  const auto& level = tree.levels[g];
  const auto multiply = panel_product<T>();
  const auto wide_r = shapes.tables[g - 1].wide_s, size = shapes.state(g);
  on_threads(level.n(), 8, is_large_work(level.n() * shapes.products(g)), [&](int64_t first, int64_t last) {
    for (auto k = first; k < last; ++k) {
      const T* const slice = table + level.digits[k] * t.slice();
      multiply(shapes.leads[g], t.width, t.r, 1, &parents[level.parents[k]], wide_r, 1, &slice, states + k * size,
               t.width, false);
    }
  });
}

// Where the state of every node of all levels but the last lies. Those of the first are slices.
template <typename T>
struct States {
  std::vector<std::vector<const T*>> at;

  States(Room& room, const Tree& tree, const TableShapes& shapes, const Tables<T>& tables) : at(shapes.n() - 1) {
    for (size_t g = 0; g + 1 < shapes.n(); ++g) {
      const auto& level = tree.levels[g];
      const auto size = shapes.state(g);
      const T* start = tables[0];
      if (g > 0) {
        T* const made = room.take<T>(level.n() * size);
        next_states<T>(tree, shapes, g, at[g - 1].data(), tables[g], made);
        start = made;
      }
      at[g].resize(level.n());
      for (int64_t k = 0; k < level.n(); ++k) at[g][k] = start + (g == 0 ? level.digits[k] : k) * size;
    }
  }
};

// One row of the last level, (lead, i) without the zeros of a row of slices.
template <typename T>
struct RowMaker {
  const TableShapes& shapes;
  const T* table;
  PanelProduct<T> multiply = panel_product<T>();
  const SliceTable& t = shapes.tables.back();
  int64_t lead = shapes.leads[shapes.n() - 1], wide_r = shapes.tables[shapes.n() - 2].wide_s;

  void operator()(const T* state, int64_t digit, T* row, T* scratch) const {
    const bool fits = t.width == t.i && shapes.places.empty();
    T* const out = fits ? row : scratch;
    const T* const slice = table + digit * t.slice();
    multiply(lead, t.width, t.r, 1, &state, wide_r, 1, &slice, out, t.width, false);
    if (fits) return;
    const auto* place = shapes.places.data();
    for (int64_t l = 0; l < lead; ++l) {
      if (shapes.places.empty())
        std::memcpy(row + l * t.i, out + l * t.width, t.i * sizeof(T));
      else
        for (int64_t i = 0; i < t.i; ++i) row[*place++] = out[l * t.width + i];
    }
  }
};

// Ids as they come: nothing is shared but the tables.
template <typename T>
void rows_of_pairs(const int64_t* ids, int64_t n, const TableShapes& shapes, const Tables<T>& tables, T* out) {
  const RowMaker<T> make{shapes, tables[1]};
  const T* const states = tables[0];
  const auto j = shapes.tables[1].j, slice = shapes.tables[0].slice(), dim = shapes.dim();
  on_threads(n, 16, is_large_work(n * shapes.products(1)), [&](int64_t first, int64_t last) {
    std::vector<T> scratch(shapes.state(1));
    for (auto k = first; k < last; ++k)
      make(states + ids[k] / j * slice, ids[k] % j, out + k * dim, scratch.data());
  });
}

// Rows are read and written one by one all over a batch: each number takes as long as so many products.
constexpr int64_t products_of_a_number = 16;

// The last level, from the states before it.
template <typename T>
void write_rows(const Tree& tree, const TableShapes& shapes, const T* const* parents, const T* table, T* out) {
  const auto g = shapes.n() - 1;
  const auto& leaves = tree.levels[g];
  const RowMaker<T> make{shapes, table};
  const auto dim = shapes.dim(), n_numbers = static_cast<int64_t>(tree.places.size()) * dim;
  const auto work = leaves.n() * shapes.products(g) + n_numbers * products_of_a_number;
  on_threads(leaves.n(), 16, is_large_work(work), [&](int64_t first, int64_t last) {
    std::vector<T> scratch(shapes.state(g));
    for (auto k = first; k < last; ++k) {
      auto place = leaves.first_child[k];
      T* const row = out + tree.places[place] * dim;
      make(parents[leaves.parents[k]], leaves.digits[k], row, scratch.data());
      while (++place < leaves.first_child[k + 1]) std::memcpy(out + tree.places[place] * dim, row, dim * sizeof(T));
    }
  });
}

template <typename T>
void rows_in_order(const Tree& tree, const TableShapes& shapes, const Tables<T>& tables, T* out) {
  Room room;
  const States<T> states(room, tree, shapes, tables);
  write_rows<T>(tree, shapes, states.at.back().data(), tables.back(), out);
}

// Whether reading the first slices in order saves more than the sorting costs.
inline bool pays_to_sort(const TableShapes& shapes, int64_t n, int64_t item) {
  const auto& first = shapes.tables[0];
  return shapes.n() > 2 || (n >= 2 * first.j && first.slice() * item >= 2048);
}

template <typename T>
void all_rows(const Pairs& pairs, const TableShapes& shapes, const Tables<T>& tables, int64_t max_bytes, T* rows) {
  in_parts(shapes, static_cast<int64_t>(pairs.size()), sizeof(T), max_bytes, [&](int64_t first, int64_t n_part) {
    rows_in_order(Tree(pairs.data() + first, n_part, shapes), shapes, tables, rows);
  });
}

template <typename T>
Tensor looked_up(const Tensor& ids, const std::vector<Tensor>& tables, const std::vector<Sizes>& cores,
                 int64_t max_bytes) {
  const auto shapes = TableShapes::of<T>(cores);
  const auto n = ids.numel();
  const Tensor out = at::empty({n, shapes.dim()}, tables[0].options());
  const auto* const first_id = ids.const_data_ptr<int64_t>();
  T* const rows = out.mutable_data_ptr<T>();
  if (!pays_to_sort(shapes, n, sizeof(T))) {
    rows_of_pairs(first_id, n, shapes, tables_of<T>(tables), rows);
    return out;
  }
  all_rows(in_order(first_id, n, shapes.n_ids() - 1), shapes, tables_of<T>(tables), max_bytes, rows);
  return out;
}

// -- gradients ----------------------------------------------------------------------------------------

// The gradient of each distinct row, (lead, width): summed over equal ids, filled up to whole vectors.
template <typename T>
std::vector<const T*> row_gradients(Room& room, const Tree& tree, const TableShapes& shapes, const T* grad) {
  const auto g = shapes.n() - 1;
  const auto& leaves = tree.levels[g];
  const auto& t = shapes.tables[g];
  const auto dim = shapes.dim(), lead = shapes.leads[g], size = shapes.state(g);
  const bool is_padded = t.width != t.i || !shapes.places.empty();
  const bool all_fit = !is_padded && leaves.n() == static_cast<int64_t>(tree.places.size());
  std::vector<const T*> at(leaves.n());
  T* const sums = all_fit ? nullptr : room.take<T>(leaves.n() * size);
  const auto add = row_adder<T>();
  const auto n_places = static_cast<int64_t>(tree.places.size()), n_numbers = n_places * dim;
  const auto ask_for = [&](int64_t at) {  // rows lie all over memory
    if (at >= n_places) return;
    for (int64_t k = 0; k < dim; k += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(grad + tree.places[at] * dim + k);
  };
  const bool is_large = !all_fit && is_large_work(n_numbers * products_of_a_number);
  on_threads(leaves.n(), 64, is_large, [&](int64_t first, int64_t last) {
    std::vector<T> scratch(dim);
    for (auto k = first; k < last; ++k) {
      const auto start = leaves.first_child[k], stop = leaves.first_child[k + 1];
      const T* total = grad + tree.places[start] * dim;
      ask_for(start + 4);
      if (stop > start + 1) {
        T* const sum = is_padded ? scratch.data() : sums + k * size;
        std::memcpy(sum, total, dim * sizeof(T));
        for (auto place = start + 1; place < stop; ++place) {
          ask_for(place + 4);
          add(sum, grad + tree.places[place] * dim, dim);
        }
        total = sum;
      }
      at[k] = total;
      if (!is_padded) continue;
      T* const row = sums + k * size;
      const auto* place = shapes.places.data();
      for (int64_t l = 0; l < lead; ++l) {
        if (shapes.places.empty())
          std::memcpy(row + l * t.width, total + l * t.i, t.i * sizeof(T));
        else
          for (int64_t i = 0; i < t.i; ++i) row[l * t.width + i] = total[*place++];
        std::fill(row + l * t.width + t.i, row + (l + 1) * t.width, T(0));
      }
      at[k] = row;
    }
  });
  return at;
}

// Nodes of a level by digit: starts, and the nodes.
struct ByDigit {
  std::vector<int64_t> starts, nodes;

  ByDigit(const Tree::Level& level, int64_t n_digits) : starts(n_digits + 1), nodes(level.n()) {
    for (const auto digit : level.digits) ++starts[digit + 1];
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    auto next = starts;
    for (int64_t k = 0; k < level.n(); ++k) nodes[next[level.digits[k]]++] = k;
  }
};

// The table's gradient, added up digit by digit: states (lead, r), transposed, times gradients (lead, width).
template <typename T>
void add_table_gradient(const Tree& tree, const TableShapes& shapes, size_t g, const std::vector<const T*>& states,
                        const std::vector<const T*>& grads, T* out) {
  const auto& t = shapes.tables[g];
  const auto& level = tree.levels[g];
  const ByDigit by(level, t.j);
  const auto multiply = small_product<T>();
  const auto wide_r = shapes.tables[g - 1].wide_s;
  on_threads(t.j, 1, is_large_work(level.n() * shapes.products(g)), [&](int64_t first, int64_t last) {
    std::vector<const T*> lefts, rights;
    for (auto digit = first; digit < last; ++digit) {
      lefts.clear(), rights.clear();
      for (auto at = by.starts[digit]; at < by.starts[digit + 1]; ++at) {
        lefts.push_back(states[level.parents[by.nodes[at]]]);
        rights.push_back(grads[by.nodes[at]]);
      }
      const auto n_terms = static_cast<int64_t>(lefts.size());
      if (n_terms > 0)
        multiply(t.r, t.width, shapes.leads[g], n_terms, lefts.data(), 1, wide_r, rights.data(), t.width,
                 out + digit * t.slice(), t.width, true);
    }
  });
}

// Gradients of the states before table g: those of all children, times slices transposed.
template <typename T>
void add_state_gradient(const Tree& tree, const TableShapes& shapes, size_t g, const std::vector<const T*>& grads,
                        const T* transposed, const std::vector<T*>& out, bool adds) {
  const auto& t = shapes.tables[g];
  const auto& parents = tree.levels[g - 1];
  const auto& level = tree.levels[g];
  const auto multiply = panel_product<T>();
  const auto wide_r = shapes.tables[g - 1].wide_s, used = t.used_width();
  on_threads(parents.n(), 4, is_large_work(level.n() * shapes.products(g)), [&](int64_t first, int64_t last) {
    std::vector<const T*> slices;
    for (auto p = first; p < last; ++p) {
      const auto start = parents.first_child[p], stop = parents.first_child[p + 1];
      slices.clear();
      for (auto k = start; k < stop; ++k) slices.push_back(transposed + level.digits[k] * used * wide_r);
      multiply(shapes.leads[g], wide_r, used, stop - start, grads.data() + start, t.width, 1, slices.data(), out[p],
               wide_r, adds);
    }
  });
}

template <typename T>
void add_gradients(const Tree& tree, const TableShapes& shapes, const Tables<T>& tables, const Tables<T>& transposed,
                   const T* grad, const std::vector<T*>& out) {
  Room room;
  const States<T> states(room, tree, shapes, tables);
  auto grads = row_gradients(room, tree, shapes, grad);
  for (auto g = shapes.n() - 1; g > 0; --g) {
    add_table_gradient(tree, shapes, g, states.at[g - 1], grads, out[g]);
    const auto& level = tree.levels[g - 1];
    const auto size = shapes.state(g - 1);
    T* const start = g > 1 ? room.take<T>(level.n() * size) : out[0];
    std::vector<T*> into(level.n());
    for (int64_t k = 0; k < level.n(); ++k) into[k] = start + (g > 1 ? k : level.digits[k]) * size;
    add_state_gradient(tree, shapes, g, grads, transposed[g], into, g == 1);
    grads.assign(into.begin(), into.end());
  }
}

// -- rows of cores, from their digits to their gradients ----------------------------------------------

// The digits of each table that ids ask for.
inline std::vector<Digits> digits_of(const Tree& tree, const TableShapes& shapes) {
  std::vector<Digits> digits(shapes.n());
  for (size_t g = 0; g < shapes.n(); ++g) {
    std::vector<char> is_met(shapes.tables[g].j, 0);
    for (const auto digit : tree.levels[g].digits) is_met[digit] = 1;
    for (int64_t j = 0; j < shapes.tables[g].j; ++j)
      if (is_met[j]) digits[g].push_back(j);
  }
  return digits;
}

// Ids in order, and the way through the chain: from its last core, where that takes less time; ids and rows then have
// their digits the other way round.
template <typename T>
struct Direction {
  bool is_turned = false;
  TableShapes shapes;
  Pairs pairs;
  std::optional<Tree> whole;  // of all ids

  Direction(const Tensor& ids, const std::vector<Tensor>& cores) {
    std::vector<Sizes> forth, back;
    for (const auto& core : cores) forth.push_back(core.sizes().vec());
    for (auto k = cores.size(); k-- > 0;) back.push_back({forth[k][3], forth[k][1], forth[k][2], forth[k][0]});
    shapes = TableShapes::of<T>(forth);
    pairs = in_order(ids.const_data_ptr<int64_t>(), ids.numel(), shapes.n_ids() - 1);
    whole.emplace(pairs.data(), ids.numel(), shapes);
    auto turned = TableShapes::of<T>(back);
    if (!pays_to_turn(turned)) return;
    turned.places.resize(turned.dim());
    for (int64_t at = 0; at < turned.dim(); ++at) {
      int64_t rest = at, place = 0;
      // The digits of `at` from its last one are those of the row from its first one.
      for (auto g = turned.n(); g-- > 0; rest /= turned.tables[g].i)
        place = place * turned.tables[g].i + rest % turned.tables[g].i;
      turned.places[at] = place;
    }
    is_turned = true;
    shapes = std::move(turned);
    pairs = turned_order(ids);
    whole.emplace(pairs.data(), ids.numel(), shapes);
  }

  Grid<const T> grid(const std::vector<Tensor>& cores, size_t g) const {
    if (!is_turned) return grid_of<T>(cores[g]);
    const auto core = grid_of<T>(cores[cores.size() - 1 - g]);
    return {core.data, core.s, core.a, core.b, core.r, core.at_s, core.at_a, core.at_b, core.at_r};
  }

 private:
  bool pays_to_turn(const TableShapes& turned) const {
    const auto n = whole->levels.back().n();
    std::vector<double> n_nodes;
    for (const auto& level : whole->levels) n_nodes.push_back(static_cast<double>(level.n()));
    // Slices are read and written across their rows, and numbers of rows change places, forth and back.
    double turning = 2.0 * products_of_a_number * static_cast<double>(n * shapes.dim());
    for (const auto& t : shapes.tables) turning += 100.0 * static_cast<double>(t.r * t.i * t.s * std::min(t.j, n));
    return 3 * turned.work(turned.most_nodes(n)) + turning < 3 * shapes.work(n_nodes);
  }

  Pairs turned_order(const Tensor& ids) const {
    const auto* const given = ids.const_data_ptr<int64_t>();
    const auto n = ids.numel();
    std::vector<int64_t> found(n);
    for (int64_t k = 0; k < n; ++k) {
      auto rest = given[k];
      for (const auto& table : shapes.tables) {  // the first of which has an id's last digit
        found[k] = found[k] * table.j + rest % table.j;
        rest /= table.j;
      }
    }
    return in_order(found.data(), n, shapes.n_ids() - 1);
  }
};

// What ids ask for; kept for the way back, with the states where there are few.
template <typename T>
struct Asked final : torch::CustomClassHolder {
  Direction<T> direction;
  std::vector<Digits> digits;
  std::vector<Tensor> states;  // of every level but the last, see lookup_once.h

  Asked(const Tensor& ids, const std::vector<Tensor>& cores)
      : direction(ids, cores), digits(digits_of(*direction.whole, direction.shapes)) {}
  const TableShapes& shapes() const { return direction.shapes; }
};

// The tables of some ids, in memory of a room.
template <typename T>
struct CoreTables {
  Room room;
  Tables<T> tables;

  CoreTables(const Asked<T>& asked, const std::vector<Tensor>& cores) {
    for (size_t g = 0; g < cores.size(); ++g) {
      const auto& t = asked.shapes().tables[g];
      T* const table = room.take<T>(t.j * t.slice());
      pack_slices<T>(asked.direction.grid(cores, g), t, asked.digits[g], table);
      tables.push_back(table);
    }
  }
};

// Into `out` (ids, dim).
template <typename T>
void rows_in_parts(const Asked<T>& asked, const std::vector<Tensor>& cores, int64_t max_bytes, T* out) {
  const CoreTables<T> made(asked, cores);
  all_rows(asked.direction.pairs, asked.shapes(), made.tables, max_bytes, out);
}

// Into `out`, memory of every core's size.
template <typename T>
void gradients_in_parts(const Asked<T>& asked, const std::vector<Tensor>& cores, const T* grad, int64_t max_bytes,
                        const std::vector<T*>& out) {
  CoreTables<T> made(asked, cores);
  const auto& shapes = asked.shapes();
  const auto& pairs = asked.direction.pairs;
  Tables<T> transposed(shapes.n());
  std::vector<T*> sums;
  for (size_t g = 0; g < shapes.n(); ++g) {
    const auto& t = shapes.tables[g];
    if (g > 0) transposed[g] = transposed_slices(made.room, made.tables[g], t, asked.digits[g]);
    sums.push_back(made.room.template take<T>(t.j * t.slice()));
    for (const auto j : asked.digits[g]) std::fill(sums[g] + j * t.slice(), sums[g] + (j + 1) * t.slice(), T(0));
  }
  // Every part reads all tables, and adds to all their gradients: tables larger than the cache make for larger parts.
  const auto add = [&](int64_t first, int64_t n_part) {
    add_gradients<T>(Tree(pairs.data() + first, n_part, shapes), shapes, made.tables, transposed, grad, sums);
  };
  const auto n = static_cast<int64_t>(pairs.size()), item = static_cast<int64_t>(sizeof(T));
  in_parts(shapes, n, item, max_bytes, add, 2 * item * shapes.n_numbers());
  const bool is_turned = asked.direction.is_turned;
  for (size_t g = 0; g < shapes.n(); ++g) {
    T* const gradient = out[is_turned ? shapes.n() - 1 - g : g];
    if (gradient != nullptr)
      (is_turned ? &unpack_turned<T> : &unpack_slices<T>)(sums[g], shapes.tables[g], asked.digits[g], gradient);
  }
}

}  // namespace tensortrain
