// Pictures of bytes as planes (nmfx/runtime/kernel/planes.h, quantized.h): their layout and weights, written a second time, as
// nmfx's own are Python (nmfx/runtime/layout/planes.py, blocks.py); and what is drawn for the operators on them. Products are
// whole numbers and each rounding is said, so that nothing is forgiven.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cases.h"

namespace {

int64_t lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }
uint8_t byte(float v) { return static_cast<uint8_t>(v > 0 ? std::min(255.0f, std::nearbyintf(std::min(v, 1e6f))) : 0); }

struct Bytes {
  int64_t n, c, h, w, zero;
  std::vector<uint8_t> v;
  Bytes(int64_t n, int64_t c, int64_t h, int64_t w, int64_t zero) : n(n), c(c), h(h), w(w), zero(zero), v(n * c * h * w) {}
  int64_t at(int64_t i, int64_t k, int64_t y, int64_t x) const {
    return y < 0 || y >= h || x < 0 || x >= w ? zero : v[((i * c + k) * h + y) * w + x];
  }
};

struct Plane {
  int64_t h, w, row, pitch, margin, zero;
  Numbers numbers() const { return {h, w, row, pitch, margin, zero}; }
  int64_t computed() const { return lines((h - 1) * row + w); }
  Array mask() const {
    std::vector<uint8_t> there(computed());
    for (int64_t y = 0; y < h; ++y) std::fill_n(there.begin() + y * row, w, uint8_t(255));
    return line(there);
  }
};

// A window that keeps the size of a picture, or halves it.
struct Slide {
  int64_t kh, kw, dilation, stride;
  int64_t taps() const { return kh * kw; }
  int64_t down(int64_t tap) const { return (tap / kw - kh / 2) * dilation; }
  int64_t right(int64_t tap) const { return (tap % kw - kw / 2) * dilation; }
  int64_t phase(int64_t tap) const { return stride == 1 ? 0 : 2 * (down(tap) & 1) + (right(tap) & 1); }
  Numbers phases() const {
    Numbers all;
    for (int64_t tap = 0; tap < taps(); ++tap) all.push_back(phase(tap));
    std::sort(all.begin(), all.end());
    all.erase(std::unique(all.begin(), all.end()), all.end());
    return all;
  }
  int64_t shift(int64_t tap, int64_t row) const { return floor_div(down(tap), stride) * row + floor_div(right(tap), stride); }
  int64_t reach(int64_t row) const {
    int64_t most = 0;
    for (int64_t tap = 0; tap < taps(); ++tap) most = std::max(most, std::abs(shift(tap, row)));
    return most;
  }
};

// Kept weights by blocks of rows, those of a group with columns of their own.
struct Blocked {
  std::vector<int8_t> values;
  std::vector<int16_t> columns;
  std::vector<int32_t> blocks, sums;
  Blocked(const std::vector<int8_t>& weight, int64_t out, int64_t groups, int64_t height) {
    const int64_t width = weight.size() / out, rows = out / groups;
    for (int64_t row = 0; row < out; ++row) {
      sums.push_back(0);
      for (int64_t k = 0; k < width; ++k) sums.back() += weight[row * width + k];
    }
    int32_t shared = -1;  // the columns of a weight that has them all
    for (int64_t group = 0; group < groups; ++group) {
      for (int64_t first = group * rows; first < (group + 1) * rows; first += height) {
        const int64_t count = std::min(height, (group + 1) * rows - first);
        Numbers kept;
        for (int64_t k = 0; k < width; ++k) {
          bool any = false;
          for (int64_t row = first; row < first + count; ++row) any = any || weight[row * width + k];
          if (any) kept.push_back(k);
        }
        const bool all = groups == 1 && static_cast<int64_t>(kept.size()) == width;
        const auto quads = static_cast<int32_t>(ceil_div(kept.size(), 4)), start = static_cast<int32_t>(values.size() / 4 / height);
        const int32_t from = all && shared >= 0 ? shared : static_cast<int32_t>(columns.size() / 4);
        if (all && shared < 0) shared = from;
        for (int64_t q = 0; q < quads; ++q) {
          for (int64_t i = 0; i < 4 && from * 4 + q * 4 + i >= static_cast<int64_t>(columns.size()); ++i) {
            const int64_t k = kept[std::min<int64_t>(q * 4 + i, kept.size() - 1)];
            columns.push_back(static_cast<int16_t>(group * width + k));
          }
          for (int64_t row = first; row < first + height; ++row) {
            for (int64_t i = q * 4; i < q * 4 + 4; ++i) {
              values.push_back(row < first + count && i < static_cast<int64_t>(kept.size()) ? weight[row * width + kept[i]] : 0);
            }
          }
        }
        for (const int64_t one : {first, count, int64_t(quads), int64_t(from), int64_t(start)}) blocks.push_back(one);
      }
    }
  }
  Numbers in(Net& net) const {
    return {net.constant(line(values)), net.constant(line(columns)), net.constant({{static_cast<int64_t>(blocks.size()) / 5, 5}, blocks})};
  }
};

std::vector<int8_t> small_weight(Draw& draw, int64_t rows, int64_t width) {
  std::vector<int8_t> all;
  const int64_t most = draw.odds(3) ? 127 : 9;  // the largest sums that there are, at times
  for (const float one : draw.weight(rows, width)) {
    all.push_back(static_cast<int8_t>(one == 0 ? 0 : most == 127 && draw.odds(2) ? 127 : draw.below(2 * most + 1) - most));
  }
  return all;
}

// Scales, shifts and sums of rows, and what comes of a sum.
struct Rows {
  Floats scales, shifts;
  Rows(Draw& draw, int64_t count, float size) : scales(count), shifts(count) {
    for (float& one : scales) one = (1 + static_cast<float>(draw.below(1000))) * size;
    for (float& one : shifts) one = static_cast<float>(draw.below(4000)) / 16 - 30;
  }
  float of(int64_t row, int64_t sum) const {
    return std::fmaf(static_cast<float>(static_cast<int32_t>(sum)), scales[row], shifts[row]);
  }
  Numbers in(Net& net, const Blocked& weight) const {
    return {net.constant(line(scales)), net.constant(line(shifts)), net.constant(line(weight.sums))};
  }
};

Case quantized_linear(Draw& draw) {
  const int64_t tokens = draw.odds(16) ? 0 : draw.of({1, 2, 9, 64, 197}), width = draw.of({1, 5, 16, 67, 130});
  const int64_t out = draw.of({1, 3, 16, 50}), height = draw.of({1, 2, 4}), zero = draw.of({0, 128, 255});
  Case made;
  made.exact = true;
  const After after = draw.after(1);
  const auto weight = small_weight(draw, out, width);
  const Blocked blocked(weight, out, 1, height);
  const Rows rows(draw, out, 1e-5f);
  Picture x = draw.picture(tokens, width, 1, 1);
  if (draw.odds(3)) for (double& v : x.v) v = draw.odds(9) ? NAN : v * 100;
  const Floats all(x.v.begin(), x.v.end());
  const int64_t given = made.net.input({{tokens, width}, all});
  made.net.add(QUANTIZED_LINEAR, joined({{given}, blocked.in(made.net), rows.in(made.net, blocked), {out, width, height, bits(31.5), zero},
                                         {bits(after.low), bits(after.high)}}), true);
  made.wanted = Picture(tokens, out, 1, 1);
  for (int64_t i = 0; i < tokens * out; ++i) {
    int64_t sum = 0;
    for (int64_t k = 0; k < width; ++k) {
      sum += weight[i % out * width + k] * byte(std::fmaf(all[i / out * width + k], 31.5f, static_cast<float>(zero)));
    }
    const double v = rows.of(i % out, sum);
    made.wanted.v[i] = v < after.low ? after.low : v > after.high ? after.high : v;
  }
  return made;
}

// One or two windows over quantised pictures, then means, floats, or floats by way of plain bytes.
Case by_planes(Draw& draw, Code code) {
  constexpr int64_t KERNELS[][3] = {{1, 1, 1}, {1, 1, 1}, {3, 3, 1}, {3, 3, 2}, {5, 5, 1}, {1, 3, 1}, {3, 1, 1}};
  Case made;
  made.exact = true;
  Net& net = made.net;
  const int64_t n = draw.odds(16) ? 0 : draw.of({1, 1, 3}), c = draw.of({1, 3, 4, 8}), gap = draw.of({4, 5});
  const int64_t h = draw.of({1, 2, 5, 8, 13}), w = draw.of({1, 3, 8, 17, 70});
  const Picture x = draw.picture(n, c, h, w);
  const int64_t given = net.input(draw.array(x));
  std::vector<Slide> slides;
  for (int64_t i = draw.below(3); i > (code == PLANES_AGAIN ? -1 : 0); --i) {
    const auto [kh, kw, dilation] = KERNELS[draw.below(7)];
    slides.push_back({kh, kw, dilation, 1 + draw.odds(code == PLANES_AGAIN ? 1 : 3)});
  }
  const auto plane = [&](const Bytes& one, const Slide* next) {  // with what a window sees of it
    const int64_t row = one.w + gap, reach = next && next->stride == 1 ? next->reach(row) : 0;
    return Plane{one.h, one.w, row, lines((one.h - 1) * row + one.w + reach) + 64 * draw.below(2), lines(reach) + 64 * draw.below(2), one.zero};
  };
  Bytes bytes(n, c, h, w, draw.of({0, 128, 255}));
  for (size_t i = 0; i < x.v.size(); ++i) {
    bytes.v[i] = byte(std::fmaf(static_cast<float>(x.v[i]), 77.25f, static_cast<float>(bytes.zero)));
  }
  const auto in_phases = [&](const Bytes& one, const Slide& s) {
    const int64_t row = ceil_div(one.w, 2) + gap, hh = ceil_div(one.h, 2), ww = ceil_div(one.w, 2), reach = s.reach(row);
    return Plane{hh, ww, row, lines((hh - 1) * row + ww + reach), lines(reach), one.zero};
  };
  const bool first_phased = !slides.empty() && slides[0].stride == 2 && draw.odds(2);
  Plane read = first_phased ? in_phases(bytes, slides[0]) : plane(bytes, slides.empty() ? nullptr : &slides[0]);
  struct Step {
    bool pools;
    int64_t groups, out, zero;
    Floats others;  // that are added
    int64_t second;
  };
  std::vector<Step> steps;
  int64_t channels = c, height = h, width = w;
  for (const Slide& s : slides) {  // inputs come before the first step
    const bool pools = code == PLANES_MAX_POOL || draw.odds(4);
    const int64_t groups = draw.of({1, 1, channels % 2 ? 1 : 2, channels});
    Step one{pools, groups, pools ? channels : groups * draw.of({1, 2, 7}), draw.of({0, 77, 255}), {}, -1};
    channels = one.out, height = ceil_div(height, s.stride), width = ceil_div(width, s.stride);
    if (!pools && draw.odds(2)) {
      one.others = draw.floats(n * channels * height * width);
      one.second = net.input({{n, channels, height, width}, one.others});
    }
    steps.push_back(one);
  }
  const auto listed = [](const Numbers& all) { return joined({{static_cast<int64_t>(all.size())}, all}); };
  int64_t slot = net.add(PLANES_OF, joined({{given, bits(77.25)}, read.numbers(), {first_phased ? 2 : 1},
                                            listed(first_phased ? slides[0].phases() : Numbers{0})}));
  for (size_t i = 0; i < slides.size(); ++i) {
    const Slide& s = slides[i];
    if (s.stride == 2 && !(i == 0 && first_phased)) {
      const Plane split = in_phases(bytes, s);
      slot = net.add(PLANES_AGAIN, joined({{slot}, read.numbers(), split.numbers(), {2}, listed(s.phases())}), false, {slot});
      read = split;
    }
    const Numbers phases = s.phases();
    const auto& [pools, groups, out, zero, others, second] = steps[i];
    const bool added = second >= 0;
    const int64_t oh = ceil_div(bytes.h, s.stride), ow = ceil_div(bytes.w, s.stride), count = phases.size();
    const int64_t inner = bytes.c / groups, width = inner * s.taps();
    Bytes y(n, out, oh, ow, pools ? bytes.zero : zero);
    const Slide* next = i + 1 < slides.size() ? &slides[i + 1] : nullptr;
    const Plane made_as = plane(y, next);
    std::vector<int32_t> offsets;
    for (int64_t k = 0; k < (pools ? 1 : bytes.c) * s.taps(); ++k) {
      const int64_t phase = std::find(phases.begin(), phases.end(), s.phase(k % s.taps())) - phases.begin();
      offsets.push_back(static_cast<int32_t>((k / s.taps() * count + phase) * read.pitch + s.shift(k % s.taps(), read.row)));
    }
    const int64_t taps = net.constant(line(offsets)), mask = next || draw.odds(2) ? net.constant(made_as.mask()) : -1;
    if (pools) {
      for (size_t at = 0; at < y.v.size(); ++at) {
        int64_t most = 0;
        for (int64_t tap = 0; tap < s.taps(); ++tap) {
          most = std::max(most, bytes.at(at / (out * oh * ow), at / (oh * ow) % out, at / ow % oh * s.stride + s.down(tap),
                                         at % ow * s.stride + s.right(tap)));
        }
        y.v[at] = static_cast<uint8_t>(most);
      }
      slot = net.add(PLANES_MAX_POOL, joined({{slot}, read.numbers(), {taps, count}, made_as.numbers(), {mask}}), false, {slot});
    } else {
      const int64_t height = draw.of({1, 2, 4}), low = draw.of({0, 0, 100}), high = draw.of({255, 200});
      const auto weight = small_weight(draw, out, width);
      const Blocked blocked(weight, out, groups, height);
      const Rows rows(draw, out, 1e-5f);
      Numbers residual{0};
      if (added) {
        const Plane there{oh, ow, made_as.row, made_as.computed() + 64 * draw.below(2), 64 * draw.below(2), 9};
        const int64_t made_there = net.add(PLANES_OF, joined({{second, bits(55.5)}, there.numbers(), {1, 1, 0}}));
        residual = joined({{1, made_there}, there.numbers(), {bits(0.375)}});
      }
      for (size_t at = 0; at < y.v.size(); ++at) {
        const int64_t channel = at / (oh * ow) % out;
        int64_t sum = 0;
        for (int64_t k = 0; k < width; ++k) {
          sum += weight[channel * width + k] *
                 bytes.at(at / (out * oh * ow), channel / (out / groups) * inner + k / s.taps(),
                          at / ow % oh * s.stride + s.down(k % s.taps()), at % ow * s.stride + s.right(k % s.taps()));
        }
        float v = rows.of(channel, sum);
        if (added) v = std::fmaf(static_cast<float>(byte(std::fmaf(others[at], 55.5f, 9.0f))), 0.375f, v);
        y.v[at] = static_cast<uint8_t>(std::clamp<int64_t>(byte(v), low, high));
      }
      const Numbers kept = blocked.in(net);
      slot = net.add(PLANES_CONV, joined({{slot}, read.numbers(), kept, {taps}, rows.in(net, blocked), {out, height},
                                          made_as.numbers(), {mask, low, high}, residual}), false, {slot});
    }
    bytes = y, read = made_as;
  }
  made.wanted = Picture(n, bytes.c, bytes.h, bytes.w);
  if (code == PLANES_AVERAGE) {
    net.add(PLANES_AVERAGE, joined({{slot}, read.numbers(), {bits(0.3125)}}), true);
    made.wanted = Picture(n, bytes.c, 1, 1);
    for (int64_t i = 0; i < n * bytes.c; ++i) {
      int64_t sum = 0;
      for (int64_t k = 0; k < bytes.h * bytes.w; ++k) sum += bytes.v[i * bytes.h * bytes.w + k] - bytes.zero;
      made.wanted.v[i] = static_cast<float>(sum) * 0.3125f;
    }
    return made;
  }
  if (draw.odds(3)) {
    slot = net.add(PLAIN_OF_PLANES, joined({{slot}, read.numbers(), {bits(1.0), 1}}), false, {slot});
    read = {bytes.h, bytes.w, bytes.w, lines(bytes.h * bytes.w), 0, bytes.zero};
    slot = net.add(PLANES_OF, joined({{slot, bits(1.0)}, read.numbers(), {1, 1, 0}}), false, {slot});
  }
  net.add(PLAIN_OF_PLANES, joined({{slot}, read.numbers(), {bits(0.3125), 0}}), true);
  for (size_t i = 0; i < bytes.v.size(); ++i) made.wanted.v[i] = static_cast<float>(bytes.v[i] - bytes.zero) * 0.3125f;
  return made;
}

}  // namespace
