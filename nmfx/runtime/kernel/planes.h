// Pictures of bytes as planes: a channel is one stream of pixels, row after row, `row` bytes apart. The bytes between rows, behind
// the last one and before the first stand for zeros around the picture, so that every shift of a window is the same stream from
// another place: no padding, nothing packed. A stride of two reads a picture as up to four, one for each phase.

#pragma once

#include <optional>

#include "bytes.h"
#include "checks.h"
#include "memory.h"
#include "operators.h"

namespace {

constexpr int64_t LINE = 64;  // bytes: streams begin at and are computed by so many, on every processor

inline int64_t whole_lines(int64_t count) { return (count + LINE - 1) / LINE * LINE; }

// How a picture (images, channels, pitch) of bytes lies in memory.
struct Planes {
  int64_t height, width, row;
  int64_t pitch;   // bytes of a channel
  int64_t margin;  // bytes before the first channel and behind the last that may be read
  int64_t zero;    // the byte that stands for zero

  int64_t length() const { return (height - 1) * row + width; }
  int64_t computed() const { return whole_lines(length()); }
  bool alike(const Planes& other) const { return height == other.height && width == other.width && row == other.row; }
};

void check_planes(const Planes& p) {
  const std::array<int64_t, 5> sizes{p.height, p.width, p.row, p.pitch, p.margin};
  check(within(sizes, 0, LONGEST) && p.height && p.width && p.row >= p.width && product({p.height, p.row}) <= LONGEST &&
            p.pitch % LINE == 0 && p.computed() <= p.pitch && p.margin % LINE == 0 && 0 <= p.zero && p.zero <= 255,
        "planes that lie within their channels");
}

// A picture and how it lies there.
struct Planed {
  Tensor tensor;
  Planes planes;

  int64_t images() const { return tensor.size(0); }
  int64_t channels() const { return tensor.size(1); }
  uint8_t* at(int64_t image, int64_t channel) const {
    return static_cast<uint8_t*>(tensor.data) + (image * channels() + channel) * planes.pitch;
  }
};

Planed planed(const Tensor& x, const Planes& planes) {
  check_planes(planes);
  check(x.dim() == 3 && packed_in_order(x, Type::BYTE) && x.size(1) > 0 && x.size(2) == planes.pitch && x.margin == planes.margin,
        "a picture as these planes");
  return {x, planes};
}

// An output that nobody has written yet but its margins.
Planed output_planes(int64_t images, int64_t channels, const Planes& planes) {
  check_planes(planes);
  const int64_t bytes = product({images, channels, planes.pitch}) + 2 * planes.margin + LINE;  // that rows are read by
  const Pool::Buffer buffer = pool.take((bytes + 3) / 4);
  Tensor made = pooled(buffer, {images, channels, planes.pitch});
  made.type = Type::BYTE;
  made.margin = planes.margin;
  made.data = static_cast<uint8_t*>(made.data) + planes.margin;
  const Planed y{made, planes};
  const auto zero = static_cast<int>(planes.zero);
  if (planes.margin) {
    std::memset(y.at(0, 0) - planes.margin, zero, planes.margin);
    std::memset(y.at(images, 0), zero, planes.margin);
  }
  if (planes.pitch > planes.computed()) {
    parallel_for(0, images * channels, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) std::memset(y.at(0, i) + planes.computed(), zero, planes.pitch - planes.computed());
    });
  }
  return y;
}

// Which columns and rows of a picture, modulo a stride of two, become pictures of their own: 2 * row + column, ascending.
void check_phases(Sizes phases, int64_t stride) {
  check((stride == 1 || stride == 2) && !phases.empty() && phases.size() <= 4 && within(phases, 0, stride == 2 ? 3 : 0), "phases of a stride of 1 or 2");
}

// A thread's memory for rows of a picture of `width` pixels, as it is and split into even and odd ones.
struct Rows {
  std::vector<uint8_t> memory;
  int64_t size;
  explicit Rows(int64_t width) : memory(3 * (width + 2 * VB)), size(width + 2 * VB) {}
  uint8_t* at(int64_t i) { return memory.data() + i * size; }
};

// Writes rows of a picture where its planes have them; `row(y, to)` gives row y, in `to` or where VB bytes behind it can be read.
template <class Row>
void fill_planes(const Planed& y, int64_t image, int64_t channel, int64_t height, int64_t width, int64_t stride, Sizes phases,
                 Rows& rows, const Row& row) {
  const Planes& p = y.planes;
  const auto count = static_cast<int64_t>(phases.size());
  const auto zero = static_cast<int>(p.zero);
  const auto put = [&](int64_t i, int64_t r, int64_t all, const uint8_t* from, int64_t pixels) {  // row r of `all`, and what is behind it
    uint8_t* to = y.at(image, channel * count + i) + r * p.row;
    std::memcpy(to, from, pixels);
    std::memset(to + pixels, zero, (r + 1 < all ? p.row : p.pitch - r * p.row) - pixels);
  };
  for (int64_t i = 0; i < count; ++i) {  // a picture of one row or column has phases without pixels
    const int64_t phase = phases.data()[i];
    if (phase / 2 >= height || phase % 2 >= width) std::memset(y.at(image, channel * count + i), zero, p.pitch);
  }
  for (int64_t r = 0; r < height; ++r) {
    if (stride == 1) {
      put(0, r, height, row(r, rows.at(0)), width);
      continue;
    }
    bool split = false;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t phase = phases.data()[i], odd = phase % 2, first = phase / 2;
      if (first != r % 2 || odd >= width) continue;
      if (!split) split_bytes(row(r, rows.at(0)), width, rows.at(1), rows.at(2));
      split = true;
      put(i, r / 2, (height - first + 1) / 2, rows.at(1 + odd), (width - odd + 1) / 2);
    }
  }
}

template <class Row>
Planed fill_all(int64_t images, int64_t channels, int64_t height, int64_t width, int64_t stride, Sizes phases, const Planes& planes,
                const Row& row) {
  check_phases(phases, stride);
  check(planes.height == (height + stride - 1) / stride && planes.width == (width + stride - 1) / stride,
        "planes for pictures of ", height, " x ", width);
  const Planed y = output_planes(images, product({channels, static_cast<int64_t>(phases.size())}), planes);
  parallel_for(0, images * channels, 1, [&](int64_t begin, int64_t end) {
    Rows rows(width);
    for (int64_t i = begin; i < end; ++i) {
      fill_planes(y, i / channels, i % channels, height, width, stride, phases, rows,
                  [&](int64_t r, uint8_t* to) { return row(i / channels, i % channels, r, to); });
    }
  });
  return y;
}

// Plain pictures of float32, or of bytes as they are, as planes.
Tensor planes_of(const Tensor& input, double inverse, const Planes& planes, int64_t stride, Sizes phases) {
  check(input.dim() == 4 && (sound(input, Type::FLOAT) || sound(input, Type::BYTE)) && within(input.sizes().slice(1), 1, LONGEST),
        "pictures of float32 or bytes");
  const Tensor x = input.contiguous();
  const int64_t height = x.size(2), width = x.size(3), plane = product({height, width});
  const auto factor = static_cast<float>(inverse), zero = static_cast<float>(planes.zero);
  const bool bytes = x.type == Type::BYTE;
  return fill_all(x.size(0), x.size(1), height, width, stride, phases, planes, [&](int64_t image, int64_t channel, int64_t r, uint8_t* to) {
    const int64_t place = (image * x.size(1) + channel) * plane + r * width;
    if (bytes) return static_cast<const uint8_t*>(std::memcpy(to, static_cast<const uint8_t*>(x.data) + place, width));
    const float* from = static_cast<const float*>(x.data) + place;
    int64_t i = 0;
    for (; i + VB <= width; i += VB) store_bytes(to + i, quantized(from + i, factor, zero));
    if (i < width) {
      alignas(64) float rest[VB] = {};
      std::memcpy(rest, from + i, (width - i) * sizeof(float));
      store_bytes(to + i, quantized(rest, factor, zero));
    }
    return static_cast<const uint8_t*>(to);
  }).tensor;
}

// Planes as those of the phases of a stride of two, or with another distance between their rows.
Tensor planes_again(const Planed& x, const Planes& planes, int64_t stride, Sizes phases) {
  return fill_all(x.images(), x.channels(), x.planes.height, x.planes.width, stride, phases, planes,
                  [&](int64_t image, int64_t channel, int64_t r, uint8_t*) {
    return static_cast<const uint8_t*>(x.at(image, channel) + r * x.planes.row);
  }).tensor;
}

// Plain pictures of planes: float32, or bytes as they are.
Tensor plain_of_planes(const Planed& x, double scale, bool as_bytes) {
  const int64_t height = x.planes.height, width = x.planes.width;
  const std::array<int64_t, 4> sizes{x.images(), x.channels(), height, width};
  Tensor y = as_bytes ? Tensor::empty(sizes, Type::BYTE) : output(sizes);
  const auto zero = static_cast<int32_t>(x.planes.zero);
  const auto factor = static_cast<float>(scale);
  parallel_for(0, x.images() * x.channels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * height; i < end * height; ++i) {
      const uint8_t* from = x.at(0, i / height) + i % height * x.planes.row;
      if (as_bytes) {
        std::memcpy(static_cast<uint8_t*>(y.data) + i * width, from, width);
        continue;
      }
      float* to = static_cast<float*>(y.data) + i * width;
      for (int64_t k = 0; k < width; ++k) to[k] = static_cast<float>(from[k] - zero) * factor;
    }
  });
  return y;
}

// The mean of every channel: (batch, channels, 1, 1) of float32. `scale` is that of a byte by the number of pixels.
Tensor planes_average(const Planed& x, double scale) {
  const int64_t pixels = product({x.planes.height, x.planes.width});
  check(pixels <= (int64_t(1) << 22), "pictures whose bytes a sum of int32 can hold");
  Tensor y = output({x.images(), x.channels(), 1, 1});
  float* means = y.mutable_data_ptr<float>();
  parallel_for(0, x.images() * x.channels(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int32_t sum = 0;
      for (int64_t r = 0; r < x.planes.height; ++r) {
        const uint8_t* from = x.at(0, i) + r * x.planes.row;
        for (int64_t k = 0; k < x.planes.width; ++k) sum += from[k];
      }
      means[i] = static_cast<float>(sum - static_cast<int32_t>(x.planes.zero * pixels)) * static_cast<float>(scale);
    }
  });
  return y;
}

// Which bytes of a channel are pixels; without it nobody looks between them.
const uint8_t* pixels_of(const std::optional<Tensor>& mask, const Planes& planes) {
  if (!mask) return nullptr;
  check(line(*mask, Type::BYTE) && mask->size(0) == planes.computed(), "a mask of these planes");
  return static_cast<const uint8_t*>(mask->data);
}

INLINE inline bytes within_picture(bytes v, const uint8_t* pixels, int64_t place, bytes zero) {
  if (!pixels) return v;
  const bytes there = load_bytes(pixels + place);
  return (v & there) | (zero & ~there);
}

// The largest byte under a window: `offsets` are those of its taps from a pixel, in the `phases` pictures of a channel.
Tensor planes_max_pool(const Planed& x, const Tensor& offsets, int64_t phases, const Planes& planes, const std::optional<Tensor>& mask) {
  check(line(offsets, Type::INT) && offsets.numel() && 1 <= phases && phases <= 4 && x.channels() % phases == 0 &&
            x.planes.alike(planes), "a window over planes of one size");
  const Reach reach = reach_of(offsets);
  check(-x.planes.margin <= reach.least && reach.most <= phases * x.planes.pitch - planes.computed() + x.planes.margin,
        "a window within its margins");
  const Planed y = output_planes(x.images(), x.channels() / phases, planes);
  const uint8_t* pixels = pixels_of(mask, planes);
  const int32_t* taps = offsets.const_data_ptr<int32_t>();
  const bytes zero = all_of(planes.zero);
  parallel_for(0, y.images() * y.channels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* from = x.at(0, i * phases);
      for (int64_t place = 0; place < planes.computed(); place += VB) {
        bytes found = load_bytes(from + place + taps[0]);
        for (int64_t k = 1; k < offsets.numel(); ++k) found = larger(found, load_bytes(from + place + taps[k]));
        store_bytes(y.at(0, i) + place, within_picture(found, pixels, place, zero));
      }
    }
  });
  return y.tensor;
}

}  // namespace
