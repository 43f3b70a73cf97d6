// What is drawn for the operators on plain pictures and tokens, and what they should give: plain loops in double.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "programs.h"

namespace {

// Pictures (or tokens of one pixel) with the sum of magnitudes behind every number.
struct Picture {
  int64_t n, c, h, w;
  std::vector<double> v, size;
  Picture(int64_t n, int64_t c, int64_t h, int64_t w) : n(n), c(c), h(h), w(w), v(n * c * h * w), size(v) {}
  int64_t at(int64_t i, int64_t k, int64_t y, int64_t x) const { return ((i * c + k) * h + y) * w + x; }
};
struct Window {
  int64_t kh = 1, kw = 1, sh = 1, sw = 1, top = 0, left = 0, bottom = 0, right = 0, dh = 1, dw = 1;
  int64_t taps() const { return kh * kw; }
  int64_t row(int64_t tap) const { return tap / kw * dh - top; }
  int64_t column(int64_t tap) const { return tap % kw * dw - left; }
};
struct After {
  Floats bias;  // or empty
  const Picture* residual = nullptr;
  double low = -INF, high = INF;
  void finish(Picture& y) const {
    for (size_t i = 0; i < y.v.size(); ++i) {
      if (!bias.empty()) y.v[i] += bias[i / (y.h * y.w) % y.c], y.size[i] += std::abs(bias[i / (y.h * y.w) % y.c]);
      if (residual) y.v[i] += residual->v[i], y.size[i] += residual->size[i];
      y.v[i] = y.v[i] < low ? low : y.v[i] > high ? high : y.v[i];
    }
  }
};

// With a weight (out, channels / groups, kh, kw) the sum under every window; without one the largest, or 0 beyond if `zeros`.
Picture slid(const Picture& x, const Window& s, int64_t oh, int64_t ow, int64_t out, int64_t groups, const Floats* weight,
             const After& after, bool zeros = false) {
  Picture y(x.n, out, oh, ow);
  const int64_t inner = weight ? x.c / groups : 1;
  for (int64_t at = 0; at < static_cast<int64_t>(y.v.size()); ++at) {
    const int64_t column = at % ow, row = at / ow % oh, channel = at / ow / oh % out, image = at / ow / oh / out;
    double sum = weight || zeros ? 0 : -INF, size = 0;
    for (int64_t k = 0; k < inner * s.taps(); ++k) {
      const int64_t from = channel / (out / groups) * (x.c / groups) + k / s.taps(), tap = k % s.taps();
      const int64_t r = row * s.sh + s.row(tap), c = column * s.sw + s.column(tap);
      if (r < 0 || r >= x.h || c < 0 || c >= x.w) continue;
      const double v = x.v[x.at(image, from, r, c)], bound = x.size[x.at(image, from, r, c)];
      const double w = weight ? (*weight)[channel * inner * s.taps() + k] : 1;
      if (weight) sum += w * v, size += std::abs(w) * bound;
      if (!weight) sum = v > sum || std::isnan(v) ? v : sum, size = std::max(size, bound);
    }
    y.v[at] = sum, y.size[at] = size;
  }
  after.finish(y);
  return y;
}

struct Draw {
  std::mt19937_64 random;
  bool whole;  // numbers that are small integers
  Draw(int64_t code, int64_t number) : random(1000003 * code + number), whole(number % 2) {}
  int64_t below(int64_t count) { return static_cast<int64_t>(random() % count); }
  bool odds(int64_t of) { return below(of) == 0; }
  int64_t of(std::initializer_list<int64_t> all) { return all.begin()[below(all.size())]; }
  float value() {
    if (whole) return static_cast<float>(below(7) - 3);
    return static_cast<float>(static_cast<double>(random() >> 11) / (1ll << 52) - 1);
  }
  Floats floats(int64_t count) {
    Floats all(count);
    for (float& one : all) one = value();
    return all;
  }
  Picture picture(int64_t n, int64_t c, int64_t h, int64_t w) {
    Picture made(n, c, h, w);
    for (size_t i = 0; i < made.v.size(); ++i) made.size[i] = std::abs(made.v[i] = value());
    return made;
  }
  // As the kernel is given it: sometimes channels last, which is not the order that it computes in.
  Array array(const Picture& p) {
    Floats all(p.v.begin(), p.v.end());
    if (!odds(4)) return {{p.n, p.c, p.h, p.w}, all};
    for (int64_t i = 0; i < static_cast<int64_t>(all.size()); ++i) {
      all[(i / (p.c * p.h * p.w) * p.h * p.w + i % (p.h * p.w)) * p.c + i / (p.h * p.w) % p.c] = static_cast<float>(p.v[i]);
    }
    return {{p.n, p.c, p.h, p.w}, all, {p.c * p.h * p.w, 1, p.w * p.c, p.c}};
  }
  // n of m columns of each row, or all of them.
  Floats weight(int64_t rows, int64_t width) {
    constexpr int64_t PATTERNS[][2] = {{1, 16}, {2, 16}, {4, 16}, {2, 4}, {3, 7}, {1, 1}};
    const auto [n, m] = PATTERNS[below(6)];
    Floats all(rows * width);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t begin = 0; begin < width; begin += m) {
        for (int64_t i = 0; i < n; ++i) all[row * width + std::min(width - 1, begin + below(m))] = value();
      }
      for (int64_t k = 0; n == m && k < width; ++k) all[row * width + k] = whole ? 1 + below(3) : value();
    }
    return all;
  }
  Window window() {
    constexpr int64_t KERNELS[][2] = {{1, 1}, {1, 1}, {3, 3}, {3, 3}, {1, 3}, {2, 2}, {5, 5}, {7, 1}};
    const auto [kh, kw] = KERNELS[below(8)];
    Window s{kh, kw, of({1, 1, 2, 2, 3}), 0, of({0, 0, 1, 2}), of({0, 0, 1, 3}), 0, 0, of({1, 1, 1, 2}), of({1, 1, 1, 3})};
    s.sw = odds(4) ? of({1, 2, 3}) : s.sh;
    s.bottom = odds(2) ? s.top : of({0, 1, 2}), s.right = odds(2) ? s.left : of({0, 1, 4});
    return s;
  }
  After after(int64_t channels) {
    After made;
    if (odds(2)) made.bias = floats(channels);
    if (odds(2)) made.low = of({0, 0, -2});
    if (odds(3)) made.high = of({2, 6});
    return made;
  }
};

int64_t bias_of(Net& net, const After& after) { return after.bias.empty() ? -1 : net.constant(line(after.bias)); }

// Kept weights by groups, chunks and rows. By lanes a column is where it lies, from where its chunk starts: `places` of all.
struct Packed {
  Floats values;
  std::vector<int16_t> columns;
  std::vector<int32_t> pointers{0}, starts;
  Packed(const Floats& weight, int64_t out, int64_t groups, int64_t chunk, const Numbers& places = {},
         int64_t group_places = 0) {
    const int64_t width = weight.size() / out, rows = out / groups;
    const bool zeros = width % 4 == 1;  // are kept too, so that all columns are
    for (int64_t part = 0; part < groups * ceil_div(width, chunk); ++part) {
      const int64_t group = part / ceil_div(width, chunk), begin = part % ceil_div(width, chunk) * chunk;
      const int64_t end = std::min(width, begin + chunk);
      const int64_t start = places.empty() ? begin : *std::min_element(places.begin() + begin, places.begin() + end);
      starts.push_back(static_cast<int32_t>(group * group_places + start));
      for (int64_t row = group * rows; row < (group + 1) * rows; ++row) {
        for (int64_t k = begin; k < end; ++k) {
          if (weight[row * width + k] == 0 && !zeros) continue;
          values.push_back(weight[row * width + k]);
          columns.push_back(static_cast<int16_t>((places.empty() ? k : places[k]) - start));
        }
        pointers.push_back(static_cast<int32_t>(values.size()));
      }
    }
  }
  Numbers in(Net& net) const { return {net.constant(line(values)), net.constant(line(columns)), net.constant(line(pointers))}; }
};

struct Case {
  Net net;
  Picture wanted{0, 0, 0, 0};
  double roundings = 8;  // of a case that is not of integers
  bool exact = false;    // bit for bit, whatever its numbers
};

const Numbers SAME{2, 1, 1, 2, 1, 1, 2, 0, 0};  // the window of one pixel: a copy

// The residual of a step, as a second input or, to be written over, as a copy of it that the program made.
Numbers residual_in(Draw& draw, Net& net, const Picture* one, bool over_too) {
  if (!one) return {-1, 0};
  const int64_t given = net.input(draw.array(*one));
  if (!over_too || draw.odds(2)) return {given, 0};
  return {net.add(MAX_POOL, joined({{given}, SAME})), 1};
}

Case plain_window(Draw& draw, Code code) {
  Window s = draw.window();
  if (code == MAX_POOL) {
    s.dh = s.dw = 1;
    s.top = s.bottom = draw.below(s.kh / 2 + 1), s.left = s.right = draw.below(s.kw / 2 + 1);
  }
  const int64_t h = std::max(draw.of({1, 2, 5, 7, 8, 12, 17, 30}), (s.kh - 1) * s.dh + 1 - s.top - s.bottom);
  const int64_t w = std::max(draw.of({1, 3, 6, 7, 8, 12, 16, 33, 70}), (s.kw - 1) * s.dw + 1 - s.left - s.right);
  const int64_t oh = (h + s.top + s.bottom - (s.kh - 1) * s.dh - 1) / s.sh + 1;
  const int64_t ow = (w + s.left + s.right - (s.kw - 1) * s.dw - 1) / s.sw + 1;
  const int64_t groups = code == CONV ? draw.of({1, 1, 2, 3}) : draw.of({1, 2, 5});
  const int64_t inner = code == CONV ? draw.of({1, 3, 8, 16}) : 1;
  const int64_t out = groups * (code == CONV ? draw.of({1, 2, 7, 16, 40}) : 1), n = draw.odds(16) ? 0 : draw.of({1, 1, 3});
  const int64_t width = inner * s.taps();
  Case made;
  Net& net = made.net;
  Picture x = draw.picture(n, groups * inner, h, w);
  const Numbers kernel{2, s.kh, s.kw}, stride{2, s.sh, s.sw}, dilation{2, s.dh, s.dw};
  Numbers padding{2, s.top, s.left};
  if (s.top != s.bottom || s.left != s.right || (code != MAX_POOL && draw.odds(3))) {
    padding = {4, s.top, s.left, s.bottom, s.right};
  }
  if (code == MAX_POOL) {
    const bool spoilt = draw.odds(3);
    for (double& v : x.v) v = spoilt && draw.odds(9) ? NAN : v;
    const int64_t given = net.input(draw.array(x));
    net.add(code, joined({{given}, kernel, stride, padding}), true);
    made.wanted = slid(x, s, oh, ow, groups, groups, nullptr, {});
    return made;
  }
  After after = draw.after(out);
  const Picture residual = draw.picture(n, out, oh, ow);
  if (draw.odds(2)) after.residual = &residual;
  const Floats weight = draw.weight(out, width);
  const int64_t given = net.input(draw.array(x)), bias = bias_of(net, after);
  const Numbers added = residual_in(draw, net, after.residual, code == CONV), limits{bits(after.low), bits(after.high)};
  if (code == CONV) {
    const int64_t chunk = draw.of({1, 7, 16, 64, 100, 1000});
    const int64_t y = net.add(code, joined({{given}, Packed(weight, out, groups, chunk).in(net), {bias}, added, {out, width},
                                            kernel, stride, padding, dilation, {groups}, limits, {chunk, 1 + draw.below(8)}}),
                              !added[1]);
    if (added[1]) net.add(MAX_POOL, joined({{y}, SAME}), true);
  } else {
    const int64_t kernels = net.constant({{groups, 1, s.kh, s.kw}, weight});
    net.add(code, joined({{given, kernels, bias}, added, stride, padding, dilation, limits}), true);
  }
  made.wanted = slid(x, s, oh, ow, out, groups, &weight, after);
  return made;
}

Case linear(Draw& draw) {
  const int64_t tokens = draw.odds(16) ? 0 : draw.of({1, 2, 9, 33, 197}), width = draw.of({1, 5, 16, 67, 130});
  const int64_t out = draw.of({1, 3, 16, 50}), chunk = draw.of({1, 7, 64, 1000}), dims = draw.of({1, 2, 3});
  Case made;
  const After after = draw.after(out);
  const Floats weight = draw.weight(out, width);
  const Picture x = draw.picture(dims == 1 ? 1 : tokens, width, 1, 1);
  const Floats all(x.v.begin(), x.v.end());
  const Numbers shape = dims == 1 ? Numbers{width} : dims == 2 ? Numbers{x.n, width} : Numbers{x.n, 1, width};
  const int64_t given = made.net.input({shape, all}), bias = bias_of(made.net, after);
  made.net.add(LINEAR, joined({{given}, Packed(weight, out, 1, chunk).in(made.net),
                               {bias, out, width, bits(after.low), bits(after.high), chunk, 1 + draw.below(8)}}), true);
  made.wanted = slid(x, {}, 1, 1, out, 1, &weight, after);
  return made;
}

Picture mean(const Picture& x) {
  Picture y(x.n, x.c, 1, 1);
  for (size_t i = 0; i < x.v.size(); ++i) {
    y.v[i / (x.h * x.w)] += x.v[i] / (x.h * x.w), y.size[i / (x.h * x.w)] += x.size[i] / (x.h * x.w);
  }
  return y;
}

Case planes(Draw& draw, Code code) {
  Case made;
  const int64_t n = draw.odds(8) ? 0 : draw.of({1, 3}), c = draw.of({1, 4, 9});
  const Picture x = draw.picture(n, c, draw.of({1, 7, 16}), draw.of({1, 5, 33}));
  const int64_t given = made.net.input(draw.array(x)), pixels = x.h * x.w;
  made.wanted = x;
  if (code == REARRANGE) {
    const int64_t several = draw.of({1, 2, 4}), h = draw.of({1, 3}), w = draw.of({1, 8});
    std::vector<int32_t> index(several * h * w);
    for (int32_t& one : index) one = static_cast<int32_t>(draw.below(pixels + 1)) - 1;
    made.net.add(code, {given, made.net.constant({{1, several * h * w}, index}), 2, h, w, 1}, true);
    made.wanted = Picture(x.n, x.c * several, h, w);
    for (size_t i = 0; i < made.wanted.v.size(); ++i) {
      const int32_t from = index[i % index.size()];
      made.wanted.v[i] = from < 0 ? 0 : x.v[i / index.size() * pixels + from];
    }
  } else {
    const int64_t average = code == AVERAGE || draw.odds(2) ? made.net.add(AVERAGE, {given}, true) : given;
    if (average != given) made.wanted = mean(x);
    if (code == FLATTEN) made.net.add(FLATTEN, {average}, draw.odds(2));
  }
  return made;
}

}  // namespace
