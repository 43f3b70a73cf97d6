// What torch calls: operators on tensors, checked.

#pragma once

#include <cmath>

#include "memory.h"
#include "pictures.h"
#include "tokens.h"

namespace {

// Weights of a group; each has its own rows, chunks and pointers, one group behind the other.
Weights weights_of(const at::Tensor& values, const at::Tensor& columns, const at::Tensor& pointers, int64_t rows,
                   int64_t width, int64_t chunk, int64_t group, int64_t groups) {
  const int64_t chunks = (width + chunk - 1) / chunk;
  check(values.scalar_type() == at::kFloat && columns.scalar_type() == at::kShort && pointers.scalar_type() == at::kInt,
        "values of float32, columns of int16, pointers of int32");
  check(values.is_contiguous() && columns.is_contiguous() && pointers.is_contiguous(), "contiguous packed weights");
  check(pointers.numel() == groups * rows * chunks + 1 && columns.numel() == values.numel(), "packed weights of this shape");
  return {values.const_data_ptr<float>(), reinterpret_cast<const uint16_t*>(columns.const_data_ptr<int16_t>()),
          pointers.const_data_ptr<int32_t>() + group * rows * chunks, rows, width, chunk};
}

const float* bias_of(const std::optional<at::Tensor>& bias, int64_t rows) {
  if (!bias) return nullptr;
  check(bias->scalar_type() == at::kFloat && bias->is_contiguous() && bias->numel() == rows, "a contiguous float32 bias");
  return bias->const_data_ptr<float>();
}

// Padding: of both sides alike (height, width), or of each (top, left, bottom, right).
Shape shape_of(const at::Tensor& x, int64_t groups, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
               at::IntArrayRef dilation) {
  check(padding.size() == 2 || padding.size() == 4, "padding of two or four numbers");
  const int64_t bottom = padding[padding.size() - 2], right = padding[padding.size() - 1];
  Shape s{x.size(0), x.size(1) / groups, x.size(2), x.size(3), 0, 0, kernel[0], kernel[1], stride[0], stride[1],
          padding[0], padding[1], dilation[0], dilation[1], right};
  const int64_t down = s.h + s.ph + bottom - s.dh * (s.kh - 1) - 1, across = s.w + s.pw + right - s.dw * (s.kw - 1) - 1;
  check(down >= 0 && across >= 0, "pictures no smaller than the kernel");
  s.oh = down / s.sh + 1;
  s.ow = across / s.sw + 1;
  return s;
}

// The residual as the output is laid out; undefined when there is none.
at::Tensor residual_of(const std::optional<at::Tensor>& residual, const at::Tensor& y) {
  if (!residual) return {};
  check(residual->sizes() == y.sizes() && residual->scalar_type() == at::kFloat, "a residual of the output's shape");
  return residual->contiguous();
}

// With `over`, the output is written where the residual is.
at::Tensor convolution(const at::Tensor& input, const at::Tensor& values, const at::Tensor& columns, const at::Tensor& pointers,
                       const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& residual, int64_t out_channels,
                       at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                       int64_t groups, double low, double high, int64_t chunk, int64_t vectors, bool over) {
  check(1 <= vectors && vectors <= WIDEST && 0 < chunk && chunk <= 65536, "1 to 8 vectors, chunks of up to 65,536 columns");
  check(input.dim() == 4 && input.scalar_type() == at::kFloat, "float32 pictures (batch, channels, height, width)");
  check(input.size(1) % groups == 0 && out_channels % groups == 0, "channels that divide by the groups");
  const at::Tensor x = input.contiguous();
  const Shape s = shape_of(x, groups, kernel, stride, padding, dilation);
  at::Tensor y = over ? *residual : output({s.n, out_channels, s.oh, s.ow}, x);
  check(y.sizes() == at::IntArrayRef({s.n, out_channels, s.oh, s.ow}), "a residual of the output's shape");
  const at::Tensor added = residual_of(residual, y);
  const Clamp limits{static_cast<float>(low), static_cast<float>(high)};
  const float* start = bias_of(bias, out_channels);
  const int64_t rows = out_channels / groups;
  for (int64_t g = 0; g < groups; ++g) {
    const Weights w = weights_of(values, columns, pointers, rows, s.c * s.kh * s.kw, chunk, g, groups);
    const Pictures io{x.const_data_ptr<float>(), x.size(1), g * s.c, added.defined() ? added.const_data_ptr<float>() : nullptr,
                      y.mutable_data_ptr<float>(), out_channels, g * rows};
    convolve(s, io, w, start ? start + g * rows : nullptr, limits, vectors);
  }
  return y;
}

at::Tensor sparse_conv2d(const at::Tensor& input, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& pointers, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& residual, int64_t out_channels, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double low,
                         double high, int64_t chunk, int64_t vectors) {
  return convolution(input, values, columns, pointers, bias, residual, out_channels, kernel, stride, padding, dilation, groups,
                     low, high, chunk, vectors, false);
}

// A kernel for each channel, dense: its plane is padded and split once, and every weight is a shift of it.
at::Tensor depthwise_conv2d(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                            const std::optional<at::Tensor>& residual, at::IntArrayRef stride, at::IntArrayRef padding,
                            at::IntArrayRef dilation, double low, double high) {
  check(input.dim() == 4 && input.scalar_type() == at::kFloat, "float32 pictures (batch, channels, height, width)");
  check(weight.dim() == 4 && weight.scalar_type() == at::kFloat && weight.size(0) == input.size(1) && weight.size(1) == 1,
        "a float32 weight (channels, 1, height, width)");
  const at::Tensor x = input.contiguous(), kernels = weight.contiguous();
  const Shape s = shape_of(x, x.size(1), kernels.sizes().slice(2), stride, padding, dilation);
  const int64_t channels = x.size(1), plane = s.oh * s.ow, taps = s.kh * s.kw;
  at::Tensor y = output({s.n, channels, s.oh, s.ow}, x);
  const at::Tensor added = residual_of(residual, y);
  const Clamp limits{static_cast<float>(low), static_cast<float>(high)};
  const float *from = x.const_data_ptr<float>(), *weights = kernels.const_data_ptr<float>(), *start = bias_of(bias, channels);
  const float* extra = added.defined() ? added.const_data_ptr<float>() : nullptr;
  float* to = y.mutable_data_ptr<float>();
  const int64_t pitch = Halo::pitch_of(s), lanes = (s.oh - 1) * pitch + s.ow;
  const Halo halo(s, 0, lanes);
  std::vector<int64_t> offsets(taps);
  for (int64_t tap = 0; tap < taps; ++tap) offsets[tap] = halo.offset(s, tap / s.kw, tap % s.kw);
  at::parallel_for(0, s.n * channels, 1, [&](int64_t begin, int64_t end) {
    float* padded = plane_room.get(halo.floats(s) + WIDEST * VL);
    float* sums = sums_room.get(lanes + WIDEST * VL);
    std::memset(padded, 0, (halo.floats(s) + WIDEST * VL) * sizeof(float));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t channel = item % channels;
      halo.fill(s, from + item * s.h * s.w, padded);
      const vec first = (start ? start[channel] : 0.0f) - vec{};
      for (int64_t lane = 0; lane < lanes; lane += 4 * VL) {
        vec acc[4] = {first, first, first, first};
        for (int64_t tap = 0; tap < taps; ++tap) {
          const vec value = weights[channel * taps + tap] - vec{};
          const float* shifted = padded + offsets[tap] + lane;
          for (int i = 0; i < 4; ++i) acc[i] += value * load(shifted + i * VL);
        }
        for (int i = 0; i < 4; ++i) store(sums + lane + i * VL, acc[i]);
      }
      for (int64_t row = 0; row < s.oh; ++row) {
        const int64_t place = item * plane + row * s.ow;
        emit(to + place, sums + row * pitch, extra ? extra + place : nullptr, s.ow, limits);
      }
    }
  });
  return y;
}

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& pointers, const std::optional<at::Tensor>& bias, int64_t out_features, double low,
                         double high, int64_t chunk, int64_t vectors) {
  check(1 <= vectors && vectors <= WIDEST && 0 < chunk && chunk <= 65536, "1 to 8 vectors, chunks of up to 65,536 columns");
  check(input.dim() >= 1 && input.scalar_type() == at::kFloat, "float32 tokens (..., features)");
  const at::Tensor x = input.contiguous();
  const int64_t features = x.size(-1), tokens = features ? x.numel() / features : 0;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  at::Tensor y = output(shape, x);
  const Weights w = weights_of(values, columns, pointers, out_features, features, chunk, 0, 1);
  const Clamp limits{static_cast<float>(low), static_cast<float>(high)};
  project(x.const_data_ptr<float>(), tokens, w, bias_of(bias, out_features), limits, y.mutable_data_ptr<float>(), vectors);
  return y;
}

// PyTorch's own takes longer on this layout than all sparse convolutions of a ResNet together.
at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding) {
  check(input.dim() == 4 && input.scalar_type() == at::kFloat, "float32 pictures (batch, channels, height, width)");
  const at::Tensor x = input.contiguous();
  const int64_t h = x.size(2), w = x.size(3), kh = kernel[0], kw = kernel[1], sh = stride[0], sw = stride[1];
  const int64_t ph = padding[0], pw = padding[1], oh = (h + 2 * ph - kh) / sh + 1, ow = (w + 2 * pw - kw) / sw + 1;
  check(h + 2 * ph >= kh && w + 2 * pw >= kw && 2 * ph <= kh && 2 * pw <= kw,
        "pictures no smaller than the kernel, padding of half of it at most");
  at::Tensor y = output({x.size(0), x.size(1), oh, ow}, x);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const int64_t phase = (w + 2 * pw + sw - 1) / sw;
  const auto larger = [](vec a, vec b) { return (b > a) | (b != b) ? b : a; };  // NaN wins, as in PyTorch
  at::parallel_for(0, x.size(0) * x.size(1), 1, [&](int64_t begin, int64_t end) {
    const int64_t lines = (w + VL) + phase * sw + SLACK;
    float* highest = plane_room.get(lines);  // the largest of kh rows
    float* phases = highest + (w + VL) / VL * VL;  // the same, spread
    std::fill(phases, phases + phase * sw + SLACK / 2, -INFINITY);
    for (int64_t plane = begin; plane < end; ++plane) {
      for (int64_t row = 0; row < oh; ++row) {
        const int64_t top = std::max<int64_t>(row * sh - ph, 0), bottom = std::min(row * sh - ph + kh, h);
        const float* source = from + plane * h * w;
        int64_t i = 0;
        for (; i + VL <= w; i += VL) {
          vec v = load(source + top * w + i);
          for (int64_t r = top + 1; r < bottom; ++r) v = larger(v, load(source + r * w + i));
          store(highest + i, v);
        }
        for (; i < w; ++i) {
          float v = source[top * w + i];
          for (int64_t r = top + 1; r < bottom; ++r) {
            const float other = source[r * w + i];
            v = other > v || other != other ? other : v;
          }
          highest[i] = v;
        }
        spread(highest, w, sw, pw, phases, phase);
        float* line = to + (plane * oh + row) * ow;
        for (int64_t c = 0; c < ow; c += VL) {
          vec v = load(phases + c);
          for (int64_t k = 1; k < kw; ++k) v = larger(v, load(phases + k % sw * phase + k / sw + c));
          if (c + VL <= ow) {
            store(line + c, v);
          } else {
            for (int64_t j = 0; c + j < ow; ++j) line[c + j] = v[j];
          }
        }
      }
    }
  });
  return y;
}

// The mean of every plane: (batch, channels, 1, 1).
at::Tensor average(const at::Tensor& input) {
  check(input.dim() == 4 && input.scalar_type() == at::kFloat, "float32 pictures (batch, channels, height, width)");
  const at::Tensor x = input.contiguous();
  const int64_t plane = x.size(2) * x.size(3);
  at::Tensor y = output({x.size(0), x.size(1), 1, 1}, x);
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, y.numel(), std::max<int64_t>(1, 16384 / std::max<int64_t>(plane, 1)), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const float* own = from + item * plane;
      vec sums = {};
      int64_t i = 0;
      for (; i + VL <= plane; i += VL) sums += load(own + i);
      float sum = 0.0f;
      for (int64_t j = 0; j < VL; ++j) sum += sums[j];
      for (; i < plane; ++i) sum += own[i];
      to[item] = sum / static_cast<float>(plane);
    }
  });
  return y;
}

}  // namespace
