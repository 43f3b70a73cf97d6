// Convolutions and linear layers in int8: products of kept s8 weights with u8 planes, exact in int32, and what follows them.
//
// Four kept columns make a quad: the vectors of their channels are interleaved once, and every row of a block multiplies them by
// its four weights. A block is the rows, up to four, that share their columns; padding to whole quads and rows has weight zero. A
// depthwise convolution is one whose rows see one channel each, a dense one whose blocks all have the same columns.

#pragma once

#include "planes.h"
#include "products.h"
#include "tokens.h"

namespace {

constexpr int64_t MOST_QUADS = 1 << 14;  // of a row: its sum fits into int32

// Rows in blocks of `height` each.
struct Blocks {
  struct Block {
    int32_t row, rows, quads, columns, values;  // its first row, those there are; quads, and where they begin
  };
  const int8_t* values;     // quad after quad of a block: four of each of its rows
  const uint16_t* columns;  // four of each quad
  const Block* blocks;
  int64_t count, rows, height;
  const float *scales, *shifts;  // of every row: what follows is sum * scale + shift
  const int32_t* sums;           // of a row's weights

  // Rows [first, last) of the blocks, as even parts as can be.
  int64_t part(int64_t number, int64_t parts) const { return count * number / parts; }
};

Blocks blocks_of(const Tensor& values, const Tensor& columns, const Tensor& blocks, const Tensor& scales, const Tensor& shifts,
                 const Tensor& sums, int64_t rows, int64_t height, int64_t width) {
  check(line(values, Type::CHAR) && line(columns, Type::SHORT) && columns.numel() % 4 == 0 && packed_in_order(blocks, Type::INT) &&
            blocks.dim() == 2 && blocks.size(1) == 5 && aligned(values.data, 4),
        "kept weights of int8, columns of int16 and blocks of int32");
  check(height == 1 || height == 2 || height == 4, "blocks of 1, 2 or 4 rows");
  check(line(scales, Type::FLOAT) && line(shifts, Type::FLOAT) && line(sums, Type::INT) && rows > 0 && scales.numel() == rows &&
            shifts.numel() == rows && sums.numel() == rows,
        "a scale, a shift and a sum of every row");
  const Blocks found{static_cast<const int8_t*>(values.data), static_cast<const uint16_t*>(columns.data),
                     static_cast<const Blocks::Block*>(blocks.data), blocks.size(0), rows, height,
                     scales.const_data_ptr<float>(), shifts.const_data_ptr<float>(), sums.const_data_ptr<int32_t>()};
  known->reach({&values, &columns, &blocks}, {Known::BLOCKS, rows, height, width, values.numel(), columns.numel()}, [&] {
    int64_t row = 0;
    for (int64_t i = 0; i < found.count; ++i) {
      const Blocks::Block b = found.blocks[i];
      check(b.row == row && 1 <= b.rows && b.rows <= height && 0 <= b.quads && b.quads <= MOST_QUADS && 0 <= b.columns &&
                0 <= b.values && (int64_t(b.columns) + b.quads) * 4 <= columns.numel() &&
                (int64_t(b.values) + b.quads) * 4 * height <= values.numel(),
            "blocks within their weights");
      row += b.rows;
    }
    check(row == rows, "blocks of all rows");
    for (int64_t i = 0; i < columns.numel(); ++i) check(found.columns[i] < width, "columns of the weight's");
    return Reach{0, 0};
  });
  known->reach({&scales, &shifts, &blocks}, {Known::SCALES, rows}, [&] {  // floats of sums are integers in reach of int32
    for (int64_t i = 0; i < found.count; ++i) {
      const Blocks::Block b = found.blocks[i];
      for (int64_t r = b.row; r < b.row + b.rows; ++r) {
        check(std::abs(found.scales[r]) * (4.0 * std::max(1, b.quads) * 255 * 127) < (1 << 30) && std::abs(found.shifts[r]) < (1 << 29),
              "scales and shifts of rows that end in reach");
      }
    }
    return Reach{0, 0};
  });
  return found;
}

// sums of block `b`, over NV vectors of pixels from `x` on: `leave(block, sums)`.
template <int R, int NV, class Leave>
INLINE inline void multiply_quads(const Blocks& w, const int32_t* offsets, const uint8_t* x, int64_t first, int64_t last,
                                  const Leave& leave) {
  for (int64_t i = first; i < last; ++i) {
    const Blocks::Block b = w.blocks[i];
    const uint16_t* columns = w.columns + 4 * int64_t(b.columns);
    const int8_t* values = w.values + 4 * R * int64_t(b.values);
    ints sums[R][NV][4];
    each<R>([&](auto r) INLINE {
      const ints start = (BIAS && r < b.rows ? BIAS * w.sums[b.row + r] : 0) - ints{};
      each<NV>([&](auto n) INLINE { each<4>([&](auto k) INLINE { sums[r][n][k] = start; }); });
    });
    for (int64_t q = 0; q < b.quads; ++q, columns += 4, values += 4 * R) {
      const uint8_t *x0 = x + offsets[columns[0]], *x1 = x + offsets[columns[1]];
      const uint8_t *x2 = x + offsets[columns[2]], *x3 = x + offsets[columns[3]];
      each<NV>([&](auto n) INLINE {
        bytes in[4];
        interleave(load_bytes(x0 + n * VB), load_bytes(x1 + n * VB), load_bytes(x2 + n * VB), load_bytes(x3 + n * VB), in[0],
                   in[1], in[2], in[3]);
        each<R>([&](auto r) INLINE {
          int32_t four;
          std::memcpy(&four, values + 4 * r, 4);
          each<4>([&](auto k) INLINE { sums[r][n][k] = dot(sums[r][n][k], in[k], four); });
        });
      });
    }
    leave(b, sums);
  }
}

// f<R, NV>() for blocks of a height and a number of vectors that fit into registers.
template <class F>
inline void with_blocks(int64_t height, int64_t vectors, const F& f) {
  using std::integral_constant;
  constexpr int MOST = SUMS / 4;
  if (height == 4) return f(integral_constant<int, 4>(), integral_constant<int, 1>());
  if (height == 2) {
    if constexpr (MOST > 2) {
      if (vectors == 2) return f(integral_constant<int, 2>(), integral_constant<int, 2>());
    }
    return f(integral_constant<int, 2>(), integral_constant<int, 1>());
  }
  if constexpr (MOST > 2) {
    if (vectors == 4) return f(integral_constant<int, 1>(), integral_constant<int, 4>());
    if (vectors == 3) return f(integral_constant<int, 1>(), integral_constant<int, 3>());
  }
  if (vectors == 2) return f(integral_constant<int, 1>(), integral_constant<int, 2>());
  return f(integral_constant<int, 1>(), integral_constant<int, 1>());
}
inline int64_t most_vectors(int64_t height) { return std::max<int64_t>(1, SUMS / 4 / height); }

// What follows the sums of a convolution: scale and shift of the row, a residual, limits, and bytes between the rows.
struct Finish {
  const Blocks& w;
  const Planed& y;
  const Planed* residual;
  float residual_scale;
  bytes low, high, zero;
  const uint8_t* pixels;

  template <int R, int NV>
  INLINE void operator()(int64_t image, int64_t place, const Blocks::Block& b, ints (&sums)[R][NV][4]) const {
    each<R>([&](auto r) INLINE {
      if (r >= b.rows) return;
      const int64_t row = b.row + r;
      const vec scale = w.scales[row] - vec{}, shift = w.shifts[row] - vec{};
      each<NV>([&](auto n) INLINE {
        vec v[4];
        each<4>([&](auto k) INLINE { v[k] = fma(real(sums[r][n][k]), scale, shift); });
        const int64_t at = place + n * VB;
        if (residual) {
          ints other[4];
          widen(load_bytes(residual->at(image, row) + at), other[0], other[1], other[2], other[3]);
          each<4>([&](auto k) INLINE { v[k] = fma(real(other[k]), residual_scale - vec{}, v[k]); });
        }
        bytes q = narrow(nearest(v[0]), nearest(v[1]), nearest(v[2]), nearest(v[3]));
        q = smaller(larger(q, low), high);
        store_bytes(y.at(image, row) + at, within_picture(q, pixels, at, zero));
      });
    });
  }
};

// What is added to an output, in steps of `scale` of the output's.
struct Added {
  Planed picture;
  double scale;
};

Tensor planes_conv(const Planed& x, const Tensor& values, const Tensor& columns, const Tensor& blocks, const Tensor& offsets,
                   const Tensor& scales, const Tensor& shifts, const Tensor& sums, int64_t rows, int64_t height,
                   const Planes& planes, const std::optional<Tensor>& mask, int64_t low, int64_t high,
                   const std::optional<Added>& residual) {
  check(line(offsets, Type::INT) && offsets.numel() && x.planes.alike(planes), "a window over planes of one size");
  const Reach reach = reach_of(offsets);
  check(-x.planes.margin <= reach.least &&
            reach.most <= x.channels() * x.planes.pitch - planes.computed() + x.planes.margin,
        "windows within their margins");
  const Blocks w = blocks_of(values, columns, blocks, scales, shifts, sums, rows, height, offsets.numel());
  check(0 <= low && low <= high && high <= 255, "limits of bytes");
  check(!residual || (residual->picture.planes.alike(planes) && residual->picture.images() == x.images() &&
                      residual->picture.channels() == rows && residual->picture.planes.pitch >= planes.computed() &&
                      std::abs(residual->scale) < (1 << 20)),
        "a residual of the output's size");
  const Planed y = output_planes(x.images(), rows, planes);
  const Finish finish{w, y, residual ? &residual->picture : nullptr, residual ? static_cast<float>(residual->scale) : 0.0f,
                      all_of(low), all_of(high), all_of(planes.zero), pixels_of(mask, planes)};
  const int32_t* at = offsets.const_data_ptr<int32_t>();
  const Tiling tiling(planes.computed() / 4, most_vectors(height), rows, x.images());
  tiling.run([&](int64_t image, int64_t tile, int64_t begin, int64_t end) {
    const int64_t start = tiling.start(tile) * 4, vectors = (tiling.start(tile + 1) * 4 - start) / VB;
    const int64_t first = w.part(begin, tiling.parts), last = w.part(end, tiling.parts);
    with_blocks(height, vectors, [&](auto r, auto n) {
      multiply_quads<r.value, n.value>(w, at, x.at(image, 0) + start, first, last, [&](const Blocks::Block& b, auto& found) INLINE {
        finish.template operator()<r.value, n.value>(image, start, b, found);
      });
    });
  });
  return y.tensor;
}

// Tokens (..., features) of float32, quantised on the way in, to float32 (..., rows).
Tensor quantized_linear(const Tensor& input, const Tensor& values, const Tensor& columns, const Tensor& blocks,
                        const Tensor& scales, const Tensor& shifts, const Tensor& sums, int64_t rows, int64_t width,
                        int64_t height, double inverse, int64_t zero, double low, double high) {
  check(input.dim() >= 1 && sound(input, Type::FLOAT), "float32 tokens (..., features)");
  check(width > 0 && input.size(input.dim() - 1) == width, "tokens of ", width, " features");
  const Blocks w = blocks_of(values, columns, blocks, scales, shifts, sums, rows, height, width);
  const int64_t tokens = input.numel() / width;
  product({tokens, std::max(width, rows)});
  std::vector<int64_t> shape(input.sizes().begin(), input.sizes().end());
  shape.back() = rows;
  const Tensor x = input.contiguous();
  Tensor y = output(Sizes(shape.data(), shape.size()));
  const Clamp limits{static_cast<float>(low), static_cast<float>(high)};
  const auto factor = static_cast<float>(inverse), middle = static_cast<float>(zero);
  const Tiling tiling((tokens + 3) / 4, most_vectors(height), rows);
  tiling.run([&](int64_t, int64_t tile, int64_t begin, int64_t end) {
    const int64_t start = tiling.start(tile) * 4, vectors = (tiling.start(tile + 1) * 4 - start) / VB, wide = vectors * VB;
    const int64_t length = std::min(wide, tokens - start), first = w.part(begin, tiling.parts), last = w.part(end, tiling.parts);
    constexpr int64_t FEATURES = 16, BLOCK = 16;
    auto* planes = reinterpret_cast<uint8_t*>(packed_scratch.get(width * wide / 4 + SLACK));
    float* lines = sums_scratch.get((FEATURES + BLOCK) * wide + SLACK);
    thread_local std::vector<int32_t> offsets;
    offsets.resize(width);
    for (int64_t k = 0; k < width; k += FEATURES) {
      const int64_t count = std::min(FEATURES, width - k);
      if (length < wide) std::memset(lines, 0, FEATURES * wide * sizeof(float));
      transpose(x.const_data_ptr<float>() + start * width + k, width, length, count, lines, wide);
      for (int64_t i = 0; i < count; ++i) {
        offsets[k + i] = static_cast<int32_t>((k + i) * wide);
        for (int64_t n = 0; n < vectors; ++n) {
          store_bytes(planes + (k + i) * wide + n * VB, quantized(lines + i * wide + n * VB, factor, middle));
        }
      }
    }
    int64_t done = w.count && first < last ? w.blocks[first].row : 0, held = 0;
    const auto flush = [&] {
      if (held) transpose(lines, wide, held, length, y.mutable_data_ptr<float>() + start * rows + done, rows);
      done += held, held = 0;
    };
    with_blocks(height, vectors, [&](auto r, auto n) {
      multiply_quads<r.value, n.value>(w, offsets.data(), planes, first, last, [&](const Blocks::Block& b, auto& found) INLINE {
        each<r.value>([&](auto i) INLINE {
          if (i >= b.rows) return;
          const vec scale = w.scales[b.row + i] - vec{}, shift = w.shifts[b.row + i] - vec{};
          each<n.value>([&](auto m) INLINE {
            vec v[4];
            each<4>([&](auto k) INLINE { v[k] = clamp(fma(real(found[i][m][k]), scale, shift), limits); });
            store_pixels(lines + held * wide + m * VB, v[0], v[1], v[2], v[3]);
          });
          ++held;
        });
        if (held + height > BLOCK) flush();
      });
    });
    flush();
  });
  return y;
}

}  // namespace
