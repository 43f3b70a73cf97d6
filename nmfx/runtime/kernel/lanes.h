// Convolutions of pictures as lanes: the rows of a picture are dealt out to the lanes of vectors, so that the next pixel is the
// next vector. Then every shift of a window is an aligned vector somewhere else: nothing is packed, neither for kernels of one
// pixel nor for larger ones, and a stride of two skips every other vector.
//
// A channel is a stream of pixels, row after row with a gap of zeros between them. Lane i of vector j holds place i * length + j
// of the stream, for j from -before to `vectors` - before, and zero where the stream has no pixel; vectors below 0 and from
// `length` on (the halo) hold pixels of the neighbouring lanes once more.
//
// A picture can be cut into strips from left to right, each with all its channels for itself, so that every thread has memory of
// its own: lines that two threads write go to and fro between their caches, and where the cores are far from one another that
// takes longer than the products. In their gaps strips hold the columns of their neighbours that windows look at.
// nmfx/runtime/layout/ lays all of it out.

#pragma once


#include "products.h"

namespace {

struct Lanes {
  int64_t rows, width, pitch;       // rows of a lane, vectors of a row, and from one row to the next
  int64_t length, before, vectors;  // vectors of a lane; of a channel: those before them, and all
  int64_t strips, left, right;      // columns that windows see of the strips on both sides

  int64_t floats() const { return vectors * VL; }
};

// Which lanes hold pixels, by rows and vectors of a row of which all of one kind are alike; without data nobody asks.
struct Mask {
  const int32_t* data;
  int64_t row, step;  // floats from row to row and from vector to vector: one of them is 0

  places at(int64_t y, int64_t x) const { return *reinterpret_cast<const places*>(data + y * row + x * step); }
};

// Where finished vectors go: first a residual, then limits, then the lanes that hold pixels, then copies for others to see.
struct Writer {
  Lanes lanes;
  float* y;               // place 0 of the first channel
  const float* residual;  // the same of another picture, or null
  int64_t residual_floats, residual_strip_floats;
  Clamp limits;
  Mask mask;
  int64_t strip, strip_floats;  // this one, and the distance to the next

  Writer of(int64_t other) const {
    Writer found = *this;
    found.strip = other;
    found.y += (other - strip) * strip_floats;
    if (residual) found.residual += (other - strip) * residual_strip_floats;
    return found;
  }
  // NV vectors of row `row`, from vector x on.
  template <int NV>
  INLINE void finish(int64_t channel, int64_t row, int64_t x, vec* v) const {
    const int64_t j = row * lanes.pitch + x;
    float* base = y + channel * lanes.floats();
    float* own = base + j * VL;
    if (residual) {
      const float* other = residual + channel * residual_floats + j * VL;
      each<NV>([&](auto i) INLINE { v[i] += *reinterpret_cast<const tight*>(other + i * VL); });
    }
    each<NV>([&](auto i) INLINE { v[i] = clamp(v[i], limits); });
    if (mask.data) {
      each<NV>([&](auto i) INLINE { v[i] = reinterpret_cast<vec>(reinterpret_cast<places>(v[i]) & mask.at(row, x + i)); });
    }
    each<NV>([&](auto i) INLINE { *reinterpret_cast<tight*>(own + i * VL) = v[i]; });
    if (!mask.data) return;
    if (spills(j) || spills(j + NV - 1)) each<NV>([&](auto i) INLINE { spill(base, j + i, v[i]); });
    if (x <= lanes.right || x + NV >= lanes.width - lanes.left) edges(base, row, x, NV, own);
  }

 private:
  // Whether neighbouring lanes look for vector j, which they do at both ends of a lane.
  bool spills(int64_t j) const { return j < lanes.vectors - lanes.before - lanes.length || j >= lanes.length - lanes.before; }
  // Vector j of a lane once more, where the neighbouring lanes look for it.
  void spill(float* base, int64_t j, vec v) const {
    for (int64_t q = 1; j - q * lanes.length >= -lanes.before; ++q) write(base, j - q * lanes.length, Shift(-q)(v));
    for (int64_t q = 1; j + q * lanes.length < lanes.vectors - lanes.before; ++q) write(base, j + q * lanes.length, Shift(q)(v));
  }
  // Vector j, which may be beyond a lane, and for them.
  void set(float* base, int64_t j, vec v) const {
    if (j >= -lanes.before && j < lanes.vectors - lanes.before) write(base, j, v);
    if (spills(j)) spill(base, j, v);
  }
  void write(float* base, int64_t j, vec v) const { *reinterpret_cast<tight*>(base + j * VL) = v; }

  // What lies beyond both ends of a row: columns of this strip in the gaps of the next ones, and zeros around the picture.
  __attribute__((noinline)) void edges(float* base, int64_t row, int64_t x, int64_t count, const float* own) const {
    const auto copy = [&](float* there, int64_t column, vec v) { set(there, row * lanes.pitch + column, v); };
    for (int64_t i = 0; i < count; ++i) {
      const vec v = load(own + i * VL);
      if (strip > 0 && x + i < lanes.right) copy(base - strip_floats, lanes.width + x + i, v);
      if (strip + 1 < lanes.strips && x + i >= lanes.width - lanes.left) copy(base + strip_floats, x + i - lanes.width, v);
    }
    if (x == 0 && strip == 0) {  // but for zeros that serve both ends, which the row before writes, maybe on another thread
      const int64_t own_zeros = std::min(lanes.left, lanes.pitch - lanes.width - lanes.right);
      for (int64_t i = 1; i <= own_zeros; ++i) copy(base, -i, vec{});
    }
    if (x + count == lanes.width && strip + 1 == lanes.strips) {
      for (int64_t i = 0; i < lanes.right; ++i) copy(base, lanes.width + i, vec{});
    }
  }
};

// Pieces of at most `most` vectors, as even as can be, strip after strip: f(strip, row, x, number of vectors). Where there are
// fewer strips than threads and it costs little, there are as many pieces in a row for every thread.
struct Pieces {
  static constexpr int64_t LEAST = 3;  // vectors
  const Lanes& lanes;
  int64_t of_row;

  Pieces(const Lanes& lanes, int64_t most) : lanes(lanes), of_row((lanes.width + most - 1) / most) {
    const int64_t threads = Tiling::threads(), even = (of_row + threads - 1) / threads * threads;
    if (lanes.strips * lanes.rows % threads && lanes.width >= LEAST * even) of_row = even;
  }
  int64_t count() const { return lanes.strips * lanes.rows * of_row; }
  template <class F>
  void at(int64_t piece, const F& f) const {
    const int64_t line = piece / of_row, part = piece % of_row;
    const int64_t begin = lanes.width * part / of_row, end = lanes.width * (part + 1) / of_row;
    f(line / lanes.rows, line % lanes.rows, begin, end - begin);
  }
};

// How an operator reads a picture: vectors from one row of its output to the next, and where each strip begins, in floats.
struct Reading {
  int64_t row;
  const int64_t* strips;
};

// Rows [first, last) of the weights over one piece; `from` is where what lies under it begins, before the chunk's own start.
template <int NV, int STEP>
inline void lanes_piece(const float* from, const int32_t* starts, const Weights& w, const float* bias, const Writer& writer,
                        int64_t row, int64_t x, int64_t first, int64_t last) {
  float* sums = sums_scratch.get((last - first) * NV * VL);
  const auto leave = [&](int64_t r, vec* acc) INLINE { writer.finish<NV>(r, row, x, acc); };
  for (int64_t c = 0; c < w.chunks(); ++c) {
    const float* start = from + starts[c] * VL;
    if (STEP == 1 && w.dense()) {
      const uint16_t* columns = w.columns + w.pointers[c * w.rows];  // the same for all rows
      multiply_dense<NV>(w, [&](int64_t k) { return start + columns[k] * VL; }, sums, bias, c, first, last, leave);
    } else {
      multiply<NV, STEP>(w, start, std::integral_constant<int64_t, VL>(), sums, bias, c, first, last, leave);
    }
  }
}

// One image and group: columns of the weights count vectors from where their chunk starts, and chunks start in vectors from
// where the picture does.
template <int STEP>
void lanes_convolve(const float* x, const Reading& reading, const int32_t* starts, const Weights& w, const float* bias,
                    const Writer& writer, const Pieces& pieces, int64_t piece, int64_t first, int64_t last) {
  pieces.at(piece, [&](int64_t strip, int64_t row, int64_t begin, int64_t count) {
    const float* from = x + reading.strips[strip] + (row * reading.row + STEP * begin) * VL;
    const Writer own = writer.of(strip);
    with_vectors(count, [&](auto nv) { lanes_piece<nv.value, STEP>(from, starts, w, bias, own, row, begin, first, last); });
  });
}

// One channel of a strip with its halo, in the first-level cache: what windows look at of it, where nothing else needs that in
// memory. For every vector there is where it comes from: strips to the right, vectors from place 0 of the channel, lanes to shift
// it by (`NONE`: zeros), and where its mask is.
struct Local {
  static constexpr int32_t NONE = 1 << 20;
  struct Source {
    int32_t strip, vector, lanes, mask;
  };
  Lanes lanes;
  const int32_t* mask;
  const Source* sources;

  void fill(const float* own, int64_t strip_floats, float* to) const {
    int32_t lanes_by = 0;
    Shift shift(0);
    for (int64_t k = 0; k < lanes.vectors; ++k) {
      const Source& source = sources[k];
      vec v = {};
      if (source.lanes != NONE) {
        const float* at = own + source.strip * strip_floats + source.vector * VL;
        v = reinterpret_cast<vec>(reinterpret_cast<places>(load(at)) & *reinterpret_cast<const places*>(mask + source.mask));
        if (source.lanes != lanes_by) shift = Shift(lanes_by = source.lanes);
        v = shift(v);
      }
      *reinterpret_cast<tight*>(to + k * VL) = v;
    }
  }
};

// A channel by itself, under a window: `offsets` are of its taps, in vectors from where the channel begins.
struct Channel {
  const float* x;
  int64_t row;  // vectors from one row that is read to the next
  const int32_t* offsets;
  int64_t taps;
};

template <int STEP, class Start, class Tap>
inline void lanes_slide(const Channel& in, const Writer& writer, const Pieces& pieces, const Start& start, const Tap& add) {
  const int64_t of_strip = pieces.count() / writer.lanes.strips;
  for (int64_t piece = writer.strip * of_strip; piece < (writer.strip + 1) * of_strip; ++piece) {
    pieces.at(piece, [&](int64_t, int64_t row, int64_t begin, int64_t count) {
      const float* from = in.x + (row * in.row + STEP * begin) * VL;
      with_vectors(count, [&](auto nv) {
        constexpr int NV = nv.value;
        vec acc[NV];
        each<NV>([&](auto i) INLINE { acc[i] = start(); });
        for (int64_t tap = 0; tap < in.taps; ++tap) {
          const float* shift = from + in.offsets[tap] * VL;
          each<NV>([&](auto i) INLINE { acc[i] = add(acc[i], tap, *reinterpret_cast<const tight*>(shift + i * STEP * VL)); });
        }
        writer.finish<NV>(0, row, begin, acc);
      });
    });
  }
}

template <int STEP>
void lanes_depthwise(const Channel& in, const float* weight, float bias, const Writer& writer, const Pieces& pieces) {
  lanes_slide<STEP>(in, writer, pieces, [&]() INLINE { return bias - vec{}; },
                    [&](vec sum, int64_t tap, vec v) INLINE { return sum + (weight[tap] - vec{}) * v; });
}

// Of pictures without negative pixels: what is around them counts as zero.
template <int STEP>
void lanes_max_pool(const Channel& in, const Writer& writer, const Pieces& pieces) {
  lanes_slide<STEP>(in, writer, pieces, []() INLINE { return vec{}; },
                    [](vec sum, int64_t, vec v) INLINE { return larger(sum, v); });
}

}  // namespace
