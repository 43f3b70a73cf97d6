// Products of sparse weights with pictures and tokens, for any CPU that g++ or clang++ can vectorise for.
//
// A kept weight is a number times a row of activations. For a tile of pixels the activations under a chunk of columns (input
// channel and kernel position) are packed into rows of one length that stay in the first-level cache; every output row then adds
// its kept weights times those rows in registers: one broadcast and `NV` fused multiply-adds a weight, all reads aligned.
// Packing costs one copy for every column of a tile and pays for padding, stride and dilation; what it reads stays as PyTorch
// has it, so that sparse and dense operators stand side by side without conversions.

#include <ATen/Parallel.h>
#include <torch/library.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

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

// n floats; up to VL - 1 more may be read and written.
inline void copy_over(float* to, const float* from, int64_t n) {
  for (int64_t i = 0; i < n; i += VL) store(to + i, load(from + i));
}

// Kept weights of `rows` output rows, chunk after chunk of `chunk` columns: pointers[c * rows + r] is where those of row r begin.
// A column is (input channel, kernel row, kernel column), as PyTorch flattens them; its number counts from its chunk's start.
struct Weights {
  const float* values;
  const uint16_t* columns;
  const int32_t* pointers;
  int64_t rows, width, chunk;
  int64_t chunks() const { return (width + chunk - 1) / chunk; }
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

// sums[r][tile] (+)= the kept weights of chunk c of row r times their rows of `packed`. `Last` rows leave through `leave`.
template <int NV, class Leave>
inline void multiply(const Weights& w, const float* packed, float* sums, const float* bias, int64_t c, int64_t first,
                     int64_t last, const Leave& leave) {
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
    const int32_t end = at[r + 1];
    for (int32_t j = at[r]; j < end; ++j) {
      const vec value = w.values[j] - vec{};
      const float* x = packed + static_cast<int64_t>(w.columns[j]) * T;
      for (int i = 0; i < NV; ++i) acc[i] += value * *reinterpret_cast<const tight*>(x + i * VL);
    }
    if (closes) {
      leave(r, acc);
    } else {
      for (int i = 0; i < NV; ++i) store(own + i * VL, acc[i]);
    }
  }
}

// Pixels in tiles of up to WIDEST vectors, as even as can be, and rows in parts where there are too few tiles for the threads.
constexpr int64_t WIDEST = 8;

struct Tiling {
  int64_t pixels, vectors, tiles, parts;

  Tiling(int64_t pixels, int64_t most, int64_t rows) : pixels(pixels) {
    const int64_t threads = at::get_num_threads();
    vectors = (pixels + VL - 1) / VL;
    tiles = (vectors + most - 1) / most;
    parts = 1;
    while (parts < threads && tiles * parts % threads && tiles * parts < 8 * threads && rows >= 32 * parts) parts *= 2;
  }
  int64_t start(int64_t tile) const { return vectors * tile / tiles * VL; }

  // work(tile, part begin, part end), each tile's parts in one go where a thread has several.
  template <class Work>
  void run(const Work& work) const {
    at::parallel_for(0, tiles * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end;) {
        const int64_t tile = item / parts, next = std::min(end, (tile + 1) * parts);
        work(tile, item % parts, next - tile * parts);
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
  int64_t n, c, h, w, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw;
};

// A run of pixels of one output row within a tile.
struct Run {
  int64_t image, row, column, length, at, source;
};

struct Tile {
  std::vector<Run> runs;
  int64_t length = 0;
};

inline void cut(const Shape& s, int64_t start, int64_t length, Tile& tile) {
  tile.runs.clear();
  tile.length = length;
  const int64_t plane = s.oh * s.ow;
  for (int64_t at = 0; at < length;) {
    const int64_t p = start + at, image = p / plane, row = p % plane / s.ow, column = p % s.ow;
    const int64_t count = std::min(s.ow - column, length - at);
    tile.runs.push_back({image, row, column, count, at, 0});
    at += count;
  }
}

// Rows of one channel with their padding, the columns of one phase of the stride after the other.
struct Plane {
  int64_t phase, pitch;  // floats of a phase, of a row
  struct Strip {
    int64_t image, top, rows, at;  // input rows top .. top + rows (in the padded picture), at this place of the plane
  };
  std::vector<Strip> strips;
  int64_t size = 0;

  void lay(const Shape& s, Tile& tile) {
    strips.clear();
    phase = (s.w + 2 * s.pw + s.sw - 1) / s.sw;
    pitch = phase * s.sw;
    size = 0;
    for (Run& run : tile.runs) {
      const int64_t top = run.row * s.sh, rows = (s.kh - 1) * s.dh + 1;
      if (strips.empty() || strips.back().image != run.image) {
        strips.push_back({run.image, top, 0, size});
      }
      Strip& strip = strips.back();
      strip.rows = std::max(strip.rows, top - strip.top + rows);
      size = strip.at + strip.rows * pitch;
      run.source = strip.at + (top - strip.top) * pitch + run.column;
    }
  }

  void fill(const Shape& s, const float* picture, int64_t channel, int64_t channels, float* to) const {
    for (const Strip& strip : strips) {
      const float* from = picture + (strip.image * channels + channel) * s.h * s.w;
      for (int64_t i = 0; i < strip.rows; ++i) {
        const int64_t row = strip.top + i - s.ph;
        if (row < 0 || row >= s.h) continue;  // stays zero
        float* line = to + strip.at + i * pitch;
        const float* source = from + row * s.w;
        if (s.sw == 1) {
          copy_exact(line + s.pw, source, s.w);
        } else if (s.sw == 2) {
          const int64_t odd = s.pw & 1;
          float* even_line = line + odd * phase + s.pw / 2;
          float* odd_line = line + (1 - odd) * phase + (s.pw + 1) / 2;
          const int64_t half = s.w / 2;
          for (int64_t x = 0; x < half; ++x) {
            even_line[x] = source[2 * x];
            odd_line[x] = source[2 * x + 1];
          }
          if (s.w & 1) even_line[half] = source[s.w - 1];
        } else {
          for (int64_t x = 0; x < s.w; ++x) line[(x + s.pw) % s.sw * phase + (x + s.pw) / s.sw] = source[x];
        }
      }
    }
  }
};

// What lies under the columns [first, first + count), one row of T pixels each.
template <int NV>
inline void pack(const Shape& s, const float* picture, int64_t channels, int64_t channel0, int64_t first,
                 int64_t count, const Tile& tile, const Plane& plane, float* scratch, float* packed) {
  constexpr int64_t T = NV * VL;
  const int64_t taps = s.kh * s.kw;
  const bool direct = taps == 1 && s.ph == 0 && s.pw == 0;
  int64_t before = -1;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t channel = channel0 + (first + k) / taps, tap = (first + k) % taps;
    float* to = packed + k * T;
    if (direct) {
      for (const Run& run : tile.runs) {
        const float* from = picture + ((run.image * channels + channel) * s.h + run.row * s.sh) * s.w + run.column * s.sw;
        if (s.sw == 1) {
          copy_exact(to + run.at, from, run.length);
        } else {
          for (int64_t i = 0; i < run.length; ++i) to[run.at + i] = from[i * s.sw];
        }
      }
      continue;
    }
    if (channel != before) plane.fill(s, picture, channel, channels, scratch);
    before = channel;
    const int64_t x = tap % s.kw * s.dw;
    const float* from = scratch + tap / s.kw * s.dh * plane.pitch + x % s.sw * plane.phase + x / s.sw;
    for (const Run& run : tile.runs) copy_over(to + run.at, from + run.source, run.length);
  }
}

struct Pictures {
  const float* x;
  int64_t channels, channel0;  // of x: all, and the first of this group
  const float* residual;
  float* y;
  int64_t y_channels, y_channel0;
};

template <int NV>
void convolve_tile(const Shape& s, const Pictures& io, const Weights& w, const float* bias, Clamp limits, int64_t start,
                   int64_t length, int64_t first, int64_t last) {
  constexpr int64_t T = NV * VL;
  const int64_t plane = s.oh * s.ow;
  static thread_local Tile tile;
  static thread_local Plane map;
  cut(s, start, length, tile);
  float* scratch = nullptr;
  if (s.kh * s.kw > 1 || s.ph || s.pw) {
    map.lay(s, tile);
    scratch = plane_room.get(map.size + SLACK);
    std::memset(scratch, 0, (map.size + SLACK) * sizeof(float));
  }
  float* packed = packed_room.get(w.chunk * T + SLACK);
  float* sums = sums_room.get((last - first) * T);
  const auto leave = [&](int64_t r, vec* acc) {
    if (length == T && start / plane == (start + T - 1) / plane) {
      const int64_t place = (start / plane * io.y_channels + io.y_channel0 + r) * plane + start % plane;
      for (int i = 0; i < NV; ++i) {
        if (io.residual) acc[i] += load(io.residual + place + i * VL);
        store(io.y + place + i * VL, clamp(acc[i], limits));
      }
      return;
    }
    alignas(64) float line[T];
    for (int i = 0; i < NV; ++i) store(line + i * VL, acc[i]);
    for (int64_t at = 0; at < length;) {
      const int64_t p = start + at, count = std::min(plane - p % plane, length - at);
      const int64_t place = (p / plane * io.y_channels + io.y_channel0 + r) * plane + p % plane;
      int64_t i = 0;
      for (; i + VL <= count; i += VL) {
        vec v = load(line + at + i);
        if (io.residual) v += load(io.residual + place + i);
        store(io.y + place + i, clamp(v, limits));
      }
      for (; i < count; ++i) {
        float v = line[at + i] + (io.residual ? io.residual[place + i] : 0.0f);
        v = v < limits.low ? limits.low : v;
        io.y[place + i] = v > limits.high ? limits.high : v;
      }
      at += count;
    }
  };
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const int64_t count = std::min(w.chunk, w.width - c * w.chunk);
    pack<NV>(s, io.x, io.channels, io.channel0, c * w.chunk, count, tile, map, scratch, packed);
    multiply<NV>(w, packed, sums, bias, c, first, last, leave);
  }
}

void convolve(Shape s, const Pictures& io, const Weights& w, const float* bias, Clamp limits, int64_t vectors) {
  if (s.kh * s.kw == 1 && !s.ph && !s.pw && s.sh == 1 && s.sw == 1) {  // nothing looks beside it: a plane is one long row
    s.w = s.ow = s.oh * s.ow;
    s.h = s.oh = 1;
  }
  const Tiling tiling(s.n * s.oh * s.ow, vectors, w.rows);
  tiling.run([&](int64_t tile, int64_t begin, int64_t end) {
    const int64_t start = tiling.start(tile), stop = tiling.start(tile + 1);
    const int64_t first = w.rows * begin / tiling.parts, last = w.rows * end / tiling.parts;
    with_vectors((stop - start) / VL, [&](auto nv) {
      const int64_t length = std::min(stop, tiling.pixels) - start;
      convolve_tile<nv.value>(s, io, w, bias, limits, start, length, first, last);
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
    multiply<NV>(w, packed, sums, bias, c, first, last, leave);
  }
}

void project(const float* x, int64_t tokens, const Weights& w, const float* bias, Clamp limits, float* y, int64_t vectors) {
  const Tiling tiling(tokens, vectors, w.rows);
  tiling.run([&](int64_t tile, int64_t begin, int64_t end) {
    const int64_t start = tiling.start(tile), stop = tiling.start(tile + 1);
    const int64_t first = w.rows * begin / tiling.parts, last = w.rows * end / tiling.parts;
    with_vectors((stop - start) / VL, [&](auto nv) {
      project_tile<nv.value>(x, w, bias, limits, y, start, std::min(stop, tiling.pixels) - start, first, last);
    });
  });
}

// --- operators


void check(bool holds, const char* expected) { TORCH_CHECK(holds, "nmfx runtime: expected ", expected); }

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

at::Tensor sparse_conv2d(const at::Tensor& input, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& pointers, const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& residual, int64_t out_channels, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double low,
                         double high, int64_t chunk, int64_t vectors) {
  check(1 <= vectors && vectors <= WIDEST && 0 < chunk && chunk <= 65536, "1 to 8 vectors, chunks of up to 65,536 columns");
  check(input.dim() == 4 && input.scalar_type() == at::kFloat, "float32 pictures (batch, channels, height, width)");
  check(input.size(1) % groups == 0 && out_channels % groups == 0, "channels that divide by the groups");
  const at::Tensor x = input.contiguous();
  Shape s{x.size(0), x.size(1) / groups, x.size(2), x.size(3), 0, 0, kernel[0], kernel[1], stride[0], stride[1],
          padding[0], padding[1], dilation[0], dilation[1]};
  s.oh = (s.h + 2 * s.ph - s.dh * (s.kh - 1) - 1) / s.sh + 1;
  s.ow = (s.w + 2 * s.pw - s.dw * (s.kw - 1) - 1) / s.sw + 1;
  check(s.oh > 0 && s.ow > 0, "pictures no smaller than the kernel");
  at::Tensor y = at::empty({s.n, out_channels, s.oh, s.ow}, x.options());
  at::Tensor added;
  if (residual) {
    check(residual->sizes() == y.sizes() && residual->scalar_type() == at::kFloat, "a residual of the output's shape");
    added = residual->contiguous();
  }
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

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& columns,
                         const at::Tensor& pointers, const std::optional<at::Tensor>& bias, int64_t out_features, double low,
                         double high, int64_t chunk, int64_t vectors) {
  check(1 <= vectors && vectors <= WIDEST && 0 < chunk && chunk <= 65536, "1 to 8 vectors, chunks of up to 65,536 columns");
  check(input.dim() >= 1 && input.scalar_type() == at::kFloat, "float32 tokens (..., features)");
  const at::Tensor x = input.contiguous();
  const int64_t features = x.size(-1), tokens = features ? x.numel() / features : 0;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = out_features;
  at::Tensor y = at::empty(shape, x.options());
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
  check(oh > 0 && ow > 0 && 2 * ph <= kh && 2 * pw <= kw, "pictures no smaller than the kernel, padding of half of it at most");
  at::Tensor y = at::empty({x.size(0), x.size(1), oh, ow}, x.options());
  const float* from = x.const_data_ptr<float>();
  float* to = y.mutable_data_ptr<float>();
  const int64_t phase = (w + 2 * pw + sw - 1) / sw;
  const auto larger = [](vec a, vec b) { return (b > a) | (b != b) ? b : a; };  // NaN wins, as in PyTorch
  at::parallel_for(0, x.size(0) * x.size(1), 1, [&](int64_t begin, int64_t end) {
    const int64_t lines = (w + VL) + phase * sw + SLACK;
    float* highest = plane_room.get(lines);  // the largest of kh rows
    float* split = highest + (w + VL) / VL * VL;  // the same with its padding, the columns of one phase of the stride after the other
    std::fill(split, split + phase * sw + SLACK / 2, -INFINITY);
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
        if (sw == 1) {
          copy_exact(split + pw, highest, w);
        } else if (sw == 2) {
          float* even = split + (pw & 1) * phase + pw / 2;
          float* odd = split + (1 - (pw & 1)) * phase + (pw + 1) / 2;
          for (int64_t c = 0; c < w / 2; ++c) even[c] = highest[2 * c], odd[c] = highest[2 * c + 1];
          if (w & 1) even[w / 2] = highest[w - 1];
        } else {
          for (int64_t c = 0; c < w; ++c) split[(c + pw) % sw * phase + (c + pw) / sw] = highest[c];
        }
        float* line = to + (plane * oh + row) * ow;
        for (int64_t c = 0; c < ow; c += VL) {
          vec v = load(split + c);
          for (int64_t k = 1; k < kw; ++k) v = larger(v, load(split + k % sw * phase + k / sw + c));
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

}  // namespace

TORCH_LIBRARY_IMPL(nmfx, CPU, m) {
  m.impl("sparse_conv2d", &sparse_conv2d);
  m.impl("sparse_linear", &sparse_linear);
  m.impl("max_pool2d", &max_pool2d);
}
