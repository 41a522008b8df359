// Vectors of float, kWidth of them, for the instruction set that the file is compiled for: 16 with AVX-512, 8 with
// AVX2, 4 elsewhere: through the compiler's vector extension, with NEON's instructions where it has none of them. Memory
// may hold float, Bf16 or F16, and int8_t to load.
// Everything is in namespace rgtg::RGTG_ISA, so that no two instruction sets share a function.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.hpp"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace rgtg {
namespace RGTG_ISA {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Single numbers.

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(Bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#elif defined(__aarch64__)
  __fp16 half;
  std::memcpy(&half, &x, 2);
  return half;
#else
  uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return float_of_bits(sign | 0x7f800000u | ((rest & 0x3ff) << 13));
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, subnormal numbers included.
  return float_of_bits(sign | bits_of_float(float_of_bits(rest << 13) * 0x1p112f));
#endif
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, Bf16* out) {
  uint32_t bits = bits_of_float(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, F16* out) {
#if defined(__F16C__)
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, 0));
#elif defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(x);
  std::memcpy(out, &half, 2);
#else
  uint32_t bits = bits_of_float(x), sign = (bits >> 16) & 0x8000, rest = bits & 0x7fffffff;
  if (rest > 0x7f800000u) {
    out->bits = 0x7e00;
  } else if (rest >= 0x477ff000u) {  // rounds to 65536 or more
    out->bits = static_cast<uint16_t>(sign | 0x7c00);
  } else if (rest < 0x38800000u) {  // subnormal: adding 0.5 aligns the bits, and the addition rounds them
    out->bits = static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000u));
  } else {
    out->bits = static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfff + ((rest >> 13) & 1)) >> 13));
  }
#endif
}

// Vectors.

#if defined(__AVX512F__)

constexpr int kWidth = 16;
struct Vec {
  __m512 v;
};

inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const Bf16* p) {
  __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load(const F16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }
// The first n numbers (0 <= n <= kWidth), zeros after them; nothing beyond is read.
inline Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline Vec load_n(const Bf16* p, int n) {
  __m256i half = _mm256_maskz_loadu_epi16(first(n), p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Vec load_n(const F16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }

inline __m256i round_bf16(Vec a) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(a.v);
#else
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
#endif
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(Bf16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16(a)); }
inline void store(F16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline void store_n(Bf16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first(n), round_bf16(a)); }
inline void store_n(F16* p, Vec a, int n) {
  _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
// a * b + c in one rounding where the machine has it.
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The larger of two; b where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm512_sqrt_ps(a.v)}; }
// Bit i is set where a[i] > b[i], or where a[i] is NaN.
inline uint32_t greater_or_nan(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
// x[i] where bit i is set, y[i] elsewhere; bits past the last number are ignored.
inline Vec where_bit(uint64_t bits, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(bits), y.v, x.v)};
}
inline Vec round_even(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x where a equals b, y elsewhere.
inline Vec where_equal(Vec a, Vec b, Vec x, Vec y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), y.v, x.v)};
}
// x = m * 2^e with m in [sqrt(1/2), sqrt(2)), for positive normal x.
inline Vec exponent(Vec x, Vec* m) {
  __m512i bits = _mm512_castps_si512(x.v);
  __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  m->v = _mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)));
  return {_mm512_cvtepi32_ps(e)};
}
// a * 2^n for integer n.
inline Vec times_pow2(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Vec a) { return _mm512_reduce_max_ps(a.v); }

// Transposes: swaps x[i][j] and x[j][i].
inline void transpose(Vec (&x)[kWidth]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  __m512 u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    for (int h = 0; h < 2; ++h) {
      __m512d a = _mm512_castps_pd(t[i + h]), b = _mm512_castps_pd(t[i + 2 + h]);
      u[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      u[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  // u[4 * i + c] holds, in its 128-bit lane l, column 4 * l + c of rows 4 * i to 4 * i + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    __m512 a = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), b = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
    __m512 d = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88), e = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
    x[c].v = _mm512_shuffle_f32x4(a, d, 0x88);
    x[8 + c].v = _mm512_shuffle_f32x4(a, d, 0xdd);
    x[4 + c].v = _mm512_shuffle_f32x4(b, e, 0x88);
    x[12 + c].v = _mm512_shuffle_f32x4(b, e, 0xdd);
  }
}

#elif defined(__AVX2__)

constexpr int kWidth = 8;
struct Vec {
  __m256 v;
};

inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const Bf16* p) {
  __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline Vec load(const F16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline __m256i first(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The first n numbers (0 <= n <= kWidth), zeros after them; nothing beyond is read.
inline Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
template <class T>
inline Vec load_n(const T* p, int n) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(Bf16* p, Vec a) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline void store(F16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_n(float* p, Vec a, int n) { _mm256_maskstore_ps(p, first(n), a.v); }
template <class T>
inline void store_n(T* p, Vec a, int n) {
  T buffer[kWidth];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
// a * b + c in one rounding where the machine has it.
inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// The larger of two; b where either is NaN.
inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {_mm256_sqrt_ps(a.v)}; }
// Bit i is set where a[i] > b[i], or where a[i] is NaN.
inline uint32_t greater_or_nan(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
}
inline Vec round_even(Vec a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// x where a equals b, y elsewhere.
inline Vec where_equal(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ))};
}
// x = m * 2^e with m in [sqrt(1/2), sqrt(2)), for positive normal x.
inline Vec exponent(Vec x, Vec* m) {
  __m256i bits = _mm256_castps_si256(x.v);
  __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
  m->v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
  return {_mm256_cvtepi32_ps(e)};
}
// 2^a for integer a in [-126, 127].
inline Vec pow2(Vec a) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(a.v), _mm256_set1_epi32(127)), 23))};
}
inline float sum(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}
inline float largest(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}

// Transposes: swaps x[i][j] and x[j][i].
inline void transpose(Vec (&x)[kWidth]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int h = 0; h < 2; ++h) {
      u[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0x44);
      u[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + 2 + h], 0xee);
    }
  }
  for (int c = 0; c < 4; ++c) {
    x[c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x20);
    x[4 + c].v = _mm256_permute2f128_ps(u[c], u[4 + c], 0x31);
  }
}

#else

constexpr int kWidth = 4;
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
struct Vec {
  Float4 v;
};

inline Vec set1(float x) { return {Float4{x, x, x, x}}; }
inline Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, 16);
  return a;
}
#if defined(__aarch64__)
inline Vec load(const Bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16))};
}
inline Vec load(const F16* p) {
  return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))))};
}
#endif
template <class T>
inline Vec load(const T* p) {
  return {Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
}
// The first n numbers (0 <= n <= kWidth), zeros after them; nothing beyond is read.
template <class T>
inline Vec load_n(const T* p, int n) {
  T buffer[kWidth] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

inline void store(float* p, Vec a) { std::memcpy(p, &a.v, 16); }
#if defined(__aarch64__)
inline void store(Bf16* p, Vec a) {
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t number = vceqq_f32(a.v, a.v);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16));
}
inline void store(F16* p, Vec a) { vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v))); }
#endif
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < 4; ++i) from_float(a.v[i], p + i);
}
template <class T>
inline void store_n(T* p, Vec a, int n) {
  for (int i = 0; i < n; ++i) from_float(a.v[i], p + i);
}

inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
// a * b + c in one rounding where the machine has it.
#if defined(__aarch64__)
inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vec sqrt(Vec a) { return {vsqrtq_f32(a.v)}; }
inline Vec round_even(Vec a) { return {vrndnq_f32(a.v)}; }
#else
inline Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
inline Vec sqrt(Vec a) { return {Float4{sqrtf(a.v[0]), sqrtf(a.v[1]), sqrtf(a.v[2]), sqrtf(a.v[3])}}; }
// Right for |a| < 2^22: adding and taking away 1.5 * 2^23 leaves the nearest integer.
inline Vec round_even(Vec a) {
  const Vec magic = set1(12582912.0f);
  return (a + magic) - magic;
}
#endif
// The larger of two; b where either is NaN.
inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
inline Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
// Bit i is set where a[i] > b[i], or where a[i] is NaN.
inline uint32_t greater_or_nan(Vec a, Vec b) {
  Int4 le = a.v <= b.v;
  return (le[0] ? 0u : 1u) | (le[1] ? 0u : 2u) | (le[2] ? 0u : 4u) | (le[3] ? 0u : 8u);
}
// x where a equals b, y elsewhere.
inline Vec where_equal(Vec a, Vec b, Vec x, Vec y) { return {a.v == b.v ? x.v : y.v}; }
// x = m * 2^e with m in [sqrt(1/2), sqrt(2)), for positive normal x.
inline Vec exponent(Vec x, Vec* m) {
  Int4 bits;
  std::memcpy(&bits, &x.v, 16);
  const Int4 e = (bits - 0x3f3504f3) >> 23;
  bits -= e << 23;
  std::memcpy(&m->v, &bits, 16);
  return {__builtin_convertvector(e, Float4)};
}
// 2^a for integer a in [-126, 127].
inline Vec pow2(Vec a) {
  Vec r;
  Int4 bits = (__builtin_convertvector(a.v, Int4) + 127) << 23;
  std::memcpy(&r.v, &bits, 16);
  return r;
}
inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float largest(Vec a) {
  float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

// Transposes: swaps x[i][j] and x[j][i].
inline void transpose(Vec (&x)[kWidth]) {
  Vec t[4] = {x[0], x[1], x[2], x[3]};
  for (int i = 0; i < 4; ++i) x[i].v = Float4{t[0].v[i], t[1].v[i], t[2].v[i], t[3].v[i]};
}

#endif

#if !defined(__AVX512F__)
// x[i] where bit i is set, y[i] elsewhere; bits past the last number are ignored.
inline Vec where_bit(uint64_t bits, Vec x, Vec y) {
  float a[kWidth], b[kWidth];
  store(a, x);
  store(b, y);
  for (int i = 0; i < kWidth; ++i) a[i] = ((bits >> i) & 1) != 0 ? a[i] : b[i];
  return load(a);
}
// a * 2^n for integer n in [-252, 254]: in two factors, because 2^n alone leaves the range of normal numbers.
inline Vec times_pow2(Vec a, Vec n) {
  const Vec half = round_even(n * set1(0.5f));
  return a * pow2(half) * pow2(n - half);
}
#endif

inline Vec zero() { return set1(0.0f); }

// e^x to about one unit in the last place; 0 below -104, inf above 88.73, NaN for NaN.
inline Vec exp(Vec x) {
  // max and min return the second operand on NaN, so x is the second.
  x = max(set1(-104.0f), min(set1(89.0f), x));
  Vec n = round_even(x * set1(1.44269504088896341f));
  // ln 2 in two parts: n times the first is exact.
  Vec r = fma(n, set1(-0.693145751953125f), x);
  r = fma(n, set1(-1.42860682030941723e-6f), r);
  Vec p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = fma(p, r * r, r) + set1(1.0f);
  return times_pow2(p, n);
}

// tanh x to about two units in the last place; NaN for NaN.
inline Vec tanh(Vec x) {
  const Vec size = max(x, zero() - x), s = size * size, one = set1(1.0f), limit = set1(0.75f);
  // Up to 3/4 a convergent of the continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))); beyond it (1 - e) / (1 + e)
  // with e = e^(-2x), which loses digits near 0.
  const Vec e = exp(size * set1(-2.0f)), top = max(size, limit);
  const Vec p = size * fma(s, s + set1(105.0f), set1(945.0f));
  const Vec q = fma(s, fma(s, set1(15.0f), set1(420.0f)), set1(945.0f));
  const Vec t = where_equal(top, limit, p, one - e) / where_equal(top, limit, q, one + e);
  return where_equal(size, x, t, zero() - t);
}

// ln x to about one unit in the last place, for positive normal x (zero, infinity and NaN are not handled).
inline Vec log(Vec x) {
  Vec m;
  const Vec e = exponent(x, &m), f = m - set1(1.0f), square = f * f;
  Vec p = set1(7.0376836292e-2f);
  p = fma(p, f, set1(-1.1514610310e-1f));
  p = fma(p, f, set1(1.1676998740e-1f));
  p = fma(p, f, set1(-1.2420140846e-1f));
  p = fma(p, f, set1(1.4249322787e-1f));
  p = fma(p, f, set1(-1.6668057665e-1f));
  p = fma(p, f, set1(2.0000714765e-1f));
  p = fma(p, f, set1(-2.4999993993e-1f));
  p = fma(p, f, set1(3.3333331174e-1f));
  p = fma(p * f, square, e * set1(-2.12194440e-4f));
  p = fma(square, set1(-0.5f), p);
  return fma(e, set1(0.693359375f), f + p);
}

}  // namespace RGTG_ISA
}  // namespace rgtg
