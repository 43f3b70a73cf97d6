// Operators on pictures as lanes, within a chain: (strips, batch, channels, vectors, VL), of which strips may lie apart.

#pragma once

#include "lanes.h"
#include "operators.h"

namespace {

// A picture as lanes and how it is laid out.
struct Laid {
  Tensor tensor;
  Lanes lanes;

  int64_t images() const { return tensor.size(1); }
  int64_t channels() const { return tensor.size(2); }
  int64_t strip_floats() const { return tensor.stride(0); }
  int64_t image_floats() const { return tensor.stride(1); }
  const float* data() const { return tensor.const_data_ptr<float>(); }
};

// Rows within a lane, and lanes with what is before them within a channel: what `Writer` writes by.
void check_lanes(const Lanes& lanes) {
  const std::array<int64_t, 9> all{lanes.rows, lanes.width, lanes.pitch, lanes.length, lanes.before, lanes.vectors, lanes.strips, lanes.left,
                         lanes.right};
  check(within(all, 0, LONGEST) && lanes.rows && lanes.width && lanes.strips && lanes.width <= lanes.pitch &&
            product({lanes.rows - 1, lanes.pitch}) + lanes.width <= lanes.length && lanes.before + lanes.length <= lanes.vectors &&
            lanes.left <= lanes.length && lanes.right <= lanes.length,
        "lanes that lie within their vectors");
}

// Whether pictures of all strips are one behind the other, each strip anywhere.
bool strips_in_order(const Tensor& x) {
  const int64_t channel = x.size(3) * x.size(4), strip = x.size(1) * x.size(2) * channel;
  return x.stride(4) == 1 && x.stride(3) == x.size(4) && x.stride(2) == channel && x.stride(1) == x.size(2) * channel &&
         (x.size(0) == 1 || x.stride(0) >= strip);
}

Laid laid(const Tensor& x, const Lanes& lanes) {
  check_lanes(lanes);
  check(x.dim() == 5 && sound(x, Type::FLOAT) && x.size(0) == lanes.strips && x.size(2) > 0 && x.size(3) == lanes.vectors &&
            x.size(4) == VL && strips_in_order(x) && x.stride(0) % VL == 0 && aligned(x.data, VL * sizeof(float)),
        "a picture as these lanes");
  return {x, lanes};
}

// How an operator by lanes reads: rows and vectors of a step, and vectors that each strip begins late.
struct Stride {
  int64_t down, across;
  Sizes late;
};

// What follows a product: `mask` is (rows, 1, VL) or (1, width, VL), or missing where nobody looks between the pixels.
struct After {
  std::optional<Laid> residual;
  std::optional<Tensor> mask;
  double low, high;
  bool over;  // the output is written where the residual is
};

// Of a tensor (rows, 1, VL) or (1, width, VL).
Mask mask_of(const Tensor& mask, const Lanes& lanes) {
  check(packed_in_order(mask, Type::INT) && mask.dim() == 3 && mask.size(2) == VL && aligned(mask.data, VL * 4) &&
            (mask.size(0) == lanes.rows || mask.size(0) == 1) && (mask.size(1) == lanes.width || mask.size(1) == 1),
        "a mask of these lanes");
  return {mask.const_data_ptr<int32_t>(), mask.size(0) > 1 ? mask.size(1) * VL : 0, mask.size(1) > 1 ? VL : 0};
}

// An output, where its vectors go, and how the input is read.
struct LanesIO {
  Laid x, y;
  Writer writer;
  std::vector<int64_t> strips;
  Reading reading;

  LanesIO(const Laid& x, int64_t channels, const Lanes& lanes, const Stride& stride, const After& after)
      : x(x), y(made(x, channels, lanes, stride, after)) {
    check(y.images() == x.images() && y.channels() == channels, "a residual as the output's lanes");
    const auto& residual = after.residual;
    check(!residual || (residual->images() == x.images() && residual->channels() == channels &&
                        residual->lanes.strips == lanes.strips && residual->lanes.length == lanes.length),
          "a residual of the output's shape");
    writer = {lanes, y.tensor.mutable_data_ptr<float>() + lanes.before * VL,
             residual ? residual->data() + residual->lanes.before * VL : nullptr, residual ? residual->lanes.floats() : 0,
             residual ? residual->strip_floats() : 0, {static_cast<float>(after.low), static_cast<float>(after.high)},
             after.mask ? mask_of(*after.mask, lanes) : Mask{}, 0, y.strip_floats()};
    for (int64_t strip = 0; strip < lanes.strips; ++strip) {
      strips.push_back(strip * x.strip_floats() + stride.late[strip] * VL);
    }
    reading = {stride.down * x.lanes.pitch, strips.data()};
  }
  static Laid made(const Laid& x, int64_t channels, const Lanes& lanes, const Stride& stride, const After& after) {
    check((stride.across == 1 || stride.across == 2) && 0 <= stride.down && stride.down <= LONGEST, "a step of 1 or 2");
    check(x.lanes.strips == lanes.strips && static_cast<int64_t>(stride.late.size()) == lanes.strips &&
              within(stride.late, -LONGEST, LONGEST),
          "as many strips");
    check_lanes(lanes);
    if (!after.over) return laid(output_strips({lanes.strips, x.images(), channels, lanes.vectors, VL}), lanes);
    check(after.residual && !after.residual->tensor.overlaps(x.tensor), "a residual to write over");
    return laid(after.residual->tensor, lanes);
  }
  // What is read, from where windows are set on and so much further (`reach`), lies within so many vectors.
  void check_reads(const Stride& stride, const Reach& reach, int64_t pitch, int64_t vectors) const {
    const auto [least, most] = std::minmax_element(stride.late.begin(), stride.late.end());
    const int64_t down = product({stride.down, y.lanes.rows - 1, pitch}), across = stride.across * (y.lanes.width - 1);
    check(*least + reach.least >= 0 && *most + down + across + reach.most < vectors, "windows within what they read");
  }
  Writer of(int64_t image, int64_t channel) const {
    Writer found = writer;
    found.y += (image * y.channels() + channel) * y.lanes.floats();
    if (writer.residual) found.residual += (image * y.channels() + channel) * writer.residual_floats;
    return found;
  }
};

Tensor lanes_conv2d(const Laid& x, const Tensor& values, const Tensor& columns, const Tensor& pointers,
                        const Tensor& starts, const std::optional<Tensor>& bias, int64_t channels, int64_t out_channels,
                        int64_t width, int64_t groups, int64_t chunk, int64_t vectors, const Stride& stride, const Lanes& lanes,
                        const After& after) {
  check(1 <= vectors && vectors <= WIDEST, "1 to 8 vectors");
  check(x.channels() == channels, "lanes of ", channels, " channels, got ", x.channels());
  const Packs packs = packs_of(values, columns, pointers, &starts, out_channels, groups, width, chunk);
  const int64_t rows = packs.rows, chunks = packs.chunks;
  const LanesIO io(x, out_channels, lanes, stride, after);
  io.check_reads(stride, packs.reach, x.lanes.pitch, product({x.channels(), x.lanes.vectors}));
  const float* start = bias_of(bias, out_channels);
  const Pieces pieces(lanes, vectors);
  const int64_t count = pieces.count(), parts = Tiling::parts_of(x.images() * groups * count, rows);
  std::vector<Weights> weights;
  for (int64_t g = 0; g < groups; ++g) weights.push_back(packs.of(g));
  const auto run = stride.across == 2 ? lanes_convolve<2> : lanes_convolve<1>;
  parallel_for(0, x.images() * count * groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end;) {  // a piece's groups and parts of the rows are one thread's, where it has several
      const int64_t whole = item / parts, next = std::min(end, (whole + 1) * parts);
      const int64_t first = rows * (item % parts) / parts, last = rows * (next - whole * parts) / parts;
      const int64_t g = whole % groups, piece = whole / groups % count, image = whole / groups / count;
      run(x.data() + image * x.image_floats(), io.reading, starts.const_data_ptr<int32_t>() + g * chunks, weights[g],
          start ? start + g * rows : nullptr, io.of(image, g * rows), pieces, piece, first, last);
      item = next;
    }
  });
  return io.y.tensor;
}

// Whether every vector of a halo comes from the picture, under a mask that is there.
void check_halo(const Laid& x, const Lanes& local, const std::optional<Tensor>& pixels,
                const std::optional<Tensor>& sources, int64_t planes) {
  check_lanes(local);
  check(planes == 1 && pixels && packed_in_order(*pixels, Type::INT) && aligned(pixels->data, VL * 4) && sources &&
            packed_in_order(*sources, Type::INT) && sources->numel() == product({x.lanes.strips, local.vectors, 4}),
        "a mask and sources for a halo");
  const Known::Numbers asked{Known::HALO, x.lanes.strips, x.lanes.before, x.lanes.vectors, local.vectors, pixels->numel()};
  known->reach({&*sources}, asked, [&] {
    const auto* all = reinterpret_cast<const Local::Source*>(sources->const_data_ptr<int32_t>());
    bool fits = true;
    for (int64_t k = 0; k < x.lanes.strips * local.vectors; ++k) {
      const Local::Source& one = all[k];
      if (one.lanes == Local::NONE) continue;
      const int64_t strip = k / local.vectors + one.strip, vector = x.lanes.before + one.vector;
      fits = fits && 0 <= strip && strip < x.lanes.strips && 0 <= vector && vector < x.lanes.vectors &&
             std::abs(int64_t(one.lanes)) < Local::NONE && one.mask >= 0 && one.mask % VL == 0 && one.mask + VL <= pixels->numel();
    }
    check(fits, "a halo from within the picture");
    return Reach{};
  });
}

// Every channel by itself: a depthwise convolution, or without a weight the largest of pictures without negative pixels. Its
// halo is made on the way as `local` and `sources` (strips, vectors, 4) say, with the mask `pixels`, or is in memory. There are
// `planes` of the input, the phases of a stride, for each channel of the output.
Tensor lanes_by_channel(const Laid& x, const std::optional<Lanes>& local, const std::optional<Tensor>& pixels,
                            const std::optional<Tensor>& sources, const Tensor& offsets,
                            const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, int64_t planes,
                            const Stride& stride, const Lanes& lanes, const After& after) {
  check(planes > 0 && x.channels() % planes == 0, "as many planes of every channel");
  const int64_t channels = x.channels() / planes, taps = offsets.numel();
  check(packed_in_order(offsets, Type::INT) && taps > 0, "offsets of taps");
  check(!weight || (packed_in_order(*weight, Type::FLOAT) && weight->numel() == channels * taps),
        "a float32 weight (channels, 1, height, width) of these channels, got ", channels);
  if (local) check_halo(x, *local, pixels, sources, planes);
  const LanesIO io(x, channels, lanes, stride, after);
  const int64_t vectors = local ? local->vectors : product({planes, x.lanes.vectors});
  io.check_reads(stride, reach_of(offsets), local ? local->pitch : x.lanes.pitch, vectors);
  const float* start = bias_of(bias, channels);
  const float* weights = weight ? weight->const_data_ptr<float>() : nullptr;
  const Pieces pieces(lanes, WIDEST);
  parallel_for(0, lanes.strips * x.images() * channels, 1, [&](int64_t begin, int64_t end) {
    float* room = local ? plane_scratch.get(local->floats()) : nullptr;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t strip = item / channels / x.images(), image = item / channels % x.images(), channel = item % channels;
      const float* from = x.data() + image * x.image_floats() + channel * planes * x.lanes.floats();
      if (local) {
        const auto* all = reinterpret_cast<const Local::Source*>(sources->const_data_ptr<int32_t>());
        const Local halo{*local, pixels->const_data_ptr<int32_t>(), all + strip * local->vectors};
        halo.fill(from + strip * x.strip_floats() + x.lanes.before * VL, x.strip_floats(), room);
      }
      const float* read = local ? room + stride.late[strip] * VL : from + io.reading.strips[strip];
      const Channel in{read, stride.down * (local ? local->pitch : x.lanes.pitch), offsets.const_data_ptr<int32_t>(), taps};
      const Writer own = io.of(image, channel).of(strip);
      if (weights) {
        const auto run = stride.across == 2 ? lanes_depthwise<2> : lanes_depthwise<1>;
        run(in, weights + channel * taps, start ? start[channel] : 0.0f, own, pieces);
      } else {
        const auto run = stride.across == 2 ? lanes_max_pool<2> : lanes_max_pool<1>;
        run(in, own, pieces);
      }
    }
  });
  return io.y.tensor;
}

// The mean of every plane: (batch, channels, 1, 1).
Tensor lanes_average(const Laid& x, const Tensor& mask, int64_t pixels) {
  check(0 < pixels && pixels <= MOST, "planes with pixels");
  const Lanes& lanes = x.lanes;
  const int64_t channels = x.channels();
  Tensor y = output({x.images(), channels, 1, 1});
  const Mask held = mask_of(mask, lanes);
  float* to = y.mutable_data_ptr<float>();
  parallel_for(0, y.numel(), 256, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      vec sums = {};
      for (int64_t strip = 0; strip < lanes.strips; ++strip) {
        const float* own = x.data() + strip * x.strip_floats() + item * lanes.floats() + lanes.before * VL;
        for (int64_t row = 0; row < lanes.rows; ++row) {
          for (int64_t at = 0; at < lanes.width; ++at) {
            const vec pixel = load(own + (row * lanes.pitch + at) * VL);
            sums += reinterpret_cast<vec>(reinterpret_cast<places>(pixel) & held.at(row, at));
          }
        }
      }
      to[item] = total(sums) / static_cast<float>(pixels);
    }
  });
  return y;
}

}  // namespace
