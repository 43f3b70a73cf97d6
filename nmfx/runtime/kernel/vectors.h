// Vectors of floats, rows of them moved, and memory that a thread keeps.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int64_t VL = 16;
#elif defined(__AVX__)
constexpr int64_t VL = 8;
#else
constexpr int64_t VL = 4;
#endif

// Places within two vectors: GCC 11 has another name than GCC 12 and Clang.
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a == b){__VA_ARGS__})
#endif
#if defined(__AVX512F__)
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX__)
#define EVENS 0, 2, 4, 6, 8, 10, 12, 14
#define ODDS 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVENS 0, 2, 4, 6
#define ODDS 1, 3, 5, 7
#endif

typedef float vec __attribute__((vector_size(VL * 4)));
typedef float loose __attribute__((vector_size(VL * 4), aligned(4), may_alias));
typedef float tight __attribute__((vector_size(VL * 4), may_alias));
typedef int places __attribute__((vector_size(VL * 4)));
typedef float quad __attribute__((vector_size(16), aligned(4), may_alias));
static_assert(std::endian::native == std::endian::little, "column numbers are read four at a time");
constexpr int64_t SLACK = 64;  // floats that whole-vector copies may write past the end

// f(0), f(1), ... f(N - 1) with numbers that the compiler knows: arrays of vectors that are used so are registers.
// For that all that touches them has to be INLINE.
#define INLINE __attribute__((always_inline))
template <int... I, class F>
INLINE inline void each_of(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
INLINE inline void each(const F& f) {
  each_of(std::make_integer_sequence<int, N>(), f);
}

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
  int64_t i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) {
    const vec a = load(from + i), b = load(from + i + VL);
    store(even + i / 2, SHUFFLE(a, b, EVENS));
    if (odd) store(odd + i / 2, SHUFFLE(a, b, ODDS));
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

struct Clamp {
  float low, high;
};

// Moves vectors along their lanes: lane i is lane i + `by` of what is given, or zero where that has none.
struct Shift {
  places from, inside;

  explicit Shift(int64_t by) {
    for (int i = 0; i < VL; ++i) from[i] = i;
    from += static_cast<int>(by);
    inside = (from >= 0) & (from < static_cast<int>(VL));
  }
  vec operator()(vec v) const { return reinterpret_cast<vec>(reinterpret_cast<places>(permuted(v)) & inside); }

 private:
  vec permuted(vec v) const {
#if defined(__AVX512F__)
    return reinterpret_cast<vec>(_mm512_permutexvar_ps(reinterpret_cast<__m512i>(from), reinterpret_cast<__m512>(v)));
#elif defined(__AVX2__)
    return reinterpret_cast<vec>(_mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256i>(from)));
#else
    vec moved = {};
    for (int i = 0; i < VL; ++i) moved[i] = v[from[i] & (VL - 1)];
    return moved;
#endif
  }
};

// NaN wins, as in PyTorch.
inline vec larger(vec a, vec b) { return ((b > a) | (b != b)) ? b : a; }

inline vec clamp(vec v, const Clamp& limits) {
  const vec low = limits.low - vec{}, high = limits.high - vec{};
  v = v < low ? low : v;
  return v > high ? high : v;
}

// The sum of all lanes.
inline float total(vec v) {
  float sum = 0.0f;
  for (int64_t i = 0; i < VL; ++i) sum += v[i];
  return sum;
}

// Aligned memory of one thread, kept between calls.
struct Scratch {
  std::vector<float> memory;
  float* get(int64_t count) {
    if (static_cast<int64_t>(memory.size()) < count + 16) memory.resize(count + 16);
    auto address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<float*>((address + 63) & ~uintptr_t(63));
  }
};
thread_local Scratch packed_scratch, sums_scratch, plane_scratch;

}  // namespace
