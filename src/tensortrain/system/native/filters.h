// Convolutions of few channels in each group, as the filters of a tensor train: direct, row by row.
//
// Every channel is copied into a padded plane, the columns of each stride next to each other, so that every tap reads
// numbers in a row; a block of outputs stays in registers while the taps pass by.
#pragma once

#include "processor.h"
#include "short_way.h"
#include "threads.h"

#include <ATen/ops/convolution_backward.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <vector>

namespace tensortrain {
namespace filters {

// Three axes; fewer have a size of one in front.
struct Geometry {
  int64_t examples, groups, inputs, outputs;  // channels of one group
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];

  int64_t in_size() const { return in[0] * in[1] * in[2]; }
  int64_t out_size() const { return out[0] * out[1] * out[2]; }
  int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

constexpr int64_t lane = 64;  // most numbers of a block

// Where things lie in the padded copy of one group's channels.
struct Plane {
  int64_t depth, height, width, phases;  // width of one phase, with room for a last block

  explicit Plane(const Geometry& g) {
    depth = g.in[0] + 2 * g.padding[0];
    height = g.in[1] + 2 * g.padding[1];
    phases = g.stride[2];
    const auto reach = (g.kernel[2] - 1) * g.dilation[2] / phases + 1;
    const auto columns = (g.in[2] + 2 * g.padding[2] + phases - 1) / phases;
    width = std::max(columns, (g.out[2] + lane - 1) / lane * lane + reach);
  }
  int64_t row() const { return phases * width; }
  int64_t channel() const { return depth * height * row(); }
};

template <typename T>
void copy_in(const Geometry& g, const Plane& plane, const T* x, T* into) {
  for (int64_t c = 0; c < g.inputs; ++c)
    for (int64_t d = 0; d < g.in[0]; ++d)
      for (int64_t h = 0; h < g.in[1]; ++h) {
        const T* const from = x + ((c * g.in[0] + d) * g.in[1] + h) * g.in[2];
        T* const row = into + c * plane.channel() + ((d + g.padding[0]) * plane.height + h + g.padding[1]) * plane.row();
        if (plane.phases == 1) {
          std::copy(from, from + g.in[2], row + g.padding[2]);
          continue;
        }
        for (int64_t first = 0; first < std::min(plane.phases, g.in[2]); ++first) {
          T* to = row + (first + g.padding[2]) % plane.phases * plane.width + (first + g.padding[2]) / plane.phases;
          for (auto w = first; w < g.in[2]; w += plane.phases) *to++ = from[w];
        }
      }
}

// What the loops over one group need to know of it.
template <typename T>
struct Group {
  const T* padded;
  const int64_t* offsets;  // of the taps, of all inputs, from the first tap of an output
  int64_t n_taps;
  const T *weight, *bias;
  T* out;
  int64_t out_size;
};

// The loops for processors of any kind, and for those with wider registers.
namespace narrow {
constexpr size_t register_bytes = 16;
#include "filter_loops.h"
}  // namespace narrow
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define TENSORTRAIN_HAS_WIDE 1
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace wide {
constexpr size_t register_bytes = 32;
#include "filter_loops.h"
}  // namespace wide
#pragma GCC pop_options
#endif

template <typename T>
void rows(const Geometry& g, const Plane& plane, const Group<T>& group) {
#ifdef TENSORTRAIN_HAS_WIDE
  if (has_avx2()) return wide::rows(g, plane, group);
#endif
  narrow::rows(g, plane, group);
}

inline std::vector<int64_t> tap_offsets(const Geometry& g, const Plane& plane) {
  std::vector<int64_t> found;
  for (int64_t c = 0; c < g.inputs; ++c)
    for (int64_t d = 0; d < g.kernel[0]; ++d)
      for (int64_t h = 0; h < g.kernel[1]; ++h)
        for (int64_t w = 0; w < g.kernel[2]; ++w) {
          const auto at = w * g.dilation[2];
          found.push_back(c * plane.channel() + (d * g.dilation[0] * plane.height + h * g.dilation[1]) * plane.row() +
                          at % plane.phases * plane.width + at / plane.phases);
        }
  return found;
}

template <typename T>
void convolve(const Geometry& g, const T* x, const T* weight, const T* bias, T* out) {
  const Plane plane(g);
  const auto offsets = tap_offsets(g, plane);
  const auto flops = 2 * g.inputs * g.outputs * g.taps() * g.out_size(), n = g.examples * g.groups;
  on_threads(n, std::max<int64_t>(1, 200000 / std::max<int64_t>(flops, 1)), n * flops > 400000,
             [&](int64_t first, int64_t last) {
               std::vector<T> padded(static_cast<size_t>(g.inputs * plane.channel() + lane), T(0));
               for (auto k = first; k < last; ++k) {
                 const auto group = k % g.groups;
                 copy_in(g, plane, x + k * g.inputs * g.in_size(), padded.data());
                 const auto n_taps = g.inputs * g.taps();
                 rows(g, plane,
                      Group<T>{padded.data(), offsets.data(), n_taps, weight + group * g.outputs * n_taps,
                               bias ? bias + group * g.outputs : nullptr, out + k * g.outputs * g.out_size(), g.out_size()});
               }
             });
}

// Stride, padding and dilation along every axis.
struct Options {
  Sizes stride, padding, dilation;
  int64_t groups;
};

inline Geometry geometry(const Tensor& x, const Tensor& weight, const Options& options) {
  Geometry g{x.size(0), options.groups, weight.size(1), weight.size(0) / options.groups,
             {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {1, 1, 1}, {0, 0, 0}, {1, 1, 1}};
  const auto n_axes = static_cast<size_t>(x.dim() - 2);
  for (size_t k = 0; k < n_axes; ++k) {
    const auto axis = 3 - n_axes + k;
    g.in[axis] = x.size(static_cast<int64_t>(k) + 2);
    g.kernel[axis] = weight.size(static_cast<int64_t>(k) + 2);
    g.stride[axis] = options.stride[k], g.padding[axis] = options.padding[k], g.dilation[axis] = options.dilation[k];
    const auto room = g.in[axis] + 2 * g.padding[axis] - g.dilation[axis] * (g.kernel[axis] - 1) - 1;
    g.out[axis] = room < 0 ? 0 : room / g.stride[axis] + 1;
  }
  return g;
}

inline Tensor forward(const Tensor& given, const Tensor& given_weight, const Bias& bias, const Options& options) {
  const auto x = given.contiguous(), weight = given_weight.contiguous();
  const auto g = geometry(x, weight, options);
  Sizes sizes{x.size(0), weight.size(0)};
  for (int64_t k = 5 - x.dim(); k < 3; ++k) sizes.push_back(g.out[k]);
  auto out = at::empty(sizes, x.options());
  const auto added = bias ? bias->contiguous() : Tensor();
  if (x.scalar_type() == at::kFloat)
    convolve(g, x.const_data_ptr<float>(), weight.const_data_ptr<float>(),
             bias ? added.const_data_ptr<float>() : nullptr, out.data_ptr<float>());
  else
    convolve(g, x.const_data_ptr<double>(), weight.const_data_ptr<double>(),
             bias ? added.const_data_ptr<double>() : nullptr, out.data_ptr<double>());
  return out;
}

struct Function : torch::autograd::Function<Function> {
  using Context = torch::autograd::AutogradContext;

  static Tensor forward(Context* context, const Tensor& x, const Tensor& weight, const Bias& bias,
                        const Options& options) {
    context->save_for_backward({x, weight});
    auto& kept = context->saved_data;
    kept["stride"] = options.stride, kept["padding"] = options.padding, kept["dilation"] = options.dilation;
    kept["groups"] = options.groups, kept["has_bias"] = bias.has_value();
    const at::AutoDispatchBelowADInplaceOrView below;
    return filters::forward(x, weight, bias, options);
  }

  static Tensors backward(Context* context, Tensors grads) {
    auto& kept = context->saved_data;
    const auto saved = context->get_saved_variables();
    const auto has_bias = kept["has_bias"].toBool();
    const Sizes bias_sizes{saved[1].size(0)}, none(static_cast<size_t>(saved[0].dim() - 2), 0);
    auto [x, weight, bias] = at::convolution_backward(
        grads[0], saved[0], saved[1], has_bias ? at::OptionalIntArrayRef(bias_sizes) : at::OptionalIntArrayRef(),
        kept["stride"].toIntVector(), kept["padding"].toIntVector(), kept["dilation"].toIntVector(), false, none,
        kept["groups"].toInt(), {context->needs_input_grad(0), context->needs_input_grad(1),
                                 has_bias && context->needs_input_grad(2)});
    return {x, weight, bias, Tensor()};
  }
};

inline bool is_fit(const Tensor& x, const Tensor& weight, const Bias& bias, const Options& options) {
  const auto n_axes = static_cast<size_t>(std::max<int64_t>(0, x.dim() - 2));
  const auto dtype = x.scalar_type();
  if (!is_plain(x) || !is_plain(weight) || n_axes < 1 || n_axes > 3 || weight.dim() != x.dim() || x.numel() == 0)
    return false;
  if ((dtype != at::kFloat && dtype != at::kDouble) || weight.scalar_type() != dtype || weight.numel() == 0) return false;
  if (options.groups < 1 || weight.size(1) * options.groups != x.size(1) || weight.size(0) % options.groups) return false;
  for (const auto* given : {&options.stride, &options.padding, &options.dilation})
    if (given->size() != n_axes) return false;
  const auto g = geometry(x, weight, options);
  if (g.out_size() == 0) return false;
  return !bias || (is_plain(*bias) && bias->scalar_type() == dtype && bias->dim() == 1 && bias->size(0) == weight.size(0));
}

// None where torch's own convolution must be called, whoever looks on.
inline std::optional<Tensor> run(const Tensor& x, const Tensor& weight, const Bias& bias, const Sizes& stride,
                                 const Sizes& padding, const Sizes& dilation, int64_t groups) {
  const Options options{stride, padding, dilation, groups};
  if (!is_undisturbed() || !is_fit(x, weight, bias, options)) return std::nullopt;
  const bool differentiates = c10::GradMode::is_enabled() && !c10::InferenceMode::is_enabled() &&
                              (x.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()));
  const pybind11::gil_scoped_release unlocked;
  if (differentiates) return Function::apply(x, weight, bias, options);
  const at::AutoDispatchBelowADInplaceOrView below;
  return forward(x, weight, bias, options);
}

}  // namespace filters
}  // namespace tensortrain
