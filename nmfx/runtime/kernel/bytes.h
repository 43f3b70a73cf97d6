// Bytes of pixels, four channels of them at a time: products of u8 with s8 in sums of int32, exact on every processor.

#pragma once

#include <array>
#include <cmath>

#include "vectors.h"

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int64_t VB = 4 * VL;  // pixels of a vector of bytes
typedef uint8_t bytes __attribute__((vector_size(VB)));
typedef uint8_t loose_bytes __attribute__((vector_size(VB), aligned(1), may_alias));
typedef places ints;

inline bytes load_bytes(const uint8_t* p) { return *reinterpret_cast<const loose_bytes*>(p); }
inline void store_bytes(uint8_t* p, bytes v) { *reinterpret_cast<loose_bytes*>(p) = v; }
inline bytes larger(bytes a, bytes b) { return a > b ? a : b; }
inline bytes smaller(bytes a, bytes b) { return a < b ? a : b; }
inline bytes all_of(int64_t byte) { return static_cast<uint8_t>(byte) - bytes{}; }

#if defined(__AVX512F__)
#define X86(name) _mm512_##name
typedef __m512i whole;
typedef __m512 reals;
#elif defined(__AVX2__)
#define X86(name) _mm256_##name
typedef __m256i whole;
typedef __m256 reals;
#endif

#if defined(__AVX2__)

constexpr int32_t BIAS = 0;  // added to a sum for every weight, since bytes are taken as they are
constexpr int64_t SUMS = VL == 16 ? 16 : 8;  // vectors of sums that fit into registers beside what is multiplied

// Four channels (VB pixels each) as vectors of (pixel, channel): pixels in the order that `narrow` undoes.
INLINE inline void interleave(bytes a, bytes b, bytes c, bytes d, bytes& x0, bytes& x1, bytes& x2, bytes& x3) {
  const auto [i, j, k, l] = std::array{whole(a), whole(b), whole(c), whole(d)};
  const whole ab0 = X86(unpacklo_epi8)(i, j), ab1 = X86(unpackhi_epi8)(i, j);
  const whole cd0 = X86(unpacklo_epi8)(k, l), cd1 = X86(unpackhi_epi8)(k, l);
  x0 = bytes(X86(unpacklo_epi16)(ab0, cd0)), x1 = bytes(X86(unpackhi_epi16)(ab0, cd0));
  x2 = bytes(X86(unpacklo_epi16)(ab1, cd1)), x3 = bytes(X86(unpackhi_epi16)(ab1, cd1));
}

// For every pixel the sum plus the products of its four channels with four weights.
INLINE inline ints dot(ints sum, bytes x, int32_t weights) {
  const whole w = X86(set1_epi32)(weights);
#if defined(__AVX512VNNI__)
  return ints(_mm512_dpbusd_epi32(whole(sum), whole(x), w));
#elif defined(__AVXVNNI__)
  return ints(_mm256_dpbusd_avx_epi32(whole(sum), whole(x), w));
#else  // by 16 bits, since vpmaddubsw saturates
  const whole even = X86(srli_epi16)(X86(slli_epi16)(whole(x), 8), 8), odd = X86(srli_epi16)(whole(x), 8);
  const whole even_w = X86(srai_epi16)(X86(slli_epi16)(w, 8), 8), odd_w = X86(srai_epi16)(w, 8);
  return sum + ints(X86(madd_epi16)(even, even_w)) + ints(X86(madd_epi16)(odd, odd_w));
#endif
}

INLINE inline vec fma(vec a, vec b, vec c) { return vec(X86(fmadd_ps)(reals(a), reals(b), reals(c))); }
INLINE inline ints nearest(vec v) { return ints(X86(cvtps_epi32)(reals(v))); }

// Bytes as integers, in the order of `interleave`.
INLINE inline void widen(bytes v, ints& x0, ints& x1, ints& x2, ints& x3) {
  const whole zero{}, low = X86(unpacklo_epi8)(whole(v), zero), high = X86(unpackhi_epi8)(whole(v), zero);
  x0 = ints(X86(unpacklo_epi16)(low, zero)), x1 = ints(X86(unpackhi_epi16)(low, zero));
  x2 = ints(X86(unpacklo_epi16)(high, zero)), x3 = ints(X86(unpackhi_epi16)(high, zero));
}
// And back, saturated.
INLINE inline bytes narrow(ints x0, ints x1, ints x2, ints x3) {
  const whole low = X86(packs_epi32)(whole(x0), whole(x1)), high = X86(packs_epi32)(whole(x2), whole(x3));
  return bytes(X86(packus_epi16)(low, high));
}
// Floats of four vectors in that order, to memory pixel by pixel.
INLINE inline void store_pixels(float* to, vec x0, vec x1, vec x2, vec x3) {
  const vec all[] = {x0, x1, x2, x3};
  for (int lane = 0; lane < VL / 4; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const quad four = {all[i][4 * lane], all[i][4 * lane + 1], all[i][4 * lane + 2], all[i][4 * lane + 3]};
      *reinterpret_cast<quad*>(to + 16 * lane + 4 * i) = four;
    }
  }
}
// The same from memory.
INLINE inline vec load_pixels(const float* from, int i) {
  vec v;
  for (int lane = 0; lane < VL / 4; ++lane) {
    const quad four = *reinterpret_cast<const quad*>(from + 16 * lane + 4 * i);
    for (int k = 0; k < 4; ++k) v[4 * lane + k] = four[k];
  }
  return v;
}

#elif defined(__ARM_NEON)

constexpr int32_t BIAS = 128;  // bytes are taken less 128, since sdot takes signed ones
constexpr int64_t SUMS = 16;

INLINE inline void interleave(bytes a, bytes b, bytes c, bytes d, bytes& x0, bytes& x1, bytes& x2, bytes& x3) {
  const auto i = uint8x16_t(a), j = uint8x16_t(b), k = uint8x16_t(c), l = uint8x16_t(d);
  const uint16x8_t ab0 = vreinterpretq_u16_u8(vzip1q_u8(i, j)), ab1 = vreinterpretq_u16_u8(vzip2q_u8(i, j));
  const uint16x8_t cd0 = vreinterpretq_u16_u8(vzip1q_u8(k, l)), cd1 = vreinterpretq_u16_u8(vzip2q_u8(k, l));
  const auto less = [](uint16x8_t v) INLINE { return bytes(vreinterpretq_u8_u16(v)) ^ 128; };
  x0 = less(vzip1q_u16(ab0, cd0)), x1 = less(vzip2q_u16(ab0, cd0));
  x2 = less(vzip1q_u16(ab1, cd1)), x3 = less(vzip2q_u16(ab1, cd1));
}
INLINE inline ints dot(ints sum, bytes x, int32_t weights) {
  return ints(vdotq_s32(int32x4_t(sum), int8x16_t(x), int8x16_t(vdupq_n_s32(weights))));
}
INLINE inline vec fma(vec a, vec b, vec c) { return vec(vfmaq_f32(float32x4_t(c), float32x4_t(a), float32x4_t(b))); }
INLINE inline ints nearest(vec v) { return ints(vcvtnq_s32_f32(float32x4_t(v))); }
INLINE inline void widen(bytes v, ints& x0, ints& x1, ints& x2, ints& x3) {
  const uint16x8_t low = vmovl_u8(vget_low_u8(uint8x16_t(v))), high = vmovl_u8(vget_high_u8(uint8x16_t(v)));
  x0 = ints(vmovl_u16(vget_low_u16(low))), x1 = ints(vmovl_u16(vget_high_u16(low)));
  x2 = ints(vmovl_u16(vget_low_u16(high))), x3 = ints(vmovl_u16(vget_high_u16(high)));
}
INLINE inline bytes narrow(ints x0, ints x1, ints x2, ints x3) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(int32x4_t(x0)), vqmovn_s32(int32x4_t(x1)));
  const int16x8_t high = vcombine_s16(vqmovn_s32(int32x4_t(x2)), vqmovn_s32(int32x4_t(x3)));
  return bytes(vcombine_u8(vqmovun_s16(low), vqmovun_s16(high)));
}
INLINE inline void store_pixels(float* to, vec x0, vec x1, vec x2, vec x3) {
  store(to, x0), store(to + 4, x1), store(to + 8, x2), store(to + 12, x3);
}
INLINE inline vec load_pixels(const float* from, int i) { return load(from + 4 * i); }

#else  // any other processor, right and slow: vectors of 16 bytes and 4 sums

constexpr int32_t BIAS = 0;
constexpr int64_t SUMS = 8;

inline void interleave(bytes a, bytes b, bytes c, bytes d, bytes& x0, bytes& x1, bytes& x2, bytes& x3) {
  bytes* const to[] = {&x0, &x1, &x2, &x3};
  for (int i = 0; i < 16; ++i) {
    const uint8_t four[] = {a[i], b[i], c[i], d[i]};
    for (int channel = 0; channel < 4; ++channel) (*to[i / 4])[i % 4 * 4 + channel] = four[channel];
  }
}
inline ints dot(ints sum, bytes x, int32_t weights) {
  for (int i = 0; i < 16; ++i) sum[i / 4] += x[i] * static_cast<int8_t>(weights >> 8 * (i % 4));
  return sum;
}
inline vec fma(vec a, vec b, vec c) {
  for (int i = 0; i < VL; ++i) a[i] = std::fma(a[i], b[i], c[i]);
  return a;
}
inline ints nearest(vec v) {
  ints rounded{};
  for (int i = 0; i < VL; ++i) rounded[i] = static_cast<int32_t>(std::nearbyint(v[i]));
  return rounded;
}
inline void widen(bytes v, ints& x0, ints& x1, ints& x2, ints& x3) {
  ints* const to[] = {&x0, &x1, &x2, &x3};
  for (int i = 0; i < 16; ++i) (*to[i / 4])[i % 4] = v[i];
}
inline bytes narrow(ints x0, ints x1, ints x2, ints x3) {
  const ints from[] = {x0, x1, x2, x3};
  bytes v{};
  for (int i = 0; i < 16; ++i) v[i] = static_cast<uint8_t>(std::clamp(from[i / 4][i % 4], 0, 255));
  return v;
}
inline void store_pixels(float* to, vec x0, vec x1, vec x2, vec x3) {
  store(to, x0), store(to + 4, x1), store(to + 8, x2), store(to + 12, x3);
}
inline vec load_pixels(const float* from, int i) { return load(from + 4 * i); }

#endif

typedef uint16_t pairs __attribute__((vector_size(VB)));
typedef uint8_t half __attribute__((vector_size(VB / 2)));
typedef uint8_t loose_half __attribute__((vector_size(VB / 2), aligned(1), may_alias));

// even[i] = from[2 i] and odd[i] = from[2 i + 1] for n bytes; up to VB are read, and VB / 2 written, beyond what there is.
inline void split_bytes(const uint8_t* from, int64_t n, uint8_t* even, uint8_t* odd) {
  for (int64_t i = 0; i < n; i += VB) {
    const pairs both = pairs(load_bytes(from + i));
    *reinterpret_cast<loose_half*>(even + i / 2) = __builtin_convertvector(both & 255, half);
    *reinterpret_cast<loose_half*>(odd + i / 2) = __builtin_convertvector(both >> 8, half);
  }
}

INLINE inline vec real(ints v) { return __builtin_convertvector(v, vec); }

// VB floats as bytes: x * `inverse` + `zero`, rounded to the nearest (half to even) and saturated. NaN becomes 0.
INLINE inline bytes quantized(const float* from, float inverse, float zero) {
  ints q[4];
  each<4>([&](auto i) INLINE {
    vec v = fma(load_pixels(from, i), inverse - vec{}, zero - vec{});
    v = v > 0.0f ? v : vec{};
    q[i] = nearest(v < 255.0f ? v : 255.0f - vec{});
  });
  return narrow(q[0], q[1], q[2], q[3]);
}

}  // namespace
