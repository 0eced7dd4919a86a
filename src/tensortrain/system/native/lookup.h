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
  int64_t slice() const { return r * width; }
};

struct TableShapes {
  std::vector<SliceTable> tables;
  std::vector<int64_t> leads;  // output modes before each table

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
  // Numbers of a state after table g.
  int64_t state(size_t g) const { return leads[g] * tables[g].width; }
  int64_t products(size_t g) const { return leads[g] * tables[g].slice(); }
};

inline bool is_large_work(int64_t n_products) { return n_products > 2000000; }

// -- cores and tables ---------------------------------------------------------------------------------

template <typename T>
void pack_slices(const Grid<const T>& core, const SliceTable& t, T* out) {
  on_threads(t.j, 1, is_large_work(t.j * t.slice()), [&](int64_t first, int64_t last) {
    std::vector<T> row(t.width);
    for (auto digit = first; digit < last; ++digit)
      for (int64_t r = 0; r < t.r; ++r) {
        const T* const from = core.data + digit * core.at_b + r * core.at_r;
        for (int64_t i = 0; i < t.i; ++i) {
          T* const to = row.data() + i * t.wide_s;
          const T* const numbers = from + i * core.at_a;
          if (core.at_s == 1 || t.s == 1)
            std::memcpy(to, numbers, t.s * sizeof(T));
          else
            for (int64_t s = 0; s < t.s; ++s) to[s] = numbers[s * core.at_s];
        }
        put_row(row.data(), r, t.r, t.width, out + digit * t.slice());
      }
  });
}

template <typename T>
Tensor pack_core(const Tensor& core, bool is_last) {
  const auto t = SliceTable::of<T>(core.sizes().vec(), is_last);
  const Tensor table = at::empty({t.j, t.r, t.width}, core.options());
  pack_slices<T>(grid_of<T>(core), t, table.mutable_data_ptr<T>());
  return table;
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

// Short numbers are divided several times as fast.
inline int64_t quotient(int64_t a, int64_t b) {
  if (static_cast<uint64_t>(a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// Distinct prefixes of ids in order, level by level; children of a node follow each other.
struct Tree {
  struct Level {
    std::vector<int64_t> digits, parents, first_child;  // of the last level: where its places begin
    int64_t n() const { return static_cast<int64_t>(digits.size()); }
    void expect(int64_t n) {
      for (auto* one : {&digits, &parents, &first_child}) one->reserve(n + 1);
    }
  };
  std::vector<Level> levels;
  std::vector<int64_t> places;

  Tree(const std::pair<int64_t, int64_t>* pairs, int64_t n, const Sizes& modes) : levels(modes.size()), places(n) {
    const auto last = modes.size() - 1;
    Sizes before(modes.size(), -1), digits(modes.size());  // prefixes of the id before, digits of this one
    for (auto& level : levels) level.expect(n);
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
        const auto parent = quotient(prefix, modes[g]);
        digits[g] = prefix - parent * modes[g];
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
void in_parts(const TableShapes& shapes, int64_t n, int64_t item, int64_t max_bytes, const Work& work) {
  double each = static_cast<double>(shapes.state(shapes.n() - 1));
  double n_prefixes = static_cast<double>(shapes.tables[0].j);
  for (size_t g = 1; g + 1 < shapes.n(); ++g) {
    n_prefixes *= static_cast<double>(shapes.tables[g].j);
    each += 2.0 * static_cast<double>(shapes.state(g)) * std::min(1.0, n_prefixes / static_cast<double>(n));
  }
  const auto bytes = std::min(max_bytes, (int64_t{1} << 20) * at::get_num_threads());
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
    T* const out = t.width == t.i ? row : scratch;
    const T* const slice = table + digit * t.slice();
    multiply(lead, t.width, t.r, 1, &state, wide_r, 1, &slice, out, t.width, false);
    if (out == row) return;
    for (int64_t l = 0; l < lead; ++l) std::memcpy(row + l * t.i, out + l * t.width, t.i * sizeof(T));
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
  Sizes modes;
  for (const auto& table : shapes.tables) modes.push_back(table.j);
  in_parts(shapes, static_cast<int64_t>(pairs.size()), sizeof(T), max_bytes, [&](int64_t first, int64_t n_part) {
    rows_in_order(Tree(pairs.data() + first, n_part, modes), shapes, tables, rows);
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

// -- nodes by digit -----------------------------------------------------------------------------------

using Digits = std::vector<int64_t>;

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

}  // namespace tensortrain
