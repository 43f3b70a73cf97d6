// Pictures as lanes (nmfx/runtime/kernel/lanes.h): their layout, written a second time, as nmfx's own is Python
// (nmfx/runtime/layout/); and what is drawn for the operators on them.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "cases.h"

namespace {

struct Layout {
  int64_t lanes, h, w, strips, rows, line, left, right, across, pitch, length, before, vectors;

  // Whole rows in a lane, or rows cut where a lane is full.
  Layout(int64_t h, int64_t w, bool whole, int64_t strips, int64_t left, int64_t right)
      : lanes(nmfx_vector_length()), h(h), w(w), strips(strips), rows(whole ? ceil_div(h, lanes) : 1),
        line(w / strips + (strips > 1 ? left + right : std::max(left, right))), left(whole ? left : 0),
        right(whole ? right : 0) {
    across = whole ? w / strips : ceil_div((h - 1) * line + w, lanes);
    pitch = whole ? line : across;
    vectors = length = rows * pitch, before = 0;
  }
  // What a stride of two makes of it in place.
  Layout halved() const {
    Layout y = *this;
    y.h = ceil_div(h, 2), y.w = ceil_div(w, 2), y.left = y.right = y.before = 0;
    y.across = y.pitch = ceil_div(y.w, strips);
    y.rows = rows % 2 ? rows : rows / 2, y.line = rows % 2 ? 2 * y.across : y.across;
    y.vectors = y.length = y.rows * y.across;
    return y;
  }
  void see(int64_t least, int64_t most, int64_t last) {
    const int64_t after = std::max(vectors - before - length, last + most - length + 1);
    before = std::max(before, -least), vectors = before + length + std::max<int64_t>(0, after);
  }
  int64_t begin(int64_t strip) const { return ceil_div(w * strip, strips); }
  // Of which pixels a plain picture is made, for a stride of `step`: those of its rows and columns from these on.
  struct Phase {
    int64_t step, row, column, height, width;
  };
  // The pixel of lane i of vector j, in a plain picture; -1 where there is none.
  int64_t pixel(int64_t strip, int64_t j, int64_t i, const Phase& from) const {
    const int64_t gap = strips > 1 ? left : 0, place = i * length + j + gap, row = floor_div(place, line);
    const int64_t column = place - row * line - gap + begin(strip);
    if (row < 0 || row >= h || column < 0 || column >= w) return -1;
    const int64_t y = row * from.step + from.row, x = column * from.step + from.column;
    return y < from.height && x < from.width ? y * from.width + x : -1;
  }
  bool whole() const { return length == rows * line && strips * across == w; }
  Numbers numbers() const { return {rows, across, pitch, length, before, vectors, strips, left, right}; }
  Array mask() const {
    std::vector<int32_t> held;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t x = 0; x < (whole() ? 1 : across); ++x) {
        for (int64_t i = 0; i < lanes; ++i) held.push_back(pixel(0, row * pitch + x, i, {1, 0, 0, h, w}) < 0 ? 0 : -1);
      }
    }
    return {{rows, whole() ? 1 : across, lanes}, held};
  }
  // Where every float is in a plain picture: of this size, or one picture for each of the four phases of a stride of two.
  Array of_plain(int64_t step, int64_t height, int64_t width) const {
    std::vector<int32_t> index;
    for (int64_t strip = 0; strip < strips; ++strip) {
      for (int64_t phase = 0; phase < step * step; ++phase) {
        const Phase from{step, phase / 2, phase % 2, height, width};
        for (int64_t k = 0; k < vectors * lanes; ++k) {
          index.push_back(static_cast<int32_t>(pixel(strip, k / lanes - before, k % lanes, from)));
        }
      }
    }
    return {{strips, static_cast<int64_t>(index.size()) / strips}, index};
  }
  Array to_plain() const {
    std::vector<int32_t> index;
    for (int64_t at = 0; at < h * w; ++at) {
      int64_t strip = strips - 1;
      while (begin(strip) > at % w) --strip;
      const int64_t place = at / w * line + at % w - begin(strip);
      index.push_back(static_cast<int32_t>(strip * IN_STRIP + (before + place % length) * lanes + place / length));
    }
    return {{1, h * w}, index};
  }
  // Where this halo of a channel is found in the lanes of `x`: strips on, vector, lanes to shift by, and of its mask.
  Array sources(const Layout& x) const {
    std::vector<int32_t> found;
    const int64_t gap = strips > 1 ? left : 0, whole = x.whole();
    for (int64_t item = 0; item < strips * vectors; ++item) {
      const int64_t strip = item / vectors, j = item % vectors - before;
      const int64_t row = whole ? floor_div(j + gap, pitch) : 0, column = whole ? j - row * pitch : j;
      const int64_t size = whole ? x.across : x.length, beside = floor_div(column, size), there = column - beside * size;
      const int64_t lane = whole ? floor_div(row, rows) : beside, of_lane = row - lane * rows;
      const bool inside = whole ? 0 <= strip + beside && strip + beside < strips : there < x.across;
      std::array<int64_t, 4> source{0, 0, NO_PIXEL, 0};
      if (inside && whole) source = {beside, of_lane * x.pitch + there, lane, of_lane * lanes};
      if (inside && !whole) source = {0, there, lane, there * lanes};
      found.insert(found.end(), source.begin(), source.end());
    }
    return {{strips, vectors, 4}, found};
  }
};

// Pictures become lanes, go through one or two operators by lanes, of which the second reads what the first has left in gaps
// and halos, and become plain again, or means.
Case by_lanes(Draw& draw, Code code) {
  Case made;
  Net& net = made.net;
  const int64_t count = code == LANES_AVERAGE ? 1 : draw.of({1, 2}), n = draw.odds(16) ? 0 : draw.of({1, 1, 3});
  const bool whole = draw.odds(2), phases = draw.odds(4), halves = !phases && whole && draw.odds(3);
  const int64_t h = draw.of({1, 4, 7, 9, 16, 20}), wide = draw.of({1, 2, 3}), strips = whole ? wide : 1;
  const int64_t w = strips * (draw.of({5, 6, 7}) + draw.of({0, 0, 8}));
  const auto windows = [&](bool last) {  // whose outputs are as large, or half of that
    const int64_t kh = draw.of({1, 3, 3, 5}), kw = draw.odds(4) ? draw.of({1, 3}) : kh, dh = kh == 3 && draw.odds(5) ? 2 : 1;
    const int64_t step = last && halves ? 2 : 1;
    Window s{kh, kw, step, step, draw.odds(4) ? 0 : (kh - 1) * dh / 2, draw.odds(4) ? (kw - 1) : (kw - 1) / 2, 0, 0, dh, 1};
    return s;
  };
  std::vector<Window> all;
  for (int64_t i = 0; i < count; ++i) all.push_back(windows(i + 1 == count));
  // Gaps and halos that all of them need.
  const auto tap = [&](const Window& s, int64_t t, bool phased) {
    return std::array<int64_t, 2>{phased ? floor_div(s.row(t), 2) : s.row(t), phased ? floor_div(s.column(t), 2) : s.column(t)};
  };
  const auto sides = [&](const Window& s, bool phased) {
    int64_t left = 0, right = 0;
    const Layout bare(h, w, whole, strips, 0, 0), made = s.sw == 2 ? bare.halved() : bare;
    for (int64_t t = 0; t < s.taps(); ++t) {
      const int64_t column = tap(s, t, phased)[1];
      for (int64_t strip = 0; strip < strips; ++strip) {
        left = std::max(left, bare.begin(strip) - s.sw * made.begin(strip) - column);
        right = std::max(right, s.sw * (made.begin(strip + 1) - 1) + 1 - bare.begin(strip + 1) + column);
      }
    }
    return std::array<int64_t, 2>{left, right};
  };
  const auto offsets = [&](const Layout& x, const Window& s, bool phased) {
    Numbers found;
    for (int64_t t = 0; t < s.taps(); ++t) {
      const auto [row, column] = tap(s, t, phased);
      const int64_t phase = phased ? (s.row(t) & 1) * 2 + (s.column(t) & 1) : 0;
      found.push_back(phase * x.vectors + x.before + row * x.line + column);
    }
    return found;
  };
  const auto late = [&](const Layout& x, const Layout& y, const Window& s) {
    Numbers found{strips};
    for (int64_t strip = 0; strip < strips; ++strip) found.push_back(s.sw * y.begin(strip) - x.begin(strip));
    return found;
  };
  const auto seen = [&](Layout& x, const Window& s, bool phased) {
    const Layout y = s.sw == 2 ? x.halved() : x;
    Layout bare = x;
    bare.before = bare.vectors = 0;
    const Numbers shifts = offsets(bare, s, phased), begins = late(x, y, s);
    const int64_t down = s.sh == 2 && x.rows % 2 == 0 ? 2 : 1;
    const int64_t latest = *std::max_element(begins.begin() + 1, begins.end());
    const int64_t last = down * (y.rows - 1) * x.pitch + s.sw * (y.across - 1) + latest;
    const auto [least, most] = std::minmax_element(shifts.begin(), shifts.end());
    x.see(std::min<int64_t>(0, *least), *most, last);
  };
  int64_t left = 0, right = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const auto [a, b] = sides(all[i], phases && i == 0);
    left = std::max(left, a), right = std::max(right, b);
  }
  Layout lanes(h, w, whole, strips, left, right);
  for (size_t i = 0; i < all.size(); ++i) seen(lanes, all[i], phases && i == 0);
  lanes.vectors += draw.below(2);

  const int64_t height = phases ? 2 * h - draw.below(2) : h, width = phases ? 2 * w - draw.below(2) : w, step = phases ? 2 : 1;
  Picture x = draw.picture(n, draw.of({1, 4, 6}), height, width), residual = draw.picture(0, 0, 0, 0);
  const bool pools = code == LANES_CHANNEL && draw.odds(3);
  if (pools) x.v = x.size;
  const int64_t out = code == LANES_CHANNEL ? x.c : x.c * draw.of({1, 2, 5}), added = draw.odds(2);
  if (added) residual = draw.picture(n, out, halves ? ceil_div(h, 2) : h, halves ? ceil_div(w, 2) : w);
  const int64_t given = net.input(draw.array(x)), second = added ? net.input(draw.array(residual)) : -1;
  const int64_t index = net.constant(lanes.of_plain(step, height, width));
  int64_t slot = net.add(REARRANGE, {given, index, 2, lanes.vectors, lanes.lanes, 0});
  Layout read = lanes;
  for (int64_t i = 0; i < count; ++i) {
    const Window& s = all[i];
    const bool last = i + 1 == count, phased = phases && i == 0;
    const Layout y = s.sw == 2 ? read.halved() : lanes;
    const int64_t channels = last ? out : x.c, plane_count = phased ? 4 : 1;
    After after = draw.after(channels);
    if (pools) after.bias.clear(), after.low = std::max(after.low, 0.0);
    if (last && added) after.residual = &residual;
    Numbers arguments = joined({{slot}, read.numbers()});
    const Numbers taps = offsets(read, s, phased);
    const int64_t groups = code == LANES_CHANNEL ? x.c : x.c % 2 ? 1 : draw.of({1, 2}), inner = x.c / groups;
    const Floats weight = code == LANES_CHANNEL ? draw.floats(x.c * s.taps()) : draw.weight(channels, inner * s.taps());
    if (code != LANES_CHANNEL) {
      const int64_t chunk = draw.of({1, 2, 100}) * s.taps(), vectors = 1 + draw.below(8);
      Numbers places;
      for (int64_t k = 0; k < inner * s.taps(); ++k) {
        places.push_back(k / s.taps() * plane_count * read.vectors + taps[k % s.taps()]);
      }
      const Packed packed(weight, channels, groups, chunk, places, inner * plane_count * read.vectors);
      arguments = joined({arguments, packed.in(net), {net.constant(line(packed.starts)), bias_of(net, after), x.c * plane_count,
                          channels, inner * s.taps(), groups, chunk, vectors}});
    } else {
      Layout local(h, w, whole, strips, sides(s, false)[0], sides(s, false)[1]);
      if (!whole) local = read;
      seen(local, s, false);
      const bool makes = !phased && draw.odds(2);  // its halo on the way
      arguments = joined({arguments, {makes}, makes ? local.numbers() : Numbers{}});
      if (makes) arguments = joined({arguments, {net.constant(read.mask()), net.constant(local.sources(read))}});
      if (!makes) arguments = joined({arguments, {-1, -1}});
      const Numbers own = makes ? offsets(local, s, false) : taps;
      const int64_t shifts = net.constant(line(std::vector<int32_t>(own.begin(), own.end())));
      arguments = joined({arguments, {shifts, pools ? -1 : net.constant(line(weight)), bias_of(net, after), plane_count}});
    }
    Numbers residuals{0};
    if (last && added) {
      const int64_t there = net.add(REARRANGE, {second, net.constant(y.of_plain(1, y.h, y.w)), 2, y.vectors, y.lanes, 0});
      residuals = joined({{1, there}, y.numbers()});
    }
    const int64_t masked = !last || (s.sw == 1 && draw.odds(2)) ? net.constant(y.mask()) : -1;
    const int64_t down = s.sh == 2 && read.rows % 2 == 0 ? 2 : 1, over = last && added && draw.odds(2);
    arguments = joined({arguments, {down, s.sw}, late(read, y, s), y.numbers(), residuals,
                        {masked, bits(after.low), bits(after.high), over}});
    slot = net.add(code == LANES_CHANNEL ? LANES_CHANNEL : LANES_CONV, arguments, false, {slot});
    Window whole_step = s;
    if (phased) whole_step.sh = whole_step.sw = 2;
    x = slid(x, whole_step, y.h, y.w, channels, groups, pools ? nullptr : &weight, after, true);
    read = y;
  }
  if (code == LANES_AVERAGE && !halves) {
    net.add(LANES_AVERAGE, joined({{slot}, read.numbers(), {net.constant(read.mask()), read.h * read.w}}), true);
    x = mean(x);
  } else {
    net.add(REARRANGE, {slot, net.constant(read.to_plain()), 2, read.h, read.w, 1}, true);
  }
  made.wanted = x;
  made.roundings = 16;
  return made;
}

}  // namespace
