// Neighbouring cores of a chain contracted to one, which is written where it shall lie: no product is made elsewhere
// first and sorted then. And the way back of its gradient.
#pragma once

#include "blas.h"
#include "room.h"
#include "small_products.h"
#include "threads.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace tensortrain {

using at::Tensor;
using Sizes = std::vector<int64_t>;

// A core with two modes, of which `b` runs within a block and `a` from block to block.
template <typename T>
struct Grid {
  T* data;
  int64_t r, a, b, s;
  int64_t at_r, at_a, at_b, at_s;

  T* block(int64_t k_r, int64_t k_a) const { return data + k_r * at_r + k_a * at_a; }
  operator Grid<const T>() const { return {data, r, a, b, s, at_r, at_a, at_b, at_s}; }

  static Grid natural(T* data, int64_t r, int64_t a, int64_t b, int64_t s) {
    return {data, r, a, b, s, a * b * s, b * s, s, 1};
  }
};

template <typename T>
Grid<const T> grid_of(const Tensor& core) {
  return {core.const_data_ptr<T>(), core.size(0),   core.size(1),   core.size(2),  core.size(3),
          core.stride(0),           core.stride(1), core.stride(2), core.stride(3)};
}

// How the product of two cores is divided: one block for each a of the right core, r of the left, a of the left.
template <typename T>
struct MergeSizes {
  int64_t m, k, n, width, rows, a2;  // m x k times k x n, whole lanes of n, blocks for one a2
  bool by_blas;

  MergeSizes(const Grid<const T>& left, const Grid<const T>& right, int64_t at_b)
      : m(left.b), k(left.s), n(right.b * at_b), width(whole_lanes<T>(n)), rows(left.r * left.a), a2(right.a),
        by_blas(has_blas() && left.at_s == 1 && left.at_b >= k && m * n * k >= 32768) {}
  bool is_large() const { return rows * a2 * m * n * k > 1000000; }
  int64_t grain() const { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, m * n * k)); }
};

// The right core as one matrix (k, width) for each of its a, in panels unless BLAS takes it, zeros where there is nothing.
template <typename T>
T* pack_right(Room& room, const Grid<const T>& right, const MergeSizes<T>& sizes, int64_t at_b) {
  T* const packed = room.take<T>(sizes.a2 * sizes.k * sizes.width);
  T* const row = room.take<T>(sizes.width);
  std::fill(row, row + sizes.width, T(0));
  for (int64_t a = 0; a < sizes.a2; ++a)
    for (int64_t k = 0; k < sizes.k; ++k) {
      const T* const from = right.block(k, a);
      T* const here = packed + a * sizes.k * sizes.width;
      if (right.at_s == 1 && right.at_b == right.s && at_b == right.s) {
        std::memcpy(row, from, right.b * right.s * sizeof(T));
      } else {
        for (int64_t b = 0; b < right.b; ++b)
          for (int64_t s = 0; s < right.s; ++s) row[b * at_b + s] = from[b * right.at_b + s * right.at_s];
      }
      if (sizes.by_blas)
        std::memcpy(here + k * sizes.width, row, sizes.width * sizeof(T));
      else
        put_row(row, k, sizes.k, sizes.width, here);
    }
  return packed;
}

// The product of two cores into `out`, whose blocks are (b1 b2, s) without gaps but those after s.
template <typename T>
void merge_into(const Grid<const T>& left, const Grid<const T>& right, const Grid<T>& out) {
  Room room;
  const MergeSizes<T> sizes(left, right, out.at_b);
  const T* const packed = pack_right(room, right, sizes, out.at_b);
  const auto multiply = panel_product<T>();
  on_threads(sizes.rows * sizes.a2, sizes.grain(), sizes.is_large(), [&](int64_t first, int64_t last) {
    std::vector<T> scratch(sizes.n == sizes.width ? 0 : sizes.m * sizes.width);
    for (auto item = first; item < last; ++item) {
      const auto a2 = item / sizes.rows, row = item % sizes.rows, r = row / left.a, a1 = row % left.a;
      const T* const a = left.block(r, a1);
      const T* const b = packed + a2 * sizes.k * sizes.width;
      T* const c = out.block(r, a1 * sizes.a2 + a2);
      if (sizes.by_blas) {
        multiply_into(c, sizes.n, Matrix<T>{a, left.at_b}, Matrix<T>{b, sizes.width}, sizes.m, sizes.n, sizes.k);
      } else if (sizes.n == sizes.width) {
        multiply(sizes.m, sizes.n, sizes.k, 1, &a, left.at_b, left.at_s, &b, c, sizes.n, false);
      } else {
        multiply(sizes.m, sizes.width, sizes.k, 1, &a, left.at_b, left.at_s, &b, scratch.data(), sizes.width, false);
        for (int64_t l = 0; l < sizes.m; ++l)
          std::memcpy(c + l * sizes.n, scratch.data() + l * sizes.width, sizes.n * sizeof(T));
      }
    }
  });
}

// The left core's gradient from that of the product.
template <typename T>
void merge_back_left(const Grid<const T>& left, const Grid<const T>& right, const Grid<const T>& grad,
                     const Grid<T>& out) {
  Room room;
  const MergeSizes<T> sizes(left, right, grad.at_b);
  const auto wide_k = whole_lanes<T>(sizes.k);
  const T* const packed = pack_right(room, right, sizes, grad.at_b);
  T* turned = nullptr;  // (n, wide k) for each a of the right core
  if (!sizes.by_blas) {
    turned = room.take<T>(sizes.a2 * sizes.n * wide_k);
    if (wide_k != sizes.k) std::fill(turned, turned + sizes.a2 * sizes.n * wide_k, T(0));
    for (int64_t a = 0; a < sizes.a2; ++a)
      for (int64_t l = 0; l < sizes.n; ++l)
        for (int64_t k = 0; k < sizes.k; ++k)
          turned[a * sizes.n * wide_k + in_panels<T>(l, k, sizes.n, wide_k)] =
              packed[a * sizes.k * sizes.width + in_panels<T>(k, l, sizes.k, sizes.width)];
  }
  const auto multiply = panel_product<T>();
  on_threads(sizes.rows, 1, sizes.is_large(), [&](int64_t first, int64_t last) {
    std::vector<T> sums(sizes.m * wide_k);
    std::vector<const T*> as(sizes.a2), bs(sizes.a2);
    for (auto row = first; row < last; ++row) {
      const auto r = row / left.a, a1 = row % left.a;
      for (int64_t a2 = 0; a2 < sizes.a2; ++a2) {
        as[a2] = grad.block(r, a1 * sizes.a2 + a2);
        bs[a2] = (sizes.by_blas ? packed + a2 * sizes.k * sizes.width : turned + a2 * sizes.n * wide_k);
        if (sizes.by_blas)
          multiply_into(sums.data(), wide_k, Matrix<T>{as[a2], sizes.n}, Matrix<T>{bs[a2], sizes.width, true}, sizes.m,
                        sizes.k, sizes.n, a2 == 0 ? T(0) : T(1));
      }
      if (!sizes.by_blas)
        multiply(sizes.m, wide_k, sizes.n, sizes.a2, as.data(), sizes.n, 1, bs.data(), sums.data(), wide_k, false);
      T* const to = out.block(r, a1);
      for (int64_t b = 0; b < sizes.m; ++b)
        for (int64_t k = 0; k < sizes.k; ++k) to[b * out.at_b + k * out.at_s] = sums[b * wide_k + k];
    }
  });
}

// The right core's gradient from that of the product.
template <typename T>
void merge_back_right(const Grid<const T>& left, const Grid<const T>& right, const Grid<const T>& grad,
                      const Grid<T>& out) {
  const MergeSizes<T> sizes(left, right, grad.at_b);
  const auto multiply = small_product<T>();
  const bool fits = sizes.n == sizes.width;
  on_threads(sizes.a2, 1, sizes.is_large(), [&](int64_t first, int64_t last) {
    Room room;
    T* const sums = room.take<T>(sizes.k * sizes.width);
    T* const padded = fits || sizes.by_blas ? nullptr : room.take<T>(sizes.rows * sizes.m * sizes.width);
    std::vector<const T*> as(sizes.rows), bs(sizes.rows);
    for (auto a2 = first; a2 < last; ++a2) {
      for (int64_t row = 0; row < sizes.rows; ++row) {
        as[row] = left.block(row / left.a, row % left.a);
        bs[row] = grad.block(row / left.a, row % left.a * sizes.a2 + a2);
        if (sizes.by_blas)
          multiply_into(sums, sizes.width, Matrix<T>{as[row], left.at_b, true}, Matrix<T>{bs[row], sizes.n}, sizes.k,
                        sizes.n, sizes.m, row == 0 ? T(0) : T(1));
        if (padded == nullptr) continue;
        T* const to = padded + row * sizes.m * sizes.width;
        for (int64_t l = 0; l < sizes.m; ++l) {
          std::memcpy(to + l * sizes.width, bs[row] + l * sizes.n, sizes.n * sizeof(T));
          std::fill(to + l * sizes.width + sizes.n, to + (l + 1) * sizes.width, T(0));
        }
        bs[row] = to;
      }
      if (!sizes.by_blas)
        multiply(sizes.k, sizes.width, sizes.m, sizes.rows, as.data(), left.at_s, left.at_b, bs.data(), sizes.width,
                 sums, sizes.width, false);
      for (int64_t k = 0; k < sizes.k; ++k)
        for (int64_t b = 0; b < right.b; ++b)
          for (int64_t s = 0; s < right.s; ++s)
            out.block(k, a2)[b * out.at_b + s * out.at_s] = sums[k * sizes.width + b * grad.at_b + s];
    }
  });
}

// A run of cores contracted pair by pair in a given order. What lies between is kept in the room for the way back.
template <typename T>
class Merged {
 public:
  // steps: start, middle and stop of every product, the last one that of the whole run.
  Merged(Room& room, const std::vector<Tensor>& cores, const Sizes& steps)
      : room_(room), n_(static_cast<int64_t>(cores.size())) {
    for (const auto& core : cores) nodes_.push_back({grid_of<T>(core), 0, 0});
    std::vector<int64_t> at(n_);  // by where a run starts: its node
    for (int64_t k = 0; k < n_; ++k) at[k] = k;
    for (size_t k = 0; k + 2 < steps.size(); k += 3) {
      const auto left = at[steps[k]], right = at[steps[k + 1]];
      at[steps[k]] = static_cast<int64_t>(nodes_.size());
      nodes_.push_back({{}, left, right});
    }
  }

  // The product, in memory laid out as `out` says.
  void run(const Grid<T>& out) {
    run_between();
    const auto& last = nodes_.back();
    merge_into<T>(nodes_[last.left].grid, nodes_[last.right].grid, out);
  }

  // All products but the last.
  void run_between() {
    for (auto k = n_; k + 1 < size(); ++k) {
      const auto &left = nodes_[nodes_[k].left].grid, &right = nodes_[nodes_[k].right].grid;
      const auto made = between(left.r, left.a * right.a, left.b * right.b, right.s);
      merge_into<T>(left, right, made);
      nodes_[k].grid = made;
    }
  }

  // Gradients of the cores (r, i, j, s), after either run; null in `out` where nobody wants one.
  void back(const Grid<const T>& grad, const std::vector<T*>& out) {
    std::vector<Grid<T>> grads(nodes_.size());
    std::vector<char> is_wanted;
    for (int64_t k = 0; k < size(); ++k)
      is_wanted.push_back(k < n_ ? out[k] != nullptr : is_wanted[nodes_[k].left] || is_wanted[nodes_[k].right]);
    for (auto k = size() - 1; k >= n_; --k) {
      if (!is_wanted[k]) continue;
      const auto &left = nodes_[nodes_[k].left].grid, &right = nodes_[nodes_[k].right].grid;
      const Grid<const T> here = k + 1 == size() ? grad : Grid<const T>(grads[k]);
      if (is_wanted[nodes_[k].left])
        merge_back_left<T>(left, right, here, grads[nodes_[k].left] = gradient(nodes_[k].left, out));
      if (is_wanted[nodes_[k].right])
        merge_back_right<T>(left, right, here, grads[nodes_[k].right] = gradient(nodes_[k].right, out));
    }
  }

 private:
  struct Node {
    Grid<const T> grid;
    int64_t left, right;
  };
  int64_t size() const { return static_cast<int64_t>(nodes_.size()); }
  Grid<T> between(int64_t r, int64_t a, int64_t b, int64_t s) {
    return Grid<T>::natural(room_.take<T>(r * a * b * s), r, a, b, s);
  }
  Grid<T> gradient(int64_t k, const std::vector<T*>& out) {
    const auto& of = nodes_[k].grid;
    if (k >= n_) return between(of.r, of.a, of.b, of.s);
    return Grid<T>::natural(out[k], of.r, of.a, of.b, of.s);
  }

  Room& room_;
  int64_t n_;
  std::vector<Node> nodes_;
};

template <typename T>
Tensor merged_run(const std::vector<Tensor>& cores, const Sizes& steps) {
  int64_t i = 1, j = 1;
  for (const auto& core : cores) i *= core.size(1), j *= core.size(2);
  const auto r = cores.front().size(0), s = cores.back().size(3);
  const auto found = at::empty({r, i, j, s}, cores[0].options());
  Room room;
  Merged<T>(room, cores, steps).run(Grid<T>::natural(found.template mutable_data_ptr<T>(), r, i, j, s));
  return found;
}

// None for cores that need no gradient.
template <typename T>
std::vector<std::optional<Tensor>> merged_run_backward(const std::vector<Tensor>& cores, const Sizes& steps,
                                                       const Tensor& grad, const std::vector<bool>& needed) {
  std::vector<std::optional<Tensor>> found(cores.size());
  std::vector<T*> out(cores.size(), nullptr);
  for (size_t k = 0; k < cores.size(); ++k) {
    if (!needed[k]) continue;
    found[k] = at::empty(cores[k].sizes(), cores[k].options());
    out[k] = found[k]->template mutable_data_ptr<T>();
  }
  Room room;
  Merged<T> merged(room, cores, steps);
  merged.run_between();
  merged.back(Grid<const T>::natural(grad.const_data_ptr<T>(), grad.size(0), grad.size(1), grad.size(2), grad.size(3)),
              out);
  return found;
}

}  // namespace tensortrain
