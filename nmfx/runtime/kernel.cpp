// Products of sparse weights with pictures and tokens, for any CPU that g++ or clang++ can vectorise for.
//
// A kept weight is a number times a row of activations. For a tile of pixels the activations under a chunk of columns (input
// channel and kernel position) are packed into rows of one length that stay in the first-level cache; every output row then adds
// its kept weights times those rows in registers: one broadcast and `NV` fused multiply-adds a weight, all reads aligned.
// Packing costs one copy for every column of a tile and pays for padding, stride and dilation; kernels of one pixel read aligned
// tiles where they are. Activations stay as PyTorch has them, so that sparse and dense operators stand side by side.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/flatten.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/narrow.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t VL = 16;
#elif defined(__AVX__)
constexpr int64_t VL = 8;
#else
constexpr int64_t VL = 4;
#endif
typedef float vec __attribute__((vector_size(VL * 4)));
typedef float loose __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef float tight __attribute__((vector_size(VL * 4), may_alias));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
static_assert(std::endian::native == std::endian::little, "column numbers are read four at a time");
constexpr int64_t SLACK = 64;  // floats that whole-vector copies may write past the end

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }

// n floats and nothing else, in vectors that overlap at the end.
inline void copy_exact(float* to, const float* from, int64_t n) {
  if (n >= VL) {
    int64_t i = 0;
    for (; i + VL <= n; i += VL) store(to + i, load(from + i));
    if (i < n) store(to + n - VL, load(from + n - VL));
  } else if (n >= 4) {
    for (int64_t i = 0; i + 4 <= n; i += 4) *reinterpret_cast<quad*>(to + i) = *reinterpret_cast<const quad*>(from + i);
    *reinterpret_cast<quad*>(to + n - 4) = *reinterpret_cast<const quad*>(from + n - 4);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// even[i] = from[2 i] and odd[i] = from[2 i + 1], of n floats; no odd ones for a null pointer.
inline void split(const float* from, int64_t n, float* even, float* odd) {
  typedef int places __attribute__((vector_size(VL * 4)));
  places evens, odds;
  for (int i = 0; i < VL; ++i) evens[i] = 2 * i, odds[i] = 2 * i + 1;
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    const vec a = load(from + i), b = load(from + i + VL);
    store(even + i / 2, __builtin_shuffle(a, b, evens));
    if (odd) store(odd + i / 2, __builtin_shuffle(a, b, odds));
  }
  for (; i < n; i += 2) {
    even[i / 2] = from[i];
    if (odd && i + 1 < n) odd[i / 2] = from[i + 1];
  }
}

// A row with `pad` zeros before it: the columns of one phase of the stride after the other, `size` floats apart.
inline void spread(const float* from, int64_t n, int64_t stride, int64_t pad, float* to, int64_t size) {
  if (stride == 1) {
    copy_exact(to + pad, from, n);
  } else if (stride == 2) {
    split(from, n, to + (pad & 1) * size + pad / 2, to + (1 - (pad & 1)) * size + (pad + 1) / 2);
  } else {
    for (int64_t i = 0; i < n; ++i) to[(i + pad) % stride * size + (i + pad) / stride] = from[i];
  }
}

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

struct Clamp {
  float low, high;
};

inline vec clamp(vec v, const Clamp& limits) {
  const vec low = limits.low - vec{}, high = limits.high - vec{};
  v = v < low ? low : v;
  return v > high ? high : v;
}

// Aligned memory of one thread, kept between calls.
struct Room {
  std::vector<float> memory;
  float* get(int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count + 16) memory.resize(count + 16);
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<float*>((address + 63) & ~uintptr_t(63));
  }
};
thread_local Room packed_room, sums_room, plane_room;

// sums[r][tile] (+)= the kept weights of chunk c of row r times their rows of `packed`, which are `pitch` floats apart; after the
// last chunk, rows go to `leave`.
template <int NV, class Pitch, class Leave>
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
      for (int i = 0; i < NV; ++i) acc[i] = start;
    } else {
      for (int i = 0; i < NV; ++i) acc[i] = load(own + i * VL);
    }
    const auto add = [&](int32_t j, int64_t column) {
      const vec value = w.values[j] - vec{};
      const float* x = packed + column * pitch;
      for (int i = 0; i < NV; ++i) acc[i] += value * *reinterpret_cast<const tight*>(x + i * VL);
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
      for (int i = 0; i < NV; ++i) store(own + i * VL, acc[i]);
    }
  }
}

// The same where all weights are kept, as in a stem: several rows share what they read.
template <int NV, int R, class Leave>
inline int64_t multiply_rows(const Weights& w, const float* packed, float* sums, const float* bias, int64_t c, int64_t first,
                             int64_t r, int64_t last, const Leave& leave) {
  constexpr int64_t T = NV * VL;
  const int64_t count = std::min(w.chunk, w.width - c * w.chunk);
  for (; r + R <= last; r += R) {
    const float* values = w.values + w.pointers[c * w.rows + r];
    float* own = sums + (r - first) * T;
    vec acc[R][NV];
    for (int q = 0; q < R; ++q)
      for (int i = 0; i < NV; ++i) acc[q][i] = c ? load(own + q * T + i * VL) : (bias ? bias[r + q] : 0.0f) - vec{};
    for (int64_t k = 0; k < count; ++k) {
      vec x[NV];
      for (int i = 0; i < NV; ++i) x[i] = *reinterpret_cast<const tight*>(packed + k * T + i * VL);
      for (int q = 0; q < R; ++q) {
        const vec value = values[q * count + k] - vec{};
        for (int i = 0; i < NV; ++i) acc[q][i] += value * x[i];
      }
    }
    for (int q = 0; q < R; ++q) {
      if (c + 1 == w.chunks()) {
        leave(r + q, acc[q]);
      } else {
        for (int i = 0; i < NV; ++i) store(own + q * T + i * VL, acc[q][i]);
      }
    }
  }
  return r;
}

template <int NV, class Leave>
inline void multiply_dense(const Weights& w, const float* packed, float* sums, const float* bias, int64_t c, int64_t first,
                           int64_t last, const Leave& leave) {
  constexpr int REGISTERS = VL == 16 ? 24 : 12;  // for sums
  constexpr int R = std::clamp(REGISTERS / NV, 1, 8);
  const int64_t r = multiply_rows<NV, R>(w, packed, sums, bias, c, first, first, last, leave);
  multiply_rows<NV, 1>(w, packed, sums, bias, c, first, r, last, leave);
}

// Pixels in tiles of up to WIDEST vectors, as even as can be, and rows in parts where there are too few tiles for the threads.
constexpr int64_t WIDEST = 8;

struct Tiling {
  int64_t lanes, vectors, tiles, parts, images;

  Tiling(int64_t lanes, int64_t most, int64_t rows, int64_t images = 1) : lanes(lanes), images(images) {
    const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    vectors = (lanes + VL - 1) / VL;
    tiles = (vectors + most - 1) / most;
    parts = 1;
    const auto items = [&] { return images * tiles * parts; };
    while (parts < threads && items() % threads && items() < 8 * threads && rows >= 32 * parts) parts *= 2;
  }
  int64_t start(int64_t tile) const { return vectors * tile / tiles * VL; }

  // work(image, tile, part begin, part end), each tile's parts in one go where a thread has several.
  template <class Work>
  void run(const Work& work) const {
    at::parallel_for(0, images * tiles * parts, 1, [&](int64_t begin, int64_t end) {
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

// --- convolutions

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
  float* sums = sums_room.get((last - first) * T);
  const bool whole = runs.size() == 1 && runs[0].length == T;
  const auto leave = [&](int64_t r, vec* acc) {
    if (whole) {
      const int64_t place = (runs[0].image * io.y_channels + io.y_channel0 + r) * plane + runs[0].pixel;
      for (int i = 0; i < NV; ++i) {
        if (io.residual) acc[i] += load(io.residual + place + i * VL);
        store(io.y + place + i * VL, clamp(acc[i], limits));
      }
      return;
    }
    alignas(64) float line[T];
    for (int i = 0; i < NV; ++i) store(line + i * VL, acc[i]);
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
      multiply_dense<NV>(w, packed, sums, bias, c, first, last, leave);
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
  float* packed = packed_room.get(w.chunk * T + SLACK);
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
  float* planes[2] = {plane_room.get(2 * room), nullptr};  // one channel is filled while the other is read
  planes[1] = planes[0] + room;
  std::memset(planes[0], 0, 2 * room * sizeof(float));
  float* packed = packed_room.get(w.chunk * T + SLACK);
  const float* picture = io.x + (image * io.channels + io.channel0) * s.h * s.w;
  compute<NV>(io, w, bias, limits, s.oh * s.ow, runs, first, last, 0, [&](int64_t column, int64_t count) {
    int64_t channel = column / taps, tap = column % taps;
    const int64_t stop = (column + count - 1) / taps;
    halo.fill(s, picture + channel * s.h * s.w, planes[channel & 1]);
    for (int64_t k = 0; k < count; ++channel, tap = 0) {
      if (channel < stop) halo.fill(s, picture + (channel + 1) * s.h * s.w, planes[(channel + 1) & 1]);
      for (; tap < taps && k < count; ++tap, ++k) {
        const float* from = planes[channel & 1] + offsets[tap];
        for (int i = 0; i < NV; ++i) store(packed + k * T + i * VL, load(from + i * VL));
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

// --- linear layers: rows of tokens, transposed into and out of tiles

inline void transpose4(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  typedef int mask __attribute__((vector_size(16)));
  const quad a = *reinterpret_cast<const quad*>(from), b = *reinterpret_cast<const quad*>(from + from_pitch);
  const quad c = *reinterpret_cast<const quad*>(from + 2 * from_pitch), d = *reinterpret_cast<const quad*>(from + 3 * from_pitch);
  const quad ab0 = __builtin_shuffle(a, b, mask{0, 4, 1, 5}), ab1 = __builtin_shuffle(a, b, mask{2, 6, 3, 7});
  const quad cd0 = __builtin_shuffle(c, d, mask{0, 4, 1, 5}), cd1 = __builtin_shuffle(c, d, mask{2, 6, 3, 7});
  *reinterpret_cast<quad*>(to) = __builtin_shuffle(ab0, cd0, mask{0, 1, 4, 5});
  *reinterpret_cast<quad*>(to + to_pitch) = __builtin_shuffle(ab0, cd0, mask{2, 3, 6, 7});
  *reinterpret_cast<quad*>(to + 2 * to_pitch) = __builtin_shuffle(ab1, cd1, mask{0, 1, 4, 5});
  *reinterpret_cast<quad*>(to + 3 * to_pitch) = __builtin_shuffle(ab1, cd1, mask{2, 3, 6, 7});
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
  float* packed = packed_room.get(w.chunk * T + SLACK);
  float* sums = sums_room.get((last - first) * T);
  alignas(64) float lines[BLOCK * T];  // finished rows, on their way out
  if (length < T) std::memset(packed, 0, w.chunk * T * sizeof(float));
  const auto leave = [&](int64_t r, vec* acc) {
    const int64_t place = (r - first) % BLOCK;
    for (int i = 0; i < NV; ++i) store(lines + place * T + i * VL, clamp(acc[i], limits));
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

// --- operators

void check(bool holds, const char* expected) { TORCH_CHECK(holds, "nmfx runtime: expected ", expected); }

// Memory for what is between the operators of a chain. Buffers go round, so that what is written is still in some cache, in
// huge pages where the system has them; they stay with their thread.
struct Pool {
  struct Buffer {
    float* data;
    int64_t size;
  };
  static constexpr int64_t HUGE_PAGE = 1 << 21;  // bytes
  std::vector<Buffer> free;
  bool open = false;

  static std::align_val_t alignment(int64_t floats) {
    return std::align_val_t(floats * static_cast<int64_t>(sizeof(float)) >= HUGE_PAGE ? HUGE_PAGE : 64);
  }
  static void release(const Buffer& buffer) { ::operator delete(buffer.data, alignment(buffer.size)); }
  ~Pool() {
    for (const Buffer& buffer : free) release(buffer);
  }
  // The smallest that is large enough, of equals the one used last; a new one takes the place of one that is too small.
  Buffer take(int64_t size) {
    auto best = free.end();
    for (auto it = free.begin(); it != free.end(); ++it)
      if (it->size >= size && (best == free.end() || it->size <= best->size)) best = it;
    if (best != free.end()) {
      const Buffer found = *best;
      free.erase(best);
      return found;
    }
    if (!free.empty()) {
      const auto largest = std::max_element(free.begin(), free.end(), [](auto& a, auto& b) { return a.size < b.size; });
      release(*largest);
      free.erase(largest);
    }
    const int64_t bytes = size * static_cast<int64_t>(sizeof(float)), unit = bytes >= HUGE_PAGE ? HUGE_PAGE : 64;
    const int64_t room = (bytes + unit - 1) / unit * unit / static_cast<int64_t>(sizeof(float));
    void* data = ::operator new(room * sizeof(float), alignment(room));
#ifdef __linux__
    if (bytes >= HUGE_PAGE) madvise(data, room * sizeof(float), MADV_HUGEPAGE);
#endif
    return {static_cast<float*>(data), room};
  }
};
thread_local Pool pool;

// An output that nobody has written yet: of the pool within a chain.
at::Tensor output(at::IntArrayRef sizes, const at::Tensor& like) {
  if (!pool.open) return at::empty(sizes, like.options());
  int64_t size = 1;
  for (const int64_t one : sizes) size *= one;
  const Pool::Buffer buffer = pool.take(size);
  return at::from_blob(buffer.data, sizes, [buffer](void*) { pool.free.push_back(buffer); }, like.options());
}

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
  const auto larger = [](vec a, vec b) { return (b > a) | (b != b) ? b : a; };  // NaN wins, as in PyTorch
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
      float sum = 0.0f;
      for (int64_t j = 0; j < VL; ++j) sum += sums[j];
      for (; i < plane; ++i) sum += own[i];
      to[item] = sum / static_cast<float>(plane);
    }
  });
  return y;
}

// --- several operators by one call

// What the operators of a chain read, one number after the other: nmfx/runtime/chain.py writes it.
struct Program {
  const int64_t* at;
  const std::vector<at::Tensor>& constants;
  std::vector<at::Tensor>& slots;

  int64_t number() { return *at++; }
  double real() { return std::bit_cast<double>(*at++); }
  at::IntArrayRef numbers() {
    const int64_t count = *at++;
    at += count;
    return {at - count, static_cast<size_t>(count)};
  }
  const at::Tensor& slot() { return slots.at(*at++); }
  const at::Tensor& constant() { return constants.at(*at++); }
  std::optional<at::Tensor> optional(const std::vector<at::Tensor>& from) {
    const int64_t place = *at++;
    if (place < 0) return std::nullopt;
    return from.at(place);
  }
};

enum Operator : int64_t { CONV, LINEAR, DEPTHWISE, MAX_POOL, AVERAGE, FLATTEN };

at::Tensor step(Program& p) {
  switch (p.number()) {
    case CONV: {
      const at::Tensor &x = p.slot(), &values = p.constant(), &columns = p.constant(), &pointers = p.constant();
      const auto bias = p.optional(p.constants), residual = p.optional(p.slots);
      const int64_t out = p.number();
      const auto kernel = p.numbers(), stride = p.numbers(), padding = p.numbers(), dilation = p.numbers();
      const int64_t groups = p.number();
      const double low = p.real(), high = p.real();
      const int64_t chunk = p.number(), vectors = p.number(), over = p.number();
      return convolution(x, values, columns, pointers, bias, residual, out, kernel, stride, padding, dilation, groups, low, high,
                         chunk, vectors, over);
    }
    case LINEAR: {
      const at::Tensor &x = p.slot(), &values = p.constant(), &columns = p.constant(), &pointers = p.constant();
      const auto bias = p.optional(p.constants);
      const int64_t out = p.number();
      const double low = p.real(), high = p.real();
      const int64_t chunk = p.number(), vectors = p.number();
      return sparse_linear(x, values, columns, pointers, bias, out, low, high, chunk, vectors);
    }
    case DEPTHWISE: {
      const at::Tensor &x = p.slot(), &weight = p.constant();
      const auto bias = p.optional(p.constants), residual = p.optional(p.slots);
      const auto stride = p.numbers(), padding = p.numbers(), dilation = p.numbers();
      const double low = p.real(), high = p.real();
      return depthwise_conv2d(x, weight, bias, residual, stride, padding, dilation, low, high);
    }
    case MAX_POOL: {
      const at::Tensor& x = p.slot();
      const auto kernel = p.numbers(), stride = p.numbers(), padding = p.numbers();
      return max_pool2d(x, kernel, stride, padding);
    }
    case AVERAGE: return average(p.slot());
    case FLATTEN: return at::flatten(p.slot(), 1);
    default: TORCH_CHECK(false, "nmfx runtime: a program of another version");
  }
}

// One pass: the inputs are the first slots, each step fills the next, and slots that nobody reads any more are emptied. Before
// a step stands whether its result leaves the chain.
std::vector<at::Tensor> pass(const std::vector<at::Tensor>& inputs, const std::vector<at::Tensor>& constants,
                             const at::Tensor& program) {
  const int64_t* numbers = program.const_data_ptr<int64_t>();
  std::vector<at::Tensor> slots(inputs);
  Program p{numbers, constants, slots};
  const int64_t steps = p.number();
  slots.reserve(inputs.size() + steps);  // steps hold references into it
  const struct Closing {
    ~Closing() { pool.open = false; }
  } closing;
  for (int64_t i = 0; i < steps; ++i) {
    pool.open = !p.number();  // what leaves the chain is PyTorch's
    slots.push_back(step(p));
    for (const int64_t place : p.numbers()) slots.at(place) = at::Tensor();
  }
  std::vector<at::Tensor> outputs;
  for (const int64_t place : p.numbers()) outputs.push_back(slots.at(place));
  return outputs;
}

// The steps of a program, one after the other; with `images` > 0 in passes of so many, each of which stays on one thread.
std::vector<at::Tensor> chain(at::TensorList inputs, at::TensorList constants, const at::Tensor& program, int64_t images) {
  check(program.scalar_type() == at::kLong && program.is_contiguous(), "a program of int64");
  check(!inputs.empty() && inputs[0].dim() > 0, "inputs with a batch");
  const std::vector<at::Tensor> own = constants.vec();
  const int64_t batch = inputs[0].size(0);
  for (const at::Tensor& input : inputs) images = input.dim() > 1 && input.size(0) == batch ? images : 0;
  const int64_t passes = images > 0 ? (batch + images - 1) / images : 1;
  if (passes < 2) return pass(inputs.vec(), own, program);
  std::vector<std::vector<at::Tensor>> parts(passes);
  at::parallel_for(0, passes, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard guard;
    for (int64_t part = begin; part < end; ++part) {
      std::vector<at::Tensor> mine;
      const int64_t start = part * images;
      for (const at::Tensor& input : inputs) mine.push_back(input.narrow(0, start, std::min(images, batch - start)));
      parts[part] = pass(mine, own, program);
    }
  });
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < parts[0].size(); ++i) {
    std::vector<at::Tensor> pieces;
    for (const auto& part : parts) pieces.push_back(part[i]);
    outputs.push_back(at::cat(pieces));
  }
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(nmfx, CPU, m) {
  m.impl("sparse_conv2d", &sparse_conv2d);
  m.impl("sparse_linear", &sparse_linear);
  m.impl("depthwise_conv2d", &depthwise_conv2d);
  m.impl("max_pool2d", &max_pool2d);
  m.impl("average", &average);
  m.impl("chain", &chain);
}
