// Products of matrices so small that a call of BLAS costs more than the product.
#pragma once

#include <cstdint>

namespace tensortrain {

// The sums of a tile stay in registers only where its loops are unrolled.
#if defined(__clang__)
#define TT_UNROLL _Pragma("unroll")
#else
#define TT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace loops_plain {
#define TT_TARGET
#include "small_loops.h"
#undef TT_TARGET
}  // namespace loops_plain

#if defined(__x86_64__)
namespace loops_avx2 {
#define TT_TARGET __attribute__((target("avx2,fma")))
#include "small_loops.h"
#undef TT_TARGET
}  // namespace loops_avx2
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

// The loops for the processor at hand.
template <typename T>
inline Product<T> small_product() {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return &loops_avx2::product<T>;
#endif
  return &loops_plain::product<T>;
}

}  // namespace tensortrain
