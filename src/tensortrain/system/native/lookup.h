// Rows of a table that is a chain of cores: the digits of every id pick a slice of each core, and the slices are
// multiplied. Ids are put in order, so that equal ids and common leading digits are computed once.
#pragma once

#include "small_products.h"
#include "threads.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

namespace tensortrain {

using at::Tensor;
using Sizes = std::vector<int64_t>;

// A core (r, i, j, s) as a table of slices (j, r, i, s), where s, and i in the last core, is filled up with zeros to
// whole vectors.
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
Tensor pack_core(const Tensor& core, bool is_last) {
  const auto t = SliceTable::of<T>(core.sizes().vec(), is_last);
  const Tensor table = at::empty({t.j, t.r, t.width}, core.options());
  T* const out = table.mutable_data_ptr<T>();
  const T* const in = core.const_data_ptr<T>();
  const auto sr = core.stride(0), si = core.stride(1), sj = core.stride(2), ss = core.stride(3);
  on_threads(t.j, 1, is_large_work(t.j * t.slice()), [&](int64_t first, int64_t last) {
    for (auto j = first; j < last; ++j)
      for (int64_t r = 0; r < t.r; ++r) {
        T* const row = out + (j * t.r + r) * t.width;
        const T* const from = in + j * sj + r * sr;
        if (is_last) {
          for (int64_t i = 0; i < t.i; ++i) row[i] = from[i * si];
          for (auto i = t.i; i < t.width; ++i) row[i] = 0;
          continue;
        }
        for (int64_t i = 0; i < t.i; ++i) {
          T* const to = row + i * t.wide_s;
          if (ss == 1)
            std::memcpy(to, from + i * si, t.s * sizeof(T));
          else
            for (int64_t s = 0; s < t.s; ++s) to[s] = from[i * si + s * ss];
          for (auto s = t.s; s < t.wide_s; ++s) to[s] = 0;
        }
      }
  });
  return table;
}

// The core's gradient from that of its table, laid out as the table's axes (j, r, i, s): a view (r, i, j, s) of it.
template <typename T>
Tensor unpack_core(const Tensor& table, const SliceTable& t) {
  if (t.is_last) return table.narrow(2, 0, t.i).permute({1, 2, 0}).unsqueeze(3);
  return table.view({t.j, t.r, t.i, t.wide_s}).narrow(3, 0, t.s).permute({1, 2, 0, 3});
}

// Slices (r, width) as (used width, r), with r filled up to whole vectors.
template <typename T>
Tensor transposed_table(const Tensor& given, const SliceTable& t) {
  const auto wide_r = whole_lanes<T>(t.r), width = t.used_width();
  const Tensor found = t.r == wide_r ? at::empty({t.j, width, wide_r}, given.options())
                                     : at::zeros({t.j, width, wide_r}, given.options());
  const T* const table = given.const_data_ptr<T>();
  T* const out = found.mutable_data_ptr<T>();
  on_threads(t.j, 1, is_large_work(t.j * t.slice()), [&](int64_t first, int64_t last) {
    for (auto j = first; j < last; ++j)
      for (int64_t r = 0; r < t.r; ++r) {
        const T* const row = table + (j * t.r + r) * t.width;
        for (int64_t w = 0; w < width; ++w) out[(j * width + w) * wide_r + r] = row[w];
      }
  });
  return found;
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
    std::vector<int64_t> below(shapes.n() + 1, 1);  // how many ids share a prefix
    for (size_t g = shapes.n(); g-- > 0;) below[g] = below[g + 1] * shapes.tables[g].j;
    const auto last = shapes.n() - 1;
    for (int64_t k = 0; k < n; ++k) {
      const auto id = pairs[k].first;
      places[k] = pairs[k].second;
      if (k > 0 && id == pairs[k - 1].first) continue;
      bool is_new = k == 0;
      for (size_t g = 0; g <= last; ++g) {
        const auto prefix = id / below[g + 1];
        if (!is_new && prefix == pairs[k - 1].first / below[g + 1]) continue;
        is_new = true;
        auto& level = levels[g];
        level.digits.push_back(prefix % shapes.tables[g].j);
        level.parents.push_back(g == 0 ? 0 : levels[g - 1].n() - 1);
        level.first_child.push_back(g == last ? k : levels[g + 1].n());
      }
    }
    for (size_t g = 0; g <= last; ++g) levels[g].first_child.push_back(g == last ? n : levels[g + 1].n());
  }
};

template <typename T>
const T* data_of(const Tensor& tensor) {
  return tensor.const_data_ptr<T>();
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
  const auto bytes = std::min<int64_t>(max_bytes, (int64_t{1} << 20) * at::get_num_threads());
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
  const auto multiply = small_product<T>();
  const auto wide_r = shapes.tables[g - 1].wide_s, size = shapes.state(g);
  on_threads(level.n(), 8, is_large_work(level.n() * shapes.products(g)), [&](int64_t first, int64_t last) {
    for (auto k = first; k < last; ++k) {
      const T* const slice = table + level.digits[k] * t.slice();
      multiply(shapes.leads[g], t.width, t.r, 1, &parents[level.parents[k]], wide_r, 1, &slice, t.width,
               states + k * size, t.width, false);
    }
  });
}

// Where the state of every node of all levels but the last lies. Those of the first are slices.
template <typename T>
struct States {
  std::vector<Tensor> made;
  std::vector<std::vector<const T*>> at;

  States(const Tree& tree, const TableShapes& shapes, const std::vector<Tensor>& tables) : at(shapes.n() - 1) {
    for (size_t g = 0; g + 1 < shapes.n(); ++g) {
      const auto& level = tree.levels[g];
      const auto size = shapes.state(g);
      if (g > 0) {
        made.push_back(at::empty({level.n(), size}, tables[0].options()));
        next_states<T>(tree, shapes, g, at[g - 1].data(), data_of<T>(tables[g]), made.back().mutable_data_ptr<T>());
      }
      const T* const start = data_of<T>(g == 0 ? tables[0] : made[g - 1]);
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
  Product<T> multiply = small_product<T>();
  const SliceTable& t = shapes.tables.back();
  int64_t lead = shapes.leads[shapes.n() - 1], wide_r = shapes.tables[shapes.n() - 2].wide_s;

  void operator()(const T* state, int64_t digit, T* row, T* scratch) const {
    const bool fits = t.width == t.i;
    T* const out = fits ? row : scratch;
    const T* const slice = table + digit * t.slice();
    multiply(lead, t.width, t.r, 1, &state, wide_r, 1, &slice, t.width, out, t.width, false);
    if (fits) return;
    for (int64_t l = 0; l < lead; ++l)
      for (int64_t i = 0; i < t.i; ++i) row[l * t.i + i] = out[l * t.width + i];
  }
};

// Ids as they come: nothing is shared but the tables.
template <typename T>
void rows_of_pairs(const int64_t* ids, int64_t n, const TableShapes& shapes, const std::vector<Tensor>& tables, T* out) {
  const RowMaker<T> make{shapes, data_of<T>(tables[1])};
  const T* const states = data_of<T>(tables[0]);
  const auto j = shapes.tables[1].j, slice = shapes.tables[0].slice(), dim = shapes.dim();
  on_threads(n, 16, is_large_work(n * shapes.products(1)), [&](int64_t first, int64_t last) {
    std::vector<T> scratch(shapes.state(1));
    for (auto k = first; k < last; ++k)
      make(states + ids[k] / j * slice, ids[k] % j, out + k * dim, scratch.data());
  });
}

template <typename T>
void rows_in_order(const Tree& tree, const TableShapes& shapes, const std::vector<Tensor>& tables, T* out) {
  const auto g = shapes.n() - 1;
  const States<T> states(tree, shapes, tables);
  const auto& leaves = tree.levels[g];
  const RowMaker<T> make{shapes, data_of<T>(tables[g])};
  const auto dim = shapes.dim();
  on_threads(leaves.n(), 16, is_large_work(leaves.n() * shapes.products(g)), [&](int64_t first, int64_t last) {
    std::vector<T> scratch(shapes.state(g));
    for (auto k = first; k < last; ++k) {
      auto place = leaves.first_child[k];
      T* const row = out + tree.places[place] * dim;
      make(states.at[g - 1][leaves.parents[k]], leaves.digits[k], row, scratch.data());
      while (++place < leaves.first_child[k + 1]) std::memcpy(out + tree.places[place] * dim, row, dim * sizeof(T));
    }
  });
}

// Whether reading the first slices in order saves more than the sorting costs.
inline bool pays_to_sort(const TableShapes& shapes, int64_t n, int64_t item) {
  const auto& first = shapes.tables[0];
  return shapes.n() > 2 || (n >= 2 * first.j && first.slice() * item >= 2048);
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
    rows_of_pairs(first_id, n, shapes, tables, rows);
    return out;
  }
  const auto pairs = in_order(first_id, n, shapes.n_ids() - 1);
  in_parts(shapes, n, sizeof(T), max_bytes, [&](int64_t first, int64_t n_part) {
    rows_in_order(Tree(pairs.data() + first, n_part, shapes), shapes, tables, rows);
  });
  return out;
}

// -- gradients ----------------------------------------------------------------------------------------

// The gradient of each distinct row, (lead, width): summed over equal ids, filled up to whole vectors.
template <typename T>
struct RowGradients {
  Tensor made;
  std::vector<const T*> at;

  RowGradients(const Tree& tree, const TableShapes& shapes, const T* grad, const at::TensorOptions& options) {
    const auto g = shapes.n() - 1;
    const auto& leaves = tree.levels[g];
    const auto& t = shapes.tables[g];
    const auto dim = shapes.dim(), lead = shapes.leads[g], size = shapes.state(g);
    const bool all_fit = t.width == t.i && leaves.n() == static_cast<int64_t>(tree.places.size());
    at.resize(leaves.n());
    if (!all_fit) made = at::empty({leaves.n(), size}, options);
    T* const sums = all_fit ? nullptr : made.mutable_data_ptr<T>();
    on_threads(leaves.n(), 64, !all_fit && is_large_work(8 * leaves.n() * size), [&](int64_t first, int64_t last) {
      for (auto k = first; k < last; ++k) {
        const auto start = leaves.first_child[k], stop = leaves.first_child[k + 1];
        const T* const row = grad + tree.places[start] * dim;
        at[k] = row;
        if (t.width == t.i && stop == start + 1) continue;
        T* const sum = sums + k * size;
        for (int64_t l = 0; l < lead; ++l) {
          std::memcpy(sum + l * t.width, row + l * t.i, t.i * sizeof(T));
          std::fill(sum + l * t.width + t.i, sum + (l + 1) * t.width, T(0));
        }
        for (auto place = start + 1; place < stop; ++place) {
          const T* const more = grad + tree.places[place] * dim;
          for (int64_t l = 0; l < lead; ++l)
            for (int64_t i = 0; i < t.i; ++i) sum[l * t.width + i] += more[l * t.i + i];
        }
        at[k] = sum;
      }
    });
  }
};

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
  const auto multiply = small_product<T>();
  const auto wide_r = shapes.tables[g - 1].wide_s, used = t.used_width();
  on_threads(parents.n(), 4, is_large_work(level.n() * shapes.products(g)), [&](int64_t first, int64_t last) {
    std::vector<const T*> slices;
    for (auto p = first; p < last; ++p) {
      const auto start = parents.first_child[p], stop = parents.first_child[p + 1];
      slices.clear();
      for (auto k = start; k < stop; ++k) slices.push_back(transposed + level.digits[k] * used * wide_r);
      multiply(shapes.leads[g], wide_r, used, stop - start, grads.data() + start, t.width, 1, slices.data(), wide_r,
               out[p], wide_r, adds);
    }
  });
}

template <typename T>
void add_gradients(const Tree& tree, const TableShapes& shapes, const std::vector<Tensor>& tables,
                   const std::vector<Tensor>& transposed, const T* grad, const std::vector<T*>& out) {
  const States<T> states(tree, shapes, tables);
  const auto options = tables[0].options();
  const RowGradients<T> rows(tree, shapes, grad, options);
  auto grads = rows.at;
  Tensor made, before;  // of the level at hand, and the one that it is made from
  for (auto g = shapes.n() - 1; g > 0; --g) {
    add_table_gradient(tree, shapes, g, states.at[g - 1], grads, out[g]);
    const auto& level = tree.levels[g - 1];
    const auto size = shapes.state(g - 1);
    before = std::exchange(made, g > 1 ? at::empty({level.n(), size}, options) : Tensor());
    T* const start = g > 1 ? made.mutable_data_ptr<T>() : out[0];
    std::vector<T*> into(level.n());
    for (int64_t k = 0; k < level.n(); ++k) into[k] = start + (g > 1 ? k : level.digits[k]) * size;
    add_state_gradient(tree, shapes, g, grads, data_of<T>(transposed[g]), into, g == 1);
    grads.assign(into.begin(), into.end());
  }
}

template <typename T>
std::vector<Tensor> lookup_gradients(const Tensor& ids, const std::vector<Tensor>& tables,
                                     const std::vector<Sizes>& cores, const Tensor& grad, int64_t max_bytes) {
  const auto shapes = TableShapes::of<T>(cores);
  std::vector<Tensor> transposed(shapes.n()), found;
  std::vector<T*> out;
  for (size_t g = 0; g < shapes.n(); ++g) {
    if (g > 0) transposed[g] = transposed_table<T>(tables[g], shapes.tables[g]);
    found.push_back(at::zeros(tables[g].sizes(), tables[g].options()));
    out.push_back(found.back().mutable_data_ptr<T>());
  }
  const auto n = ids.numel();
  const auto pairs = in_order(ids.const_data_ptr<int64_t>(), n, shapes.n_ids() - 1);
  const auto* const rows = grad.const_data_ptr<T>();
  in_parts(shapes, n, sizeof(T), max_bytes, [&](int64_t first, int64_t n_part) {
    add_gradients<T>(Tree(pairs.data() + first, n_part, shapes), shapes, tables, transposed, rows, out);
  });
  for (size_t g = 0; g < shapes.n(); ++g) found[g] = unpack_core<T>(found[g], shapes.tables[g]);
  return found;
}

}  // namespace tensortrain
