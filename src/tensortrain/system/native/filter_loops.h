// The loops of filters.h, included once for every width of registers: no guard, no namespace of its own.

// A registerful of numbers.
template <typename T>
struct Register {
  typedef T Numbers __attribute__((vector_size(register_bytes)));
  static constexpr int64_t count = register_bytes / sizeof(T);
};

// `n` channels of outputs, `w` registers of each, while the taps pass by.
template <typename T, int n, int w>
inline __attribute__((always_inline)) void block(const Group<T>& group, int64_t channel, int64_t from, int64_t to,
                                                 int64_t width) {
  using Numbers = typename Register<T>::Numbers;
  constexpr auto count = Register<T>::count;
  Numbers sums[n][w];
#pragma GCC unroll 8
  for (int o = 0; o < n; ++o)
#pragma GCC unroll 8
    for (int j = 0; j < w; ++j) sums[o][j] = Numbers{} + (group.bias ? group.bias[channel + o] : T(0));
  const T* const plane = group.padded + from;
  const T* const weight = group.weight + channel * group.n_taps;
  for (int64_t t = 0; t < group.n_taps; ++t) {
    const T* const row = plane + group.offsets[t];
    Numbers read[w];
#pragma GCC unroll 8
    for (int j = 0; j < w; ++j) __builtin_memcpy(&read[j], row + j * count, sizeof(Numbers));
#pragma GCC unroll 8
    for (int o = 0; o < n; ++o) {
      const T factor = weight[o * group.n_taps + t];
#pragma GCC unroll 8
      for (int j = 0; j < w; ++j) sums[o][j] += read[j] * factor;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < n; ++o) {
    T* const into = group.out + (channel + o) * group.out_size + to;
    if (width == w * count) {
#pragma GCC unroll 8
      for (int j = 0; j < w; ++j) __builtin_memcpy(into + j * count, &sums[o][j], sizeof(Numbers));
      continue;
    }
    T some[w * count];
#pragma GCC unroll 8
    for (int j = 0; j < w; ++j) __builtin_memcpy(some + j * count, &sums[o][j], sizeof(Numbers));
    for (int64_t j = 0; j < width; ++j) into[j] = some[j];
  }
}

// A row of `n` channels of outputs; what is left over takes blocks no wider than it needs.
template <typename T, int n, int w>
inline void row(const Group<T>& group, int64_t channel, int64_t from, int64_t to, int64_t width) {
  constexpr int64_t size = w * Register<T>::count;
  for (; width > (w > 1 ? size / 2 : 0); from += size, to += size, width -= size)
    block<T, n, w>(group, channel, from, to, width < size ? width : size);
  if constexpr (w > 1)
    if (width > 0) row<T, n, w / 2>(group, channel, from, to, width);
}

template <typename T>
inline void rows(const Geometry& g, const Plane& plane, const Group<T>& group) {
  for (int64_t d = 0; d < g.out[0]; ++d)
    for (int64_t h = 0; h < g.out[1]; ++h) {
      const auto from = (d * g.stride[0] * plane.height + h * g.stride[1]) * plane.row();
      const auto to = (d * g.out[1] + h) * g.out[2];
      int64_t o = 0;
      for (; o + 4 <= g.outputs; o += 4) row<T, 4, 2>(group, o, from, to, g.out[2]);
      for (; o + 2 <= g.outputs; o += 2) row<T, 2, 4>(group, o, from, to, g.out[2]);
      if (o < g.outputs) row<T, 1, 8>(group, o, from, to, g.out[2]);
    }
}
