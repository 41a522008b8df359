// Products of a block of keys in register tiles: scores of query rows, and sums of weighted values.
#pragma once

#include "tree_attention.hpp"
#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

using attention::kBlock;

// A tile of scores in registers: kTile query rows by kVecs vectors of keys; the same for sums of values.
constexpr int kTile = 6;
#if defined(__AVX512F__)
constexpr int kVecs = 4;
#else
constexpr int kVecs = 2;
#endif
constexpr int kTileKeys = kVecs * kWidth;
constexpr float kInf = __builtin_inff();

// How queries and keys of type T are multiplied. Default: as floats.
template <class T>
struct Product {
  using Unit = T;
  static int64_t units(int64_t D) { return D; }
  static Vec load_units(const T* p, int n) { return n >= kWidth ? load(p) : load_n(p, n); }
  static Vec unit(const float* q) { return set1(*q); }
  static Vec add(Vec q, Vec k, Vec acc) { return fma(q, k, acc); }
};

#if defined(__AVX512BF16__)
// Two neighbouring numbers at once; a pair travels through registers as one float.
struct Pair {
  Bf16 x[2];
};
struct PairProduct {
  using Unit = Pair;
  static int64_t units(int64_t D) { return D / 2; }
  static Vec load_units(const Pair* p, int n) {
    const float* bits = reinterpret_cast<const float*>(p);
    return n >= kWidth ? load(bits) : load_n(bits, n);
  }
  static Vec unit(const float* q) { return set1(*q); }
  static Vec add(Vec q, Vec k, Vec acc) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)q.v, (__m512bh)k.v)}; }
};
#endif

// keys[tile][unit][key of the tile] = k[key][unit], zeros past n.
template <class T, class P>
void pack_keys(const T* k, int64_t stride, int64_t n, int64_t units, float* keys) {
  for (int64_t t0 = 0; t0 < n; t0 += kWidth) {
    const int64_t rows = n - t0 < kWidth ? n - t0 : kWidth;
    float* out = keys + t0 / kTileKeys * units * kTileKeys + t0 % kTileKeys;
    for (int64_t d0 = 0; d0 < units; d0 += kWidth) {
      const int64_t columns = units - d0 < kWidth ? units - d0 : kWidth;
      Vec x[kWidth];
      for (int i = 0; i < kWidth; ++i) {
        const auto* row = reinterpret_cast<const typename P::Unit*>(k + (t0 + i) * stride);
        x[i] = i < rows ? P::load_units(row + d0, static_cast<int>(columns)) : zero();
      }
      transpose(x);
      for (int i = 0; i < columns; ++i) store(out + (d0 + i) * kTileKeys, x[i]);
    }
  }
  // The rest of the last tile is multiplied too.
  for (int64_t t0 = (n + kWidth - 1) / kWidth * kWidth; t0 % kTileKeys != 0; t0 += kWidth) {
    float* out = keys + t0 / kTileKeys * units * kTileKeys + t0 % kTileKeys;
    for (int64_t d = 0; d < units; ++d) store(out + d * kTileKeys, zero());
  }
}

// scores[r][key] = scale * q[r] . key, for R query rows and one tile of keys.
template <class P, int R>
void tile_scores(const float* q, int64_t q_stride, const float* keys, int64_t units, float scale, float* scores) {
  Vec acc[R][kVecs];
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kVecs; ++j) acc[r][j] = zero();
  }
  for (int64_t d = 0; d < units; ++d) {
    Vec k[kVecs];
    for (int j = 0; j < kVecs; ++j) k[j] = load(keys + d * kTileKeys + j * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x = P::unit(q + r * q_stride + d);
#pragma GCC unroll 4
      for (int j = 0; j < kVecs; ++j) acc[r][j] = P::add(x, k[j], acc[r][j]);
    }
  }
  const Vec factor = set1(scale);
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < kVecs; ++j) store(scores + r * kBlock + j * kWidth, acc[r][j] * factor);
  }
}

// out[r] = out[r] * factor[r] + sum over keys of weights[r][key] * values[key], for R query rows and V vectors.
template <int R, int V>
void tile_sums(const float* weights, const float* values, int64_t stride, int64_t n, const float* factor, float* out,
               int64_t out_stride) {
  Vec acc[R][V];
  for (int r = 0; r < R; ++r) {
    const Vec f = set1(factor[r]);
    for (int j = 0; j < V; ++j) acc[r][j] = load(out + r * out_stride + j * kWidth) * f;
  }
  for (int64_t t = 0; t < n; ++t) {
    Vec v[V];
    for (int j = 0; j < V; ++j) v[j] = load(values + t * stride + j * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec w = set1(weights[r * kBlock + t]);
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[r][j] = fma(w, v[j], acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int j = 0; j < V; ++j) store(out + r * out_stride + j * kWidth, acc[r][j]);
  }
}

template <class P>
void score_rows(int64_t rows, const float* q, int64_t q_stride, const float* keys, int64_t units, float scale,
                float* scores) {
  switch (rows) {
    case 1: return tile_scores<P, 1>(q, q_stride, keys, units, scale, scores);
    case 2: return tile_scores<P, 2>(q, q_stride, keys, units, scale, scores);
    case 3: return tile_scores<P, 3>(q, q_stride, keys, units, scale, scores);
    case 4: return tile_scores<P, 4>(q, q_stride, keys, units, scale, scores);
    case 5: return tile_scores<P, 5>(q, q_stride, keys, units, scale, scores);
    default: return tile_scores<P, 6>(q, q_stride, keys, units, scale, scores);
  }
}

template <int V>
void sum_rows(int64_t rows, const float* weights, const float* values, int64_t stride, int64_t n, const float* factor,
              float* out, int64_t out_stride) {
  switch (rows) {
    case 1: return tile_sums<1, V>(weights, values, stride, n, factor, out, out_stride);
    case 2: return tile_sums<2, V>(weights, values, stride, n, factor, out, out_stride);
    case 3: return tile_sums<3, V>(weights, values, stride, n, factor, out, out_stride);
    case 4: return tile_sums<4, V>(weights, values, stride, n, factor, out, out_stride);
    case 5: return tile_sums<5, V>(weights, values, stride, n, factor, out, out_stride);
    default: return tile_sums<6, V>(weights, values, stride, n, factor, out, out_stride);
  }
}

}  // namespace
}  // namespace RGTG_ISA
}  // namespace rgtg
