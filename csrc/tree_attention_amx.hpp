// Bfloat16 attention on AMX tiles, for groups of 16 query rows. Scores are computed as K Q^T, so that keys are read where
// they lie and the softmax of a query row runs down one lane of the vectors.
// A score sums pairs of D in the order of D, a sum of values pairs of keys in the order of keys, whatever the number of
// rows; subnormal numbers count as zero there. Weights are rounded to bfloat16 for the product with the values; their sum
// is of the unrounded ones.
#pragma once

#include "amx.hpp"
#include "tree_attention.hpp"
#include "vec.hpp"

#if defined(__AMX_BF16__)

namespace rgtg {
namespace RGTG_ISA {
namespace {

// Marks the item whose products run on tiles.
struct AmxProduct {
  static int64_t units(int64_t D) { return D / 2; }
};

constexpr int64_t kLanes = 16;  // query rows of a group; rows of a tile, of 16 floats or 32 numbers of bfloat16
constexpr int64_t kRowNumbers = 32;
// Takes the first 16 numbers of two vectors in turn.
alignas(64) constexpr uint16_t kInterleaved[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

inline int64_t amx_steps(int64_t D) { return (D + kRowNumbers - 1) / kRowNumbers; }
// Bytes of one group's packed queries.
inline int64_t amx_query_bytes(int64_t D) { return amx_steps(D) * kTileBytes; }

// 32 numbers of bfloat16 as a vector, zeros past n.
inline Vec amx_row(const Bf16* p, int64_t n) {
  const __mmask32 kept = n >= kRowNumbers ? 0xffffffffu : n > 0 ? (1u << n) - 1 : 0;
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(kept, p))};
}

// Writes a query, or zeros for none, as row `lane` of its group's tiles, which amx_turn() then turns around.
inline void amx_put_query(const Bf16* q, int64_t D, int64_t lane, char* group) {
  for (int64_t s = 0; s < amx_steps(D); ++s) {
    store(reinterpret_cast<float*>(group + s * kTileBytes) + lane * kLanes,
          q == nullptr ? zero() : amx_row(q + s * kRowNumbers, D - s * kRowNumbers));
  }
}

// A 16 x 16 matrix of floats or pairs, turned around in place.
inline void amx_turn(char* tile) {
  float* p = reinterpret_cast<float*>(tile);
  Vec x[kWidth];
  for (int i = 0; i < kWidth; ++i) x[i] = load(p + i * kWidth);
  transpose(x);
  for (int i = 0; i < kWidth; ++i) store(p + i * kWidth, x[i]);
}

// Keys of a block as tiles read them, rows of *stride numbers: in place where whole tiles lie there, else copied and filled
// with zeros.
inline const Bf16* amx_keys(const Bf16* k, int64_t* stride, int64_t n, int64_t D, Bf16* memory) {
  if (n % kLanes == 0 && D % kRowNumbers == 0) return k;
  const int64_t width = amx_steps(D) * kRowNumbers;
  for (int64_t t = 0; t < (n + kLanes - 1) / kLanes * kLanes; ++t) {
    for (int64_t d = 0; d < width; d += kRowNumbers) {
      const Vec x = t < n ? amx_row(k + t * *stride + d, D - d) : zero();
      store(reinterpret_cast<float*>(memory + t * width + d), x);
    }
  }
  *stride = width;
  return memory;
}

// Values of a block as tiles [16 pairs of keys][16 of D], zeros past n and D: tile (d / 16) * 2 + t / 32 of `out`.
inline void amx_values(const Bf16* v, int64_t stride, int64_t n, int64_t D, char* out) {
  const __m512i lower = _mm512_load_si512(kInterleaved), upper = _mm512_add_epi16(lower, _mm512_set1_epi16(16));
  for (int64_t d = 0; d < D; d += kRowNumbers, out += 4 * kTileBytes) {
    for (int64_t t = 0; t < (n + kRowNumbers - 1) / kRowNumbers * kRowNumbers; t += 2) {
      const Bf16* row = v + t * stride + d;
      const __m512i even = t < n ? _mm512_castps_si512(amx_row(row, D - d).v) : _mm512_setzero_si512();
      const __m512i odd = t + 1 < n ? _mm512_castps_si512(amx_row(row + stride, D - d).v) : _mm512_setzero_si512();
      char* const at = out + t / kRowNumbers * kTileBytes + t % kRowNumbers * 32;
      _mm512_store_si512(at, _mm512_permutex2var_epi16(even, lower, odd));
      if (D - d > kLanes) _mm512_store_si512(at + 2 * kTileBytes, _mm512_permutex2var_epi16(even, upper, odd));
    }
  }
}

// scores[key][lane] of a group, before the scale, for n keys rounded up to whole tiles.
inline void amx_scores(const Bf16* keys, int64_t stride, int64_t n, const char* q, int64_t steps, float* scores) {
  const int64_t bytes = stride * 2, down = kLanes * stride;
  int64_t t = 0;
  for (; t + 48 < n; t += 64) {
    const Bf16* row = keys + t * stride;
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t s = 0; s < steps; ++s, row += kRowNumbers) {
      tile_load<4>(q + s * kTileBytes, 64);
      tile_load<5>(row, bytes);
      tile_multiply<0, 5, 4>();
      tile_load<6>(row + down, bytes);
      tile_multiply<1, 6, 4>();
      tile_load<5>(row + 2 * down, bytes);
      tile_multiply<2, 5, 4>();
      tile_load<6>(row + 3 * down, bytes);
      tile_multiply<3, 6, 4>();
    }
    float* out = scores + t * kLanes;
    tile_store<0>(out, 64);
    tile_store<1>(out + kLanes * kLanes, 64);
    tile_store<2>(out + 2 * kLanes * kLanes, 64);
    tile_store<3>(out + 3 * kLanes * kLanes, 64);
  }
  for (; t < n; t += kLanes) {
    const Bf16* row = keys + t * stride;
    tile_zero<0>();
    for (int64_t s = 0; s < steps; ++s) {
      tile_load<4>(q + s * kTileBytes, 64);
      tile_load<5>(row + s * kRowNumbers, bytes);
      tile_multiply<0, 5, 4>();
    }
    tile_store<0>(scores + t * kLanes, 64);
  }
}

// 2^x with a relative error of 3e-6, for weights that are rounded to 8 bits; 0 for -inf, NaN for NaN.
inline Vec amx_exp2(Vec x) {
  // The fraction above the integer below x, which scalef takes as the exponent.
  const Vec r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
  Vec p = fma(r, set1(0.0134268049f), set1(0.0522422791f));
  p = fma(p, r, set1(0.241280302f));
  p = fma(p, r, set1(0.693044841f));
  p = fma(p, r, set1(1.0f));
  return {_mm512_scalef_ps(p.v, x.v)};
}

// Scores x [keys][lane] before the maximum m, which is of the scores that are seen: bit t of seen[lane], or all.
inline Vec amx_maximum(float* x, int64_t keys, float scale, float softcap, const uint64_t* seen) {
  const Vec factor = set1(scale), none = set1(-__builtin_inff());
  Vec top[4] = {none, none, none, none};
  if (seen == nullptr && softcap <= 0) {
    for (int64_t t = 0; t < keys; t += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const Vec score = load(x + (t + i) * kLanes) * factor;
        store(x + (t + i) * kLanes, score);
        top[i] = max(top[i], score);
      }
    }
    return max(max(top[0], top[1]), max(top[2], top[3]));
  }
  __m512i low = _mm512_set1_epi32(-1), high = low;
  if (seen != nullptr) {
    alignas(64) uint32_t halves[2][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      halves[0][i] = static_cast<uint32_t>(seen[i]);
      halves[1][i] = static_cast<uint32_t>(seen[i] >> 32);
    }
    low = _mm512_load_si512(halves[0]);
    high = _mm512_load_si512(halves[1]);
  }
  for (int64_t t = 0; t < keys; ++t) {
    Vec score = load(x + t * kLanes) * factor;
    if (softcap > 0) score = tanh(score / set1(softcap)) * set1(softcap);
    const __m512i bit = _mm512_set1_epi32(static_cast<int>(1u << (t & 31)));
    score = {_mm512_mask_mov_ps(none.v, _mm512_test_epi32_mask(t < 32 ? low : high, bit), score.v)};
    store(x + t * kLanes, score);
    top[0] = max(top[0], score);
  }
  return top[0];
}

// e^(x - base) [keys][lane] as tiles of bfloat16 [lane][32 keys], zeros past `keys`; returns their sum. The order of its
// additions is the same for any number of keys, as zeros change nothing.
inline Vec amx_weights(const float* x, int64_t keys, Vec base, char* out) {
  const __m512i interleaved = _mm512_load_si512(kInterleaved);
  const Vec log2e = set1(1.44269504088896341f);
  Vec l[4] = {zero(), zero(), zero(), zero()};
  int64_t t = 0;
  for (; t < keys; t += 4) {
    Vec w[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      w[i] = amx_exp2((load(x + (t + i) * kLanes) - base) * log2e);
      l[i] = l[i] + w[i];
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
      const __m512i a = _mm512_castsi256_si512(round_bf16(w[i])), b = _mm512_castsi256_si512(round_bf16(w[i + 1]));
      _mm512_store_si512(out + (t + i) * kLanes * 2, _mm512_permutex2var_epi16(a, interleaved, b));
    }
  }
  for (; t % kRowNumbers != 0; t += 2) _mm512_store_si512(out + t * kLanes * 2, _mm512_setzero_si512());
  for (int64_t s = 0; s < t; s += kRowNumbers) amx_turn(out + s / kRowNumbers * kTileBytes);
  return (l[0] + l[1]) + (l[2] + l[3]);
}

// acc[lane][d] += sum over keys of weights[lane][key] * values[key][d], for D in tiles of 16 and keys in steps of 32.
inline void amx_sums(const char* weights, const char* values, int64_t steps, int64_t tiles, float* acc) {
  constexpr int64_t kNext = 2 * kTileBytes;
  const int64_t bytes = tiles * 64;
  int64_t j = 0;
  for (; j + 4 <= tiles; j += 4, values += 4 * kNext, acc += 4 * kLanes) {
    tile_load<0>(acc, bytes);
    tile_load<1>(acc + kLanes, bytes);
    tile_load<2>(acc + 2 * kLanes, bytes);
    tile_load<3>(acc + 3 * kLanes, bytes);
    for (int64_t s = 0; s < steps; ++s) {
      const char* v = values + s * kTileBytes;
      tile_load<4>(weights + s * kTileBytes, 64);
      tile_load<5>(v, 64);
      tile_multiply<0, 4, 5>();
      tile_load<6>(v + kNext, 64);
      tile_multiply<1, 4, 6>();
      tile_load<5>(v + 2 * kNext, 64);
      tile_multiply<2, 4, 5>();
      tile_load<6>(v + 3 * kNext, 64);
      tile_multiply<3, 4, 6>();
    }
    tile_store<0>(acc, bytes);
    tile_store<1>(acc + kLanes, bytes);
    tile_store<2>(acc + 2 * kLanes, bytes);
    tile_store<3>(acc + 3 * kLanes, bytes);
  }
  for (; j < tiles; ++j, values += kNext, acc += kLanes) {
    tile_load<0>(acc, bytes);
    for (int64_t s = 0; s < steps; ++s) {
      tile_load<4>(weights + s * kTileBytes, 64);
      tile_load<5>(values + s * kTileBytes, 64);
      tile_multiply<0, 4, 5>();
    }
    tile_store<0>(acc, bytes);
  }
}

// Adds a block of keys to a group's maxima m, sums l and acc [lane][width]: scores [keys][lane], `weights` is memory for two
// tiles.
inline void amx_add(float* scores, int64_t keys, float scale, float softcap, const uint64_t* seen, const char* values,
                    char* weights, int64_t width, float* m, float* l, float* acc) {
  const Vec old = load(m), none = set1(-__builtin_inff());
  const Vec top = max(old, amx_maximum(scores, keys, scale, softcap, seen));
  // Nothing visible yet: any finite number will do, every weight is 0.
  const Vec base = where_equal(top, none, zero(), top);
  const Vec sum = amx_weights(scores, keys, base, weights), one = set1(1.0f);
  const Vec factor = where_equal(old, top, one, exp(old - top));
  store(m, top);
  store(l, fma(load(l), factor, sum));
  if (greater_or_nan(one, factor) != 0) {
    float factors[kLanes];
    store(factors, factor);
    for (int64_t i = 0; i < kLanes; ++i) {
      const Vec f = set1(factors[i]);
      for (int64_t d = 0; d < width; d += kWidth) store(acc + i * width + d, load(acc + i * width + d) * f);
    }
  }
  amx_sums(weights, values, (keys + kRowNumbers - 1) / kRowNumbers, width / kLanes, acc);
}

}  // namespace
}  // namespace RGTG_ISA
}  // namespace rgtg

#endif
