// Products of matrices so small that a call of BLAS costs more than the product.
#pragma once

#include "processor.h"

#include <cstdint>
#include <cstring>

namespace tensortrain {

// The sums of a tile stay in registers only where its loops are unrolled.
#if defined(__clang__)
#define TT_UNROLL _Pragma("unroll")
#else
#define TT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace loops_plain {
#define TT_TARGET
#define TT_VECTOR_BYTES 32
#include "small_loops.h"
#undef TT_TARGET
}  // namespace loops_plain

#if defined(__x86_64__)
namespace loops_avx2 {
#define TT_TARGET __attribute__((target("avx2,fma")))
#include "small_loops.h"
#undef TT_TARGET
}  // namespace loops_avx2
#undef TT_VECTOR_BYTES

namespace loops_avx512 {
#define TT_TARGET __attribute__((target("avx2,fma,avx512f,avx512vl,avx512dq,avx512bw")))
#define TT_VECTOR_BYTES 64
#include "small_loops.h"
#undef TT_TARGET
}  // namespace loops_avx512
#endif
#undef TT_VECTOR_BYTES

// One of the loops, for the processor at hand.
#if defined(__x86_64__)
#define TT_LOOP(name) (has_avx512() ? &loops_avx512::name<T> : has_avx2() ? &loops_avx2::name<T> : &loops_plain::name<T>)
#else
#define TT_LOOP(name) (&loops_plain::name<T>)
#endif

template <typename T>
using Product = void (*)(int64_t m, int64_t n, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row,
                         int64_t a_k, const T* const* bs, int64_t b_row, T* c, int64_t c_row, bool adds);

// How many numbers the width of a small product is a multiple of.
template <typename T>
constexpr int64_t lanes_of = 32 / sizeof(T);

template <typename T>
inline int64_t whole_lanes(int64_t n) {
  return (n + lanes_of<T> - 1) / lanes_of<T> * lanes_of<T>;
}

template <typename T>
inline Product<T> small_product() {
  return TT_LOOP(product);
}

template <typename T>
using PanelProduct = void (*)(int64_t m, int64_t n, int64_t k, int64_t n_terms, const T* const* as, int64_t a_row,
                              int64_t a_k, const T* const* bs, T* c, int64_t c_row, bool adds);

template <typename T>
inline PanelProduct<T> panel_product() {
  return TT_LOOP(panel_product);
}

template <typename T>
using ColumnsToRows = void (*)(const T* columns, int64_t apart, int64_t k, T* out, int64_t out_row);

template <typename T>
inline ColumnsToRows<T> columns_to_rows() {
  return TT_LOOP(columns_to_rows);
}

template <typename T>
using Turner = void (*)(int64_t n_rows, int64_t n, const T* from, int64_t from_row, T* to, int64_t to_row);

template <typename T>
inline Turner<T> block_turner() {
  return TT_LOOP(turn_block);
}

// Where column `at` of row `k` lies in a matrix (n_rows, width) in panels; up to the panel's end a row goes on from there.
template <typename T>
inline int64_t in_panels(int64_t k, int64_t at, int64_t n_rows, int64_t width) {
  constexpr int64_t wide = 2 * lanes_of<T>;
  const auto start = at / wide * wide, here = width - start < wide ? lanes_of<T> : wide;
  return start * n_rows + k * here + (at - start);
}

// A row of a matrix in panels.
template <typename T>
inline void put_row(const T* row, int64_t k, int64_t n_rows, int64_t width, T* panels) {
  constexpr int64_t wide = 2 * lanes_of<T>;
  for (int64_t at = 0; at < width; at += wide)
    std::memcpy(panels + in_panels<T>(k, at, n_rows, width), row + at, (width - at < wide ? width - at : wide) * sizeof(T));
}

template <typename T>
using Dotter = T (*)(const T* a, const T* b, int64_t n);

template <typename T>
inline Dotter<T> row_dotter() {
  return TT_LOOP(dot);
}

template <typename T>
using Adder = void (*)(T* c, const T* a, int64_t n);

template <typename T>
inline Adder<T> row_adder() {
  return TT_LOOP(add_row);
}

}  // namespace tensortrain
