// Operators on tensors, checked.

#pragma once


#include <cmath>

#include "checks.h"
#include "memory.h"
#include "pictures.h"
#include "tokens.h"

namespace {

// Packed weights of all groups; each has its own rows, chunks and pointers, one group behind the other.
struct Packs {
  const float* values;
  const uint16_t* columns;
  const int32_t* pointers;
  int64_t rows, width, chunk, chunks;
  Reach reach;  // of columns, or by lanes of vectors from where a picture begins

  Weights of(int64_t group) const { return {values, columns, pointers + group * rows * chunks, rows, width, chunk}; }
};

// Rows one after the other, each of which has columns of its chunk only, none twice; in order, where no `starts` count vectors.
Reach packs_reach(const Packs& packs, int64_t groups, int64_t count, const int32_t* starts) {
  const int64_t lines = groups * packs.chunks * packs.rows;
  bool fits = packs.pointers[0] == 0 && packs.pointers[lines] == count;
  for (int64_t line = 0; line < lines; ++line) fits = fits && packs.pointers[line] <= packs.pointers[line + 1];
  check(fits, "pointers that rise from 0 to the number of values");
  Reach reach{starts ? starts[0] : 0, starts ? starts[0] : 0};
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t part = line / packs.rows, chunk = part % packs.chunks;
    const int64_t room = std::min(packs.chunk, packs.width - chunk * packs.chunk);
    const int64_t begin = packs.pointers[line], end = packs.pointers[line + 1], first = packs.pointers[part * packs.rows];
    check(end - begin <= room, "no more columns in a row than its chunk has");
    const int32_t* group = packs.pointers + part / packs.chunks * packs.chunks * packs.rows;
    const bool whole = group[packs.chunks * packs.rows] - group[0] == packs.rows * packs.width;  // then rows share columns
    int64_t last = -1, most = 0;
    for (int64_t j = begin; j < end; ++j) {
      const int64_t column = packs.columns[j];
      fits = fits && (starts ? !whole || column == packs.columns[first + j - begin] : last < column && column < room);
      last = column;
      most = std::max(most, column);
    }
    reach.least = std::min<int64_t>(reach.least, starts ? starts[part] : 0);
    reach.most = std::max<int64_t>(reach.most, most + (starts ? starts[part] : 0));
  }
  check(fits, "columns in order and within their chunk");
  return reach;
}

Packs packs_of(const Tensor& values, const Tensor& columns, const Tensor& pointers, const Tensor* starts,
               int64_t out, int64_t groups, int64_t width, int64_t chunk) {
  check(0 < chunk && chunk <= 65536 && 0 < width && width <= LONGEST, "chunks of up to 65,536 columns, and a width");
  check(groups > 0 && 0 < out && out <= LONGEST && out % groups == 0, "output channels that divide by the groups");
  check(line(values, Type::FLOAT) && line(columns, Type::SHORT) && line(pointers, Type::INT),
        "contiguous values of float32, columns of int16, pointers of int32");
  const int64_t rows = out / groups, chunks = (width + chunk - 1) / chunk;
  check(pointers.numel() == product({out, chunks}) + 1 && columns.numel() == values.numel(), "packed weights of this shape");
  check(!starts || (line(*starts, Type::INT) && starts->numel() == product({groups, chunks})), "a start of every chunk");
  Packs packs{values.const_data_ptr<float>(), reinterpret_cast<const uint16_t*>(columns.const_data_ptr<int16_t>()),
              pointers.const_data_ptr<int32_t>(), rows, width, chunk, chunks, {}};
  const Known::Numbers asked{Known::WEIGHTS, out, groups, width, chunk, values.numel(), starts != nullptr};
  const auto read = [&] { return packs_reach(packs, groups, values.numel(), starts ? starts->const_data_ptr<int32_t>() : nullptr); };
  packs.reach = starts ? known->reach({&columns, &pointers, starts}, asked, read) : known->reach({&columns, &pointers}, asked, read);
  return packs;
}

const float* bias_of(const std::optional<Tensor>& bias, int64_t rows) {
  if (!bias) return nullptr;
  check(line(*bias, Type::FLOAT) && bias->numel() == rows, "a contiguous float32 bias of every row");
  return bias->const_data_ptr<float>();
}

// Pictures that have pixels, one behind the other.
Tensor pictures_of(const Tensor& input) {
  check(input.dim() == 4 && sound(input, Type::FLOAT), "float32 pictures (batch, channels, height, width)");
  check(within(input.sizes().slice(1), 1, LONGEST) && input.size(0) <= LONGEST, "pictures with channels and pixels, got ",
        input.sizes());
  product({input.size(0), input.size(1), input.size(2), input.size(3)});
  const Tensor x = input.contiguous();
  return x.as(x.sizes());  // where a size is 1, its stride can be any: channels last at 1x1
}

// Padding: of both sides alike (height, width), or of each (top, left, bottom, right).
Shape shape_of(const Tensor& x, int64_t groups, Sizes kernel, Sizes stride, Sizes padding,
               Sizes dilation) {
  check(kernel.size() == 2 && within(kernel, 1, LONGEST), "a kernel of two sizes");
  check(stride.size() == 2 && within(stride, 1, WIDEST_STEP), "two strides of 1 to ", WIDEST_STEP);
  check((padding.size() == 2 || padding.size() == 4) && within(padding, 0, LONGEST), "padding of two or four numbers");
  check(dilation.size() == 2 && within(dilation, 1, LONGEST), "two dilations");
  const int64_t bottom = padding[padding.size() - 2], right = padding[padding.size() - 1];
  Shape s{x.size(0), x.size(1) / groups, x.size(2), x.size(3), 0, 0, kernel[0], kernel[1], stride[0], stride[1],
          padding[0], padding[1], dilation[0], dilation[1], right};
  const int64_t down = s.h + s.ph + bottom - s.dh * (s.kh - 1) - 1, across = s.w + s.pw + right - s.dw * (s.kw - 1) - 1;
  check(down >= 0 && across >= 0, "pictures no smaller than the kernel");
  product({s.h + s.ph + bottom, s.w + s.pw + right});
  s.oh = down / s.sh + 1;
  s.ow = across / s.sw + 1;
  return s;
}

// The residual as the output is laid out; undefined when there is none.
Tensor residual_of(const Residual& residual, Sizes sizes) {
  const auto& one = residual.tensor;
  if (!one) return {};
  check(sound(*one, Type::FLOAT) && same(one->sizes(), sizes), "a float32 residual of the output's shape ", sizes);
  return one->contiguous();
}

Tensor sparse_conv2d(const Tensor& input, const Tensor& values, const Tensor& columns, const Tensor& pointers,
                         const std::optional<Tensor>& bias, const Residual& residual, int64_t out_channels, int64_t width,
                         Sizes kernel, Sizes stride, Sizes padding, Sizes dilation,
                         int64_t groups, double low, double high, int64_t chunk, int64_t vectors) {
  check(1 <= vectors && vectors <= WIDEST, "1 to 8 vectors");
  check(groups > 0 && input.dim() == 4 && input.size(1) % groups == 0, "channels that divide by the groups");
  const Tensor x = pictures_of(input);
  const Shape s = shape_of(x, groups, kernel, stride, padding, dilation);
  check(product({s.c, s.kh, s.kw}) == width, "pictures of the weight's channels, got ", x.size(1));
  const Packs packs = packs_of(values, columns, pointers, nullptr, out_channels, groups, width, chunk);
  const std::array<int64_t, 4> sizes{s.n, out_channels, s.oh, s.ow};
  product({s.n, out_channels, s.oh, s.ow});
  const Tensor added = residual_of(residual, sizes);
  const auto& own = residual.tensor;
  check(!residual.over || (own && own->is_contiguous() && !own->overlaps(input)), "a residual to write over");
  const float* start = bias_of(bias, out_channels);
  Tensor y = residual.over ? *own : output(sizes);
  const Clamp limits{static_cast<float>(low), static_cast<float>(high)};
  for (int64_t g = 0; g < groups; ++g) {
    const Pictures io{x.const_data_ptr<float>(), x.size(1), g * s.c, added.defined() ? added.const_data_ptr<float>() : nullptr,
                      y.mutable_data_ptr<float>(), out_channels, g * packs.rows};
    convolve(s, io, packs.of(g), start ? start + g * packs.rows : nullptr, limits, vectors);
  }
  return y;
}

// A kernel for each channel, dense: its plane is padded and split once, and every weight is a shift of it.
Tensor depthwise_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Residual& residual, Sizes stride, Sizes padding, Sizes dilation,
                            double low, double high) {
  const Tensor x = pictures_of(input);
  check(weight.dim() == 4 && sound(weight, Type::FLOAT) && weight.size(0) == x.size(1) && weight.size(1) == 1,
        "a float32 weight (channels, 1, height, width) of these channels, got ", x.size(1));
  const Tensor kernels = weight.contiguous();
  const Shape s = shape_of(x, x.size(1), kernels.sizes().slice(2), stride, padding, dilation);
  const int64_t channels = x.size(1), plane = s.oh * s.ow, taps = s.kh * s.kw;
  const std::array<int64_t, 4> sizes{s.n, channels, s.oh, s.ow};
  product({s.n, channels, s.oh, s.ow});
  const Tensor added = residual_of(residual, sizes);
  const Clamp limits{static_cast<float>(low), static_cast<float>(high)};
  const float *from = x.const_data_ptr<float>(), *weights = kernels.const_data_ptr<float>(), *start = bias_of(bias, channels);
  const float* extra = added.defined() ? added.const_data_ptr<float>() : nullptr;
  Tensor y = output(sizes);
  float* to = y.mutable_data_ptr<float>();
  const int64_t pitch = Halo::pitch_of(s), lanes = (s.oh - 1) * pitch + s.ow;
  const Halo halo(s, 0, lanes);
  std::vector<int64_t> offsets(taps);
  for (int64_t tap = 0; tap < taps; ++tap) offsets[tap] = halo.offset(s, tap / s.kw, tap % s.kw);
  parallel_for(0, s.n * channels, 1, [&](int64_t begin, int64_t end) {
    float* padded = plane_scratch.get(halo.floats(s) + WIDEST * VL);
    float* sums = sums_scratch.get(lanes + WIDEST * VL);
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

Tensor sparse_linear(const Tensor& input, const Tensor& values, const Tensor& columns,
                         const Tensor& pointers, const std::optional<Tensor>& bias, int64_t out_features, int64_t width,
                         double low, double high, int64_t chunk, int64_t vectors) {
  check(1 <= vectors && vectors <= WIDEST, "1 to 8 vectors");
  check(input.dim() >= 1 && sound(input, Type::FLOAT), "float32 tokens (..., features)");
  check(input.size(input.dim() - 1) == width, "tokens of ", width, " features, got ", input.size(input.dim() - 1));
  const Packs packs = packs_of(values, columns, pointers, nullptr, out_features, 1, width, chunk);
  const int64_t tokens = input.numel() / width;
  product({tokens, std::max(width, out_features)});
  const float* start = bias_of(bias, out_features);
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = out_features;
  const Tensor x = input.contiguous();
  Tensor y = output(Sizes(shape.data(), shape.size()));
  const Clamp limits{static_cast<float>(low), static_cast<float>(high)};
  project(x.const_data_ptr<float>(), tokens, packs.of(0), start, limits, y.mutable_data_ptr<float>(), vectors);
  return y;
}

// PyTorch's own takes longer on this layout than all sparse convolutions of a ResNet together.
Tensor max_pool2d(const Tensor& input, Sizes kernel, Sizes stride, Sizes padding) {
  const Tensor x = pictures_of(input);
  check(kernel.size() == 2 && within(kernel, 1, LONGEST), "a kernel of two sizes");
  check(stride.size() == 2 && within(stride, 1, WIDEST_STEP), "two strides of 1 to ", WIDEST_STEP);
  check(padding.size() == 2 && within(padding, 0, LONGEST), "padding of two numbers");
  const int64_t h = x.size(2), w = x.size(3), kh = kernel[0], kw = kernel[1], sh = stride[0], sw = stride[1];
  const int64_t ph = padding[0], pw = padding[1], oh = (h + 2 * ph - kh) / sh + 1, ow = (w + 2 * pw - kw) / sw + 1;
  check(h + 2 * ph >= kh && w + 2 * pw >= kw && 2 * ph <= kh && 2 * pw <= kw,
        "pictures no smaller than the kernel, padding of half of it at most");
  product({x.size(0), x.size(1), oh, ow});
  Tensor y = output({x.size(0), x.size(1), oh, ow});
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const int64_t phase = (w + 2 * pw + sw - 1) / sw;
  parallel_for(0, x.size(0) * x.size(1), 1, [&](int64_t begin, int64_t end) {
    const int64_t lines = (w + VL) + phase * sw + SLACK;
    float* highest = plane_scratch.get(lines);  // the largest of kh rows
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

// (batch, ...) to (batch, features), over the same memory.
Tensor flatten(const Tensor& input) {
  check(input.dim() > 1, "a batch to flatten");
  const Tensor x = input.contiguous();
  return x.as({x.size(0), x.size(0) ? x.numel() / x.size(0) : product(x.sizes().slice(1))});
}

// The mean of every plane: (batch, channels, 1, 1).
Tensor average(const Tensor& input) {
  const Tensor x = pictures_of(input);
  const int64_t plane = x.size(2) * x.size(3);
  Tensor y = output({x.size(0), x.size(1), 1, 1});
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  parallel_for(0, y.numel(), std::max<int64_t>(1, 16384 / plane), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const float* own = from + item * plane;
      vec sums = {};
      int64_t i = 0;
      for (; i + VL <= plane; i += VL) sums += load(own + i);
      float sum = total(sums);
      for (; i < plane; ++i) sum += own[i];
      to[item] = sum / static_cast<float>(plane);
    }
  });
  return y;
}

}  // namespace
