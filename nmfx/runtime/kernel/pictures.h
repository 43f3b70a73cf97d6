// Convolutions of pictures as PyTorch has them, so that sparse and dense operators stand side by side.
//
// The activations under a chunk of columns are packed into rows of one length. That costs one copy for every column of a tile and
// pays for padding, stride and dilation; kernels of one pixel read aligned tiles where they are.

#pragma once

#include <vector>

#include "products.h"

namespace {

struct Shape {
  int64_t n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw;  // ph and pw: above and to the left
  int64_t right;                                               // padding there
};

struct Pictures {
  const float* x;
  int64_t channels, channel0;  // of x: all, and the first of this group
  const float* residual;
  float* y;
  int64_t y_channels, y_channel0;
};

// A run of output pixels: where they are in a tile's lanes, and in the output's first plane of the image.
struct Run {
  int64_t image, lane, pixel, length;
};

// n finished pixels on their way out, in vectors that overlap at the end. The last one is read before any is written, as the
// residual may be where the output goes.
inline void emit(float* y, const float* line, const float* residual, int64_t n, const Clamp& limits) {
  const auto wide = [&](int64_t i) {
    vec v = load(line + i);
    if (residual) v += load(residual + i);
    return clamp(v, limits);
  };
  const auto four = [&](int64_t i) {
    quad v = *reinterpret_cast<const quad*>(line + i);
    if (residual) v += *reinterpret_cast<const quad*>(residual + i);
    const quad low = limits.low - quad{}, high = limits.high - quad{};
    v = v < low ? low : v;
    return v > high ? high : v;
  };
  if (n >= VL) {
    const vec last = wide(n - VL);
    for (int64_t i = 0; i + VL < n; i += VL) store(y + i, wide(i));
    store(y + n - VL, last);
  } else if (n >= 4) {
    const quad last = four(n - 4);
    for (int64_t i = 0; i + 4 < n; i += 4) *reinterpret_cast<quad*>(y + i) = four(i);
    *reinterpret_cast<quad*>(y + n - 4) = last;
  } else {
    for (int64_t i = 0; i < n; ++i) {
      float v = line[i] + (residual ? residual[i] : 0.0f);
      v = v < limits.low ? limits.low : v;
      y[i] = v > limits.high ? limits.high : v;
    }
  }
}

// The kept weights of rows [first, last) over one tile of lanes; `fill(chunk)` packs what lies under a chunk's columns.
// Without a `pitch` of its own they are packed as the tile is wide.
template <int NV, class Fill>
inline void compute(const Pictures& io, const Weights& w, const float* bias, const Clamp& limits, int64_t plane,
                    const std::vector<Run>& runs, int64_t first, int64_t last, int64_t pitch, const Fill& fill) {
  constexpr int64_t T = NV * VL;
  float* sums = sums_scratch.get((last - first) * T);
  const bool whole = runs.size() == 1 && runs[0].length == T;
  const auto leave = [&](int64_t r, vec* acc) INLINE {
    if (whole) {
      const int64_t place = (runs[0].image * io.y_channels + io.y_channel0 + r) * plane + runs[0].pixel;
      each<NV>([&](auto i) INLINE {
        if (io.residual) acc[i] += load(io.residual + place + i * VL);
        store(io.y + place + i * VL, clamp(acc[i], limits));
      });
      return;
    }
    alignas(64) float line[T];
    each<NV>([&](auto i) INLINE { store(line + i * VL, acc[i]); });
    for (const Run& run : runs) {
      const int64_t place = (run.image * io.y_channels + io.y_channel0 + r) * plane + run.pixel;
      emit(io.y + place, line + run.lane, io.residual ? io.residual + place : nullptr, run.length, limits);
    }
  };
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const float* packed = fill(c * w.chunk, std::min(w.chunk, w.width - c * w.chunk));
    if (pitch) {
      multiply<NV>(w, packed, pitch, sums, bias, c, first, last, leave);
    } else if (w.dense()) {
      multiply_dense<NV>(w, [&](int64_t k) { return packed + k * T; }, sums, bias, c, first, last, leave);
    } else {
      multiply<NV>(w, packed, std::integral_constant<int64_t, T>(), sums, bias, c, first, last, leave);
    }
  }
}

// Kernels of one pixel: lanes are output pixels, over the borders of rows and images.
template <int NV>
void pointwise_tile(const Shape& s, const Pictures& io, const Weights& w, const float* bias, Clamp limits, int64_t start,
                    int64_t length, int64_t first, int64_t last) {
  constexpr int64_t T = NV * VL;
  const int64_t plane = s.oh * s.ow;
  const bool rows = s.sh > 1 || s.sw > 1;  // else a plane is one long row
  static thread_local std::vector<Run> outputs, inputs;  // inputs: pixel is where the run begins in the input's plane
  outputs.clear();
  inputs.clear();
  for (int64_t at = 0; at < length;) {
    const int64_t image = (start + at) / plane, pixel = (start + at) % plane, row = pixel / s.ow;
    const int64_t count = std::min(rows ? s.ow - pixel % s.ow : plane - pixel, length - at);
    if (!outputs.empty() && outputs.back().image == image) {
      outputs.back().length += count;
    } else {
      outputs.push_back({image, at, pixel, count});
    }
    inputs.push_back({image, at, rows ? row * s.sh * s.w + pixel % s.ow * s.sw : pixel, count});
    at += count;
  }
  if (inputs.size() == 1 && length == T && !rows && plane % VL == 0 && !w.dense()) {
    const float* from = io.x + (inputs[0].image * io.channels + io.channel0) * plane + inputs[0].pixel;
    if (reinterpret_cast<uintptr_t>(from) % (VL * 4) == 0) {  // as good as packed, and nothing to do
      return compute<NV>(io, w, bias, limits, plane, outputs, first, last, plane,
                         [&](int64_t column, int64_t) { return from + column * plane; });
    }
  }
  float* packed = packed_scratch.get(w.chunk * T + SLACK);
  compute<NV>(io, w, bias, limits, plane, outputs, first, last, 0, [&](int64_t column, int64_t count) {
    for (int64_t k = 0; k < count; ++k) {
      for (const Run& run : inputs) {
        const float* from = io.x + (run.image * io.channels + io.channel0 + column + k) * s.h * s.w + run.pixel;
        float* to = packed + k * T + run.lane;
        if (s.sw == 1) {
          copy_exact(to, from, run.length);
        } else if (s.sw == 2) {
          split(from, 2 * run.length - 1, to, nullptr);
        } else {
          for (int64_t i = 0; i < run.length; ++i) to[i] = from[i * s.sw];
        }
      }
    }
    return packed;
  });
}

// One channel's rows under a tile, padded, and split by the phases of both strides: then the pixels of a tile that lie under any
// one weight are contiguous, over the ends of rows too, where lanes compute what nobody reads.
struct Halo {
  int64_t pitch, rows, size;  // floats between rows, rows of a phase, floats of a phase
  int64_t shown;              // the first output row of the tile

  static int64_t pitch_of(const Shape& s) {
    if (s.sw == 1) return std::max(s.w + std::max(s.pw, s.right), s.ow);  // the right padding is the next row's left
    return (s.w + s.pw + s.right + s.sw - 1) / s.sw;
  }
  Halo(const Shape& s, int64_t start, int64_t length) : pitch(pitch_of(s)), shown(start / pitch) {
    rows = (start + length - 1) / pitch - shown + 1 + (s.kh - 1) * s.dh / s.sh;
    size = rows * pitch + SLACK + std::min(s.pw, s.right);  // lanes at the end look beyond, as the last row's right padding lies
  }
  int64_t floats(const Shape& s) const { return size * s.sh * s.sw + SLACK; }

  int64_t offset(const Shape& s, int64_t row, int64_t column) const {
    const int64_t y = row * s.dh, x = column * s.dw;
    return (y % s.sh * s.sw + x % s.sw) * size + y / s.sh * pitch + x / s.sw;
  }

  void fill(const Shape& s, const float* plane, float* to) const {
    for (int64_t i = 0; i < rows * s.sh; ++i) {
      const int64_t row = shown * s.sh + i - s.ph;
      if (row < 0 || row >= s.h) continue;  // stays zero
      float* line = to + (i % s.sh * s.sw) * size + i / s.sh * pitch;
      spread(plane + row * s.w, s.w, s.sw, s.pw, line, size);
    }
  }
};

// Larger kernels: lanes are the output pixels of one image, each row as long as the halo's pitch.
template <int NV>
void window_tile(const Shape& s, const Pictures& io, const Weights& w, const float* bias, Clamp limits, int64_t image,
                 int64_t start, int64_t length, int64_t first, int64_t last) {
  constexpr int64_t T = NV * VL;
  const Halo halo(s, start, length);
  static thread_local std::vector<Run> runs;
  static thread_local std::vector<int64_t> offsets;
  runs.clear();
  for (int64_t row = halo.shown; row * halo.pitch < start + length && row < s.oh; ++row) {
    const int64_t begin = std::max(row * halo.pitch, start), end = std::min(row * halo.pitch + s.ow, start + length);
    if (begin < end) runs.push_back({image, begin - start, row * s.ow + begin - row * halo.pitch, end - begin});
  }
  const int64_t taps = s.kh * s.kw, shift = start - halo.shown * halo.pitch;
  offsets.resize(taps);
  for (int64_t tap = 0; tap < taps; ++tap) offsets[tap] = halo.offset(s, tap / s.kw, tap % s.kw) + shift;
  const int64_t room = halo.floats(s);
  float* planes[2] = {plane_scratch.get(2 * room), nullptr};  // one channel is filled while the other is read
  planes[1] = planes[0] + room;
  std::memset(planes[0], 0, 2 * room * sizeof(float));
  float* packed = packed_scratch.get(w.chunk * T + SLACK);
  const float* picture = io.x + (image * io.channels + io.channel0) * s.h * s.w;
  compute<NV>(io, w, bias, limits, s.oh * s.ow, runs, first, last, 0, [&](int64_t column, int64_t count) {
    int64_t channel = column / taps, tap = column % taps;
    const int64_t stop = (column + count - 1) / taps;
    halo.fill(s, picture + channel * s.h * s.w, planes[channel & 1]);
    for (int64_t k = 0; k < count; ++channel, tap = 0) {
      if (channel < stop) halo.fill(s, picture + (channel + 1) * s.h * s.w, planes[(channel + 1) & 1]);
      for (; tap < taps && k < count; ++tap, ++k) {
        const float* from = planes[channel & 1] + offsets[tap];
        each<NV>([&](auto i) INLINE { store(packed + k * T + i * VL, load(from + i * VL)); });
      }
    }
    return packed;
  });
}

void convolve(const Shape& s, const Pictures& io, const Weights& w, const float* bias, Clamp limits, int64_t vectors) {
  const bool pointwise = s.kh * s.kw == 1 && s.oh == (s.h - 1) / s.sh + 1 && s.ow == (s.w - 1) / s.sw + 1 && !s.ph && !s.pw;
  const int64_t lanes = pointwise ? s.n * s.oh * s.ow : (s.oh - 1) * Halo::pitch_of(s) + s.ow;
  const Tiling tiling(lanes, vectors, w.rows, pointwise ? 1 : s.n);
  tiling.run([&](int64_t image, int64_t tile, int64_t begin, int64_t end) {
    const int64_t start = tiling.start(tile), stop = tiling.start(tile + 1), length = std::min(stop, lanes) - start;
    const int64_t first = w.rows * begin / tiling.parts, last = w.rows * end / tiling.parts;
    with_vectors((stop - start) / VL, [&](auto nv) {
      if (pointwise) return pointwise_tile<nv.value>(s, io, w, bias, limits, start, length, first, last);
      window_tile<nv.value>(s, io, w, bias, limits, image, start, length, first, last);
    });
  });
}

}  // namespace
