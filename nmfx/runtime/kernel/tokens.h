// Linear layers: rows of tokens, transposed into and out of tiles.

#pragma once

#include "products.h"

namespace {

inline void transpose4(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  const quad a = *reinterpret_cast<const quad*>(from), b = *reinterpret_cast<const quad*>(from + from_pitch);
  const quad c = *reinterpret_cast<const quad*>(from + 2 * from_pitch), d = *reinterpret_cast<const quad*>(from + 3 * from_pitch);
  const quad ab0 = SHUFFLE(a, b, 0, 4, 1, 5), ab1 = SHUFFLE(a, b, 2, 6, 3, 7);
  const quad cd0 = SHUFFLE(c, d, 0, 4, 1, 5), cd1 = SHUFFLE(c, d, 2, 6, 3, 7);
  *reinterpret_cast<quad*>(to) = SHUFFLE(ab0, cd0, 0, 1, 4, 5);
  *reinterpret_cast<quad*>(to + to_pitch) = SHUFFLE(ab0, cd0, 2, 3, 6, 7);
  *reinterpret_cast<quad*>(to + 2 * to_pitch) = SHUFFLE(ab1, cd1, 0, 1, 4, 5);
  *reinterpret_cast<quad*>(to + 3 * to_pitch) = SHUFFLE(ab1, cd1, 2, 3, 6, 7);
}

// to[j * to_pitch + i] = from[i * from_pitch + j]
inline void transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) transpose4(from + i * from_pitch + j, from_pitch, to + j * to_pitch + i, to_pitch);
    for (; j < columns; ++j)
      for (int64_t k = 0; k < 4; ++k) to[j * to_pitch + i + k] = from[(i + k) * from_pitch + j];
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) to[j * to_pitch + i] = from[i * from_pitch + j];
}

template <int NV>
void project_tile(const float* x, const Weights& w, const float* bias, Clamp limits, float* y, int64_t start, int64_t length,
                  int64_t first, int64_t last) {
  constexpr int64_t T = NV * VL, BLOCK = 16;
  float* packed = packed_scratch.get(w.chunk * T + SLACK);
  float* sums = sums_scratch.get((last - first) * T);
  alignas(64) float lines[BLOCK * T];  // finished rows, on their way out
  if (length < T) std::memset(packed, 0, w.chunk * T * sizeof(float));
  const auto leave = [&](int64_t r, vec* acc) INLINE {
    const int64_t place = (r - first) % BLOCK;
    each<NV>([&](auto i) INLINE { store(lines + place * T + i * VL, clamp(acc[i], limits)); });
    if (place + 1 == BLOCK || r + 1 == last) transpose(lines, T, place + 1, length, y + start * w.rows + r - place, w.rows);
  };
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const int64_t count = std::min(w.chunk, w.width - c * w.chunk);
    transpose(x + start * w.width + c * w.chunk, w.width, length, count, packed, T);
    multiply<NV>(w, packed, std::integral_constant<int64_t, T>(), sums, bias, c, first, last, leave);
  }
}

void project(const float* x, int64_t tokens, const Weights& w, const float* bias, Clamp limits, float* y, int64_t vectors) {
  const Tiling tiling(tokens, vectors, w.rows);
  tiling.run([&](int64_t, int64_t tile, int64_t begin, int64_t end) {
    const int64_t start = tiling.start(tile), stop = tiling.start(tile + 1);
    const int64_t first = w.rows * begin / tiling.parts, last = w.rows * end / tiling.parts;
    with_vectors((stop - start) / VL, [&](auto nv) {
      project_tile<nv.value>(x, w, bias, limits, y, start, std::min(stop, tiling.lanes) - start, first, last);
    });
  });
}

}  // namespace
