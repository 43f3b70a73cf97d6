// Products of kept weights with rows of activations, in registers, and how the work is cut.
//
// A kept weight is a number times a row of activations. What lies under a chunk of columns (input channel and kernel position)
// for a tile of pixels stays in the first-level cache; every output row adds its kept weights times those rows in registers: one
// broadcast and `NV` fused multiply-adds a weight, all reads aligned.

#pragma once

#include <cstring>
#include <type_traits>

#include "parallel.h"
#include "tensor.h"
#include "vectors.h"

namespace {

// Kept weights of `rows` output rows, chunk after chunk of `chunk` columns: pointers[c * rows + r] is where those of row r begin.
// A column is (input channel, kernel row, kernel column), as PyTorch flattens them; its number counts from its chunk's start.
struct Weights {
  const float* values;
  const uint16_t* columns;
  const int32_t* pointers;
  int64_t rows, width, chunk;
  int64_t chunks() const { return (width + chunk - 1) / chunk; }
  bool dense() const { return pointers[chunks() * rows] - pointers[0] == rows * width; }
};

// sums[r][tile] (+)= the kept weights of chunk c of row r times their rows of `packed`, which are `pitch` floats apart, their vectors
// `STEP` vectors; after the last chunk, rows go to `leave`.
template <int NV, int STEP = 1, class Pitch, class Leave>
inline void multiply(const Weights& w, const float* packed, Pitch pitch, float* sums, const float* bias, int64_t c,
                     int64_t first, int64_t last, const Leave& leave) {
  constexpr int64_t T = NV * VL;
  const int32_t* at = w.pointers + c * w.rows;
  const bool opens = c == 0, closes = c + 1 == w.chunks();
  for (int64_t r = first; r < last; ++r) {
    vec acc[NV];
    float* own = sums + (r - first) * T;
    if (opens) {
      const vec start = (bias ? bias[r] : 0.0f) - vec{};
      each<NV>([&](auto i) INLINE { acc[i] = start; });
    } else {
      each<NV>([&](auto i) INLINE { acc[i] = load(own + i * VL); });
    }
    const auto add = [&](int32_t j, int64_t column) {
      const vec value = w.values[j] - vec{};
      const float* x = packed + column * pitch;
      each<NV>([&](auto i) INLINE { acc[i] += value * *reinterpret_cast<const tight*>(x + i * STEP * VL); });
    };
    const int32_t end = at[r + 1];
    int32_t j = at[r];
    for (; j + 4 <= end; j += 4) {  // the loads are what limits this loop: four column numbers by one of them
      uint64_t four;
      std::memcpy(&four, w.columns + j, 8);
      add(j, four & 0xFFFF);
      add(j + 1, four >> 16 & 0xFFFF);
      add(j + 2, four >> 32 & 0xFFFF);
      add(j + 3, four >> 48);
    }
    for (; j < end; ++j) add(j, w.columns[j]);
    if (closes) {
      leave(r, acc);
    } else {
      each<NV>([&](auto i) INLINE { store(own + i * VL, acc[i]); });
    }
  }
}

// The same where all weights are kept, as in a stem: several rows share what they read. `place(k)` is where the row of activations
// of the chunk's column k begins.
template <int NV, int R, class Place, class Leave>
inline int64_t multiply_rows(const Weights& w, const Place& place, float* sums, const float* bias, int64_t c, int64_t first,
                             int64_t r, int64_t last, const Leave& leave) {
  constexpr int64_t T = NV * VL;
  const int64_t count = std::min(w.chunk, w.width - c * w.chunk);
  for (; r + R <= last; r += R) {
    const float* values = w.values + w.pointers[c * w.rows + r];
    float* own = sums + (r - first) * T;
    vec acc[R][NV];
    each<R>([&](auto q) INLINE {
      each<NV>([&](auto i) INLINE { acc[q][i] = c ? load(own + q * T + i * VL) : (bias ? bias[r + q] : 0.0f) - vec{}; });
      });
    for (int64_t k = 0; k < count; ++k) {
      vec x[NV];
      each<NV>([&](auto i) INLINE { x[i] = *reinterpret_cast<const tight*>(place(k) + i * VL); });
      each<R>([&](auto q) INLINE {
        const vec value = values[q * count + k] - vec{};
        each<NV>([&](auto i) INLINE { acc[q][i] += value * x[i]; });
      });
    }
    each<R>([&](auto q) INLINE {
      if (c + 1 == w.chunks()) {
        leave(r + q, acc[q]);
      } else {
        each<NV>([&](auto i) INLINE { store(own + q * T + i * VL, acc[q][i]); });
      }
    });
  }
  return r;
}

template <int NV, class Place, class Leave>
inline void multiply_dense(const Weights& w, const Place& place, float* sums, const float* bias, int64_t c, int64_t first,
                           int64_t last, const Leave& leave) {
  constexpr int REGISTERS = VL == 16 ? 24 : 12;  // for sums
  constexpr int R = std::clamp(REGISTERS / NV, 1, 8);
  int64_t r = multiply_rows<NV, R>(w, place, sums, bias, c, first, first, last, leave);
  if constexpr (R > 4) r = multiply_rows<NV, 4>(w, place, sums, bias, c, first, r, last, leave);
  if constexpr (R > 2) r = multiply_rows<NV, 2>(w, place, sums, bias, c, first, r, last, leave);
  multiply_rows<NV, 1>(w, place, sums, bias, c, first, r, last, leave);
}

// Pixels in tiles of up to WIDEST vectors, as even as can be, and rows in parts where there are too few tiles for the threads.
constexpr int64_t WIDEST = 8;

struct Tiling {
  int64_t lanes, vectors, tiles, parts, images;

  Tiling(int64_t lanes, int64_t most, int64_t rows, int64_t images = 1) : lanes(lanes), images(images) {
    vectors = (lanes + VL - 1) / VL;
    tiles = (vectors + most - 1) / most;
    check(tiles < LONGEST, "pictures that can be cut into tiles");
    parts = parts_of(images * tiles, rows);
  }
  static int64_t threads() { return inside ? 1 : allowed; }
  static int64_t parts_of(int64_t tiles, int64_t rows) {
    const int64_t threads = Tiling::threads();
    int64_t parts = 1;
    while (parts < threads && tiles * parts % threads && tiles * parts < 8 * threads && rows >= 32 * parts) parts *= 2;
    return parts;
  }
  int64_t start(int64_t tile) const { return vectors * tile / tiles * VL; }

  // work(image, tile, part begin, part end), each tile's parts in one go where a thread has several.
  template <class Work>
  void run(const Work& work) const {
    parallel_for(0, images * tiles * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end;) {
        const int64_t tile = item / parts, next = std::min(end, (tile + 1) * parts);
        work(tile / tiles, tile % tiles, item % parts, next - tile * parts);
        item = next;
      }
    });
  }
};

// f<NV>() for a number of vectors that is known at run time.
template <class F>
inline void with_vectors(int64_t vectors, const F& f) {
  switch (vectors) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
    case 5: return f(std::integral_constant<int, 5>());
    case 6: return f(std::integral_constant<int, 6>());
    case 7: return f(std::integral_constant<int, 7>());
    default: return f(std::integral_constant<int, 8>());
  }
}

}  // namespace
