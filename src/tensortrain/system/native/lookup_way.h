// Rows of ids, and the gradients of the cores that they are made of. Every core is read where it lies, and its gradient
// is written where it will lie: a table of slices would take longer to make than a training step uses it.
//
// The way through the chain begins at the first core or at the last one. Either way the numbers made so far are a matrix
// of a row for each combination of modes passed and a column for each rank ahead. From the first core, the next mode is
// the one that runs fastest; from the last, it is the slowest, so that rows of the table come out in their order too.
#pragma once

#include "lookup.h"

namespace tensortrain {

// How many vectors a row of so many numbers takes in a product.
template <typename T>
int64_t vectors_of(int64_t n) {
  constexpr int64_t lanes = lanes_of<T>;
  const auto width = n >= 2 * lanes && has_avx512() ? 2 * lanes : n >= lanes ? lanes : n >= lanes / 2 ? lanes / 2 : 1;
  return (n + width - 1) / width;
}

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

  // Of the three products of one node in a step of training.
  template <typename T>
  double cycles(bool is_from_last, bool is_last) const {
    const auto thin = vectors_of<T>(inner);
    int64_t found = before * inner * vectors_of<T>(wide()) + before * wide() * thin;
    if (is_from_last && is_last) found = mode * inner * vectors_of<T>(before) + before * mode * thin;
    found += is_from_last || is_last ? before * wide() * thin : before * inner * vectors_of<T>(wide());
    return static_cast<double>(found) / 2;
  }
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
  // anew, calls.
  template <typename T>
  double cycles(const std::vector<double>& n_nodes) const {
    double sum = 0;
    for (size_t g = 1; g < stops.size(); ++g) {
      const auto& stop = stops[g];
      const double n = n_nodes[g], n_met = std::min(static_cast<double>(stop.n_digits), n);
      sum += n * (450 + stop.cycles<T>(is_from_last, g == last()));
      if (g < last()) sum += n_met * 0.6 * static_cast<double>(stop.inner * stop.wide());
      if (g == last() && is_from_last) sum += n_nodes[g - 1] * 0.3 * static_cast<double>(stop.coming());
    }
    return sum;
  }
};

// -- blocks of numbers --------------------------------------------------------------------------------

// Rows so far apart that neither few lines of the cache hold all of them nor vectors cross lines.
template <typename T>
int64_t apart_for(int64_t n) {
  constexpr int64_t line = 64 / sizeof(T);
  return ((n + line - 1) / line | 1) * line;
}

// So many bytes, fewer than two blocks, by a block at the start and one at the end.
template <int bytes, typename T>
inline void copy_ends(int64_t n_rows, int64_t n, const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int64_t lanes = bytes / sizeof(T);
  for (int64_t k = 0; k < n_rows; ++k, from += from_row, to += to_row) {
    char first[bytes], last[bytes];
    std::memcpy(first, from, bytes), std::memcpy(last, from + n - lanes, bytes);
    std::memcpy(to, first, bytes), std::memcpy(to + n - lanes, last, bytes);
  }
}

template <typename T>
inline void copy_block(int64_t n_rows, int64_t n, const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int64_t item = sizeof(T);
  if (n == from_row && n == to_row) {
    std::memcpy(to, from, n_rows * n * item);
  } else if (n * item > 64) {
    for (int64_t k = 0; k < n_rows; ++k) std::memcpy(to + k * to_row, from + k * from_row, n * item);
  } else if (n * item >= 32) {
    copy_ends<32>(n_rows, n, from, from_row, to, to_row);
  } else if (n * item >= 16) {
    copy_ends<16>(n_rows, n, from, from_row, to, to_row);
  } else {
    for (int64_t k = 0; k < n_rows; ++k, from += from_row, to += to_row)
      for (int64_t at = 0; at < n; ++at) to[at] = from[at];
  }
}

}  // namespace tensortrain
