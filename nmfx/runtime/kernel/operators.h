// What torch calls: operators on tensors, checked.

#pragma once

#include <cmath>

#include "lanes.h"
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
      float sum = total(sums);
      for (; i < plane; ++i) sum += own[i];
      to[item] = sum / static_cast<float>(plane);
    }
  });
  return y;
}

// --- pictures as lanes, within a chain: (strips, batch, channels, vectors, VL), of which strips may lie apart

// A picture as lanes and how it is laid out.
struct Laid {
  at::Tensor tensor;
  Lanes lanes;

  int64_t images() const { return tensor.size(1); }
  int64_t channels() const { return tensor.size(2); }
  int64_t strip_floats() const { return tensor.stride(0); }
  int64_t image_floats() const { return tensor.stride(1); }
  const float* data() const { return tensor.const_data_ptr<float>(); }
};

Laid laid(const at::Tensor& x, const Lanes& lanes) {
  check(x.dim() == 5 && x.size(0) == lanes.strips && x.size(3) == lanes.vectors && x.size(4) == VL && x.stride(4) == 1 &&
            x.stride(3) == VL && x.stride(2) == lanes.floats() && x.stride(1) == x.size(2) * lanes.floats() &&
            x.scalar_type() == at::kFloat && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % (VL * sizeof(float)) == 0,
        "a picture as these lanes");
  return {x, lanes};
}

// How an operator by lanes reads: rows and vectors of a step, and vectors that each strip begins late.
struct Stride {
  int64_t down, across;
  at::IntArrayRef late;
};

// What follows a product: `mask` is (rows, 1, VL) or (1, width, VL), or missing where nobody looks between the pixels.
struct After {
  std::optional<Laid> residual;
  std::optional<at::Tensor> mask;
  double low, high;
  bool over;  // the output is written where the residual is
};

// Of a tensor (rows, 1, VL) or (1, width, VL).
Mask mask_of(const at::Tensor& mask, const Lanes& lanes) {
  check(mask.scalar_type() == at::kInt && mask.is_contiguous() && mask.dim() == 3 && mask.size(2) == VL &&
            (mask.size(0) == lanes.rows || mask.size(0) == 1) && (mask.size(1) == lanes.width || mask.size(1) == 1),
        "a mask of these lanes");
  return {mask.const_data_ptr<int32_t>(), mask.size(0) > 1 ? mask.size(1) * VL : 0, mask.size(1) > 1 ? VL : 0};
}

// An output, where its vectors go, and how the input is read.
struct Work {
  Laid x, y;
  Shore shore;
  std::vector<int64_t> strips;
  Reading reading;

  Work(const Laid& x, int64_t channels, const Lanes& lanes, const Stride& stride, const After& after)
      : x(x), y(laid(after.over ? after.residual->tensor
                                : output_strips({lanes.strips, x.images(), channels, lanes.vectors, VL}, x.tensor), lanes)) {
    check(stride.across == 1 || stride.across == 2, "a step of 1 or 2");
    check(x.lanes.strips == lanes.strips && static_cast<int64_t>(stride.late.size()) == lanes.strips, "as many strips");
    check(y.images() == x.images() && y.channels() == channels, "a residual as the output's lanes");
    const auto& residual = after.residual;
    check(!residual || (residual->images() == x.images() && residual->channels() == channels &&
                        residual->lanes.strips == lanes.strips && residual->lanes.length == lanes.length),
          "a residual of the output's shape");
    shore = {lanes, y.tensor.mutable_data_ptr<float>() + lanes.before * VL,
             residual ? residual->data() + residual->lanes.before * VL : nullptr, residual ? residual->lanes.floats() : 0,
             residual ? residual->strip_floats() : 0, {static_cast<float>(after.low), static_cast<float>(after.high)},
             after.mask ? mask_of(*after.mask, lanes) : Mask{}, 0, y.strip_floats()};
    for (int64_t strip = 0; strip < lanes.strips; ++strip) {
      strips.push_back(strip * x.strip_floats() + stride.late[strip] * VL);
    }
    reading = {stride.down * x.lanes.pitch, strips.data()};
  }
  Shore of(int64_t image, int64_t channel) const {
    Shore found = shore;
    found.y += (image * y.channels() + channel) * y.lanes.floats();
    if (shore.residual) found.residual += (image * y.channels() + channel) * shore.residual_floats;
    return found;
  }
};

at::Tensor lanes_conv2d(const Laid& x, const at::Tensor& values, const at::Tensor& columns, const at::Tensor& pointers,
                        const at::Tensor& starts, const std::optional<at::Tensor>& bias, int64_t out_channels, int64_t width,
                        int64_t groups, int64_t chunk, int64_t vectors, const Stride& stride, const Lanes& lanes,
                        const After& after) {
  check(1 <= vectors && vectors <= WIDEST && chunk > 0, "1 to 8 vectors, chunks of columns");
  const int64_t rows = out_channels / groups, chunks = (width + chunk - 1) / chunk;
  check(starts.scalar_type() == at::kInt && starts.is_contiguous() && starts.numel() == groups * chunks, "a start of every chunk");
  const Work work(x, out_channels, lanes, stride, after);
  const float* start = bias_of(bias, out_channels);
  const Pieces pieces(lanes, vectors);
  const int64_t count = pieces.count(), parts = Tiling::parts_of(x.images() * groups * count, rows);
  std::vector<Weights> weights;
  for (int64_t g = 0; g < groups; ++g) weights.push_back(weights_of(values, columns, pointers, rows, width, chunk, g, groups));
  const auto run = stride.across == 2 ? lanes_convolve<2> : lanes_convolve<1>;
  at::parallel_for(0, x.images() * count * groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end;) {  // a piece's groups and parts of the rows are one thread's, where it has several
      const int64_t whole = item / parts, next = std::min(end, (whole + 1) * parts);
      const int64_t first = rows * (item % parts) / parts, last = rows * (next - whole * parts) / parts;
      const int64_t g = whole % groups, piece = whole / groups % count, image = whole / groups / count;
      run(x.data() + image * x.image_floats(), work.reading, starts.const_data_ptr<int32_t>() + g * chunks, weights[g],
          start ? start + g * rows : nullptr, work.of(image, g * rows), pieces, piece, first, last);
      item = next;
    }
  });
  return work.y.tensor;
}

// Every channel by itself: a depthwise convolution, or without a weight the largest of pictures without negative pixels. Its
// halo is made on the way as `local` and `sources` (strips, vectors, 4) say, with the mask `pixels`, or is in memory. There are
// `planes` of the input, the phases of a stride, for each channel of the output.
at::Tensor lanes_by_channel(const Laid& x, const std::optional<Lanes>& local, const std::optional<at::Tensor>& pixels,
                            const std::optional<at::Tensor>& sources, const at::Tensor& offsets,
                            const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias, int64_t planes,
                            const Stride& stride, const Lanes& lanes, const After& after) {
  const int64_t channels = x.channels() / planes, taps = offsets.numel();
  check(offsets.scalar_type() == at::kInt && offsets.is_contiguous(), "offsets of taps");
  check(!weight || (weight->is_contiguous() && weight->scalar_type() == at::kFloat && weight->numel() == channels * taps),
        "a float32 weight (channels, 1, height, width)");
  check(!local || (planes == 1 && pixels && pixels->scalar_type() == at::kInt && pixels->is_contiguous() && sources &&
                   sources->scalar_type() == at::kInt && sources->is_contiguous() &&
                   sources->numel() == lanes.strips * local->vectors * 4),
        "a mask and sources for a halo");
  const Work work(x, channels, lanes, stride, after);
  const float* start = bias_of(bias, channels);
  const float* weights = weight ? weight->const_data_ptr<float>() : nullptr;
  const Pieces pieces(lanes, WIDEST);
  at::parallel_for(0, lanes.strips * x.images() * channels, 1, [&](int64_t begin, int64_t end) {
    float* room = local ? plane_room.get(local->floats()) : nullptr;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t strip = item / channels / x.images(), image = item / channels % x.images(), channel = item % channels;
      const float* from = x.data() + image * x.image_floats() + channel * planes * x.lanes.floats();
      if (local) {
        const auto* all = reinterpret_cast<const Local::Source*>(sources->const_data_ptr<int32_t>());
        const Local halo{*local, pixels->const_data_ptr<int32_t>(), all + strip * local->vectors};
        halo.fill(from + strip * x.strip_floats() + x.lanes.before * VL, x.strip_floats(), room);
      }
      const float* read = local ? room + stride.late[strip] * VL : from + work.reading.strips[strip];
      const Channel in{read, stride.down * (local ? local->pitch : x.lanes.pitch), offsets.const_data_ptr<int32_t>(), taps};
      const Shore own = work.of(image, channel).of(strip);
      if (weights) {
        const auto run = stride.across == 2 ? lanes_depthwise<2> : lanes_depthwise<1>;
        run(in, weights + channel * taps, start ? start[channel] : 0.0f, own, pieces);
      } else {
        const auto run = stride.across == 2 ? lanes_max_pool<2> : lanes_max_pool<1>;
        run(in, own, pieces);
      }
    }
  });
  return work.y.tensor;
}

// The mean of every plane: (batch, channels, 1, 1).
at::Tensor lanes_average(const Laid& x, const at::Tensor& mask, int64_t pixels) {
  const Lanes& lanes = x.lanes;
  const int64_t channels = x.channels();
  at::Tensor y = output({x.images(), channels, 1, 1}, x.tensor);
  const Mask held = mask_of(mask, lanes);
  float* to = y.mutable_data_ptr<float>();
  at::parallel_for(0, y.numel(), 256, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      vec sums = {};
      for (int64_t strip = 0; strip < lanes.strips; ++strip) {
        const float* own = x.data() + strip * x.strip_floats() + item * lanes.floats() + lanes.before * VL;
        for (int64_t row = 0; row < lanes.rows; ++row) {
          for (int64_t at = 0; at < lanes.width; ++at) {
            const places pixel = *reinterpret_cast<const places*>(own + (row * lanes.pitch + at) * VL);
            sums += reinterpret_cast<vec>(pixel & held.at(row, at));
          }
        }
      }
      to[item] = total(sums) / static_cast<float>(pixels);
    }
  });
  return y;
}

// Pictures anew, from plain to lanes or back or from lanes to lanes. `index` is (strips, floats of a channel) of the output; it
// says where in a channel of the input each float is, with the strip it is in above that, or is negative for a zero. `sizes` are
// those of the output behind its channels: height and width of plain pictures, else vectors and VL; where the index is longer,
// there are several channels for each of the input's.
constexpr int32_t IN_STRIP = 1 << 22;

#ifdef __clang__
#define SCALAR
#else
#define SCALAR __attribute__((optimize("no-tree-vectorize")))  // a gather of sixteen lanes takes several times longer
#endif
SCALAR void pick(const float* from, const int32_t* places, int64_t count, float* to) {
  for (int64_t k = 0; k < count; ++k) to[k] = places[k] < 0 ? 0.0f : from[places[k]];
}

at::Tensor rearrange(const at::Tensor& input, const at::Tensor& index, at::IntArrayRef sizes, bool plain) {
  check(index.scalar_type() == at::kInt && index.is_contiguous() && index.dim() == 2 && input.scalar_type() == at::kFloat &&
            (input.dim() == 5 || input.dim() == 4) && sizes.size() == 2 && (!plain || index.size(0) == 1),
        "pictures of float32, an index of int32");
  const at::Tensor x = input.dim() == 4 ? input.contiguous().unsqueeze(0) : input;
  const int64_t images = x.size(1), channels = x.size(2), strips = index.size(0), floats = index.size(1);
  const int64_t planes = floats / std::max<int64_t>(1, sizes[0] * sizes[1]);
  at::Tensor y = plain ? output({images, channels * planes, sizes[0], sizes[1]}, x)
                       : output_strips({strips, images, channels * planes, sizes[0], sizes[1]}, x);
  const float* source = x.const_data_ptr<float>();
  float* target = y.mutable_data_ptr<float>();
  const int64_t from_strip = x.stride(0), from_channel = x.stride(2), to_strip = plain ? 0 : y.stride(0);
  std::vector<int32_t> places(index.const_data_ptr<int32_t>(), index.const_data_ptr<int32_t>() + index.numel());
  if (x.size(0) > 1) {
    for (int32_t& place : places) {
      if (place >= 0) place = static_cast<int32_t>(place / IN_STRIP * from_strip + place % IN_STRIP);
    }
  }
  at::parallel_for(0, strips * images * channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t strip = item / (images * channels), channel = item % (images * channels);
      const float* from = source + channel * from_channel;
      pick(from, places.data() + strip * floats, floats, target + strip * to_strip + channel * floats);
    }
  });
  return y;
}

}  // namespace
