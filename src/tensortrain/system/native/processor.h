// What the processor at hand can do beyond what all of its kind can.
#pragma once

namespace tensortrain {

// Vectors of 32 bytes with fused products.
inline bool has_avx2() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const bool found = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return found;
#else
  return false;
#endif
}

// Vectors of 64 bytes, and twice as many registers.
inline bool has_avx512() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  static const bool found = has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw");
  return found;
#else
  return false;
#endif
}

}  // namespace tensortrain
