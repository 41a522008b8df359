// y = x w^T for few rows (bound by reading w) and for many (bound by multiply-adds), without repacking w.
//
// A tile of R rows of x and C rows of w keeps R * C vector accumulators and walks along k; each y[m, n] has one
// accumulator, whose lanes are added in one fixed tree at the end. That order is the same in tiles of every size, hence
// the bit-exact independence of the batch and of the threads. Where few rows make the product bound by memory, every
// step also prefetches the rows of w that the following tiles need: without it two cores leave a fifth of the
// bandwidth unused.
#include "linear.hpp"
#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

// Tiles: up to kTall rows of x by 4 rows of w, up to kFlat rows of x by 2 rows of w, as the registers allow.
#if defined(__AVX512BF16__)
constexpr int kTall[] = {6, 6}, kFlat[] = {12, 12};
#elif defined(__AVX512F__)
constexpr int kTall[] = {6, 4}, kFlat[] = {12, 4};
#else
constexpr int kTall[] = {3, 2}, kFlat[] = {3, 2};
#endif
// Bytes of w that stay in the second-level cache while the tiles of many rows pass over them.
constexpr int64_t kBlockBytes = 256 << 10;
// How far ahead w is prefetched when one tile holds all rows: enough to cover the memory's latency at full bandwidth.
constexpr int64_t kAheadBytes = 8 << 10;
constexpr int64_t kLine = 64;

// ---- the inner loops' operands --------------------------------------------------------------------------------------

struct Fp32 {
  using Element = float;
  using Operand = Vec;
  static constexpr int kLanes = kWidth;
  static Operand get(const float* p) { return load(p); }
  static Operand get_n(const float* p, int n) { return load_n(p, n); }
  static Vec dot(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)

struct Bfloat {
  using Element = Bf16;
  using Operand = __m512bh;
  static constexpr int kLanes = 32;
  static Operand get(const Bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand get_n(const Bf16* p, int n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(n < 32 ? (1u << n) - 1 : 0xffffffffu, p);
  }
  static Vec dot(Vec acc, Operand a, Operand b) { return {_mm512_dpbf16_ps(acc.v, a, b)}; }
};

#else

// Pairs of bf16 widened to fp32 and added in vdpbf16ps's order, odd first.
struct Bfloat {
  using Element = Bf16;
  struct Operand {
    Vec even, odd;
  };
  static constexpr int kLanes = 2 * kWidth;
  static Operand get(const Bf16* p) {
#if defined(__AVX512F__)
    __m512i pair = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(pair, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}};
#elif defined(__AVX2__)
    __m256i pair = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(pair, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(pair, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}};
#else
    uint32_t even[4], odd[4];
    for (int i = 0; i < 4; ++i) {
      even[i] = static_cast<uint32_t>(p[2 * i].bits) << 16;
      odd[i] = static_cast<uint32_t>(p[2 * i + 1].bits) << 16;
    }
    Operand r;
    std::memcpy(&r.even, even, 16);
    std::memcpy(&r.odd, odd, 16);
    return r;
#endif
  }
  static Operand get_n(const Bf16* p, int n) {
    Bf16 room[kLanes] = {};
    std::memcpy(room, p, n * sizeof(Bf16));
    return get(room);
  }
  static Vec dot(Vec acc, const Operand& a, const Operand& b) {
    return fma(a.even, b.even, fma(a.odd, b.odd, acc));
  }
};

#endif

// ---- sums of four vectors' lanes, every vector in the same order ----------------------------------------------------

inline void store_sums(float* out, Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
  out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

inline void prefetch(const char* p) { __builtin_prefetch(p, 0, 3); }

// ---- one tile -------------------------------------------------------------------------------------------------------

// What one call of a tile prefetches: `lines` cache lines at every step along k, from `from` onwards.
struct Prefetch {
  const char* from;
  int lines;
};

// sums[R][C] of rows x, x + ldx, ... and the C rows of w that start at w[0..C).
template <class T, int R, int C>
void tile(const typename T::Element* x, int64_t ldx, const typename T::Element* const* w, int64_t inner,
          float* sums, Prefetch ahead) {
  using Element = typename T::Element;
  const Element* w_row[C];
  for (int c = 0; c < C; ++c) w_row[c] = w[c];
  Vec acc[R * C];
  for (int i = 0; i < R * C; ++i) acc[i] = zero();
  int64_t k = 0;
  for (; k + T::kLanes <= inner; k += T::kLanes) {
    for (int i = 0; i < ahead.lines; ++i) prefetch(ahead.from + i * kLine);
    ahead.from += ahead.lines * kLine;
    typename T::Operand w_now[C];
    for (int c = 0; c < C; ++c) w_now[c] = T::get(w_row[c] + k);
    for (int r = 0; r < R; ++r) {
      typename T::Operand x_now = T::get(x + r * ldx + k);
      for (int c = 0; c < C; ++c) acc[r * C + c] = T::dot(acc[r * C + c], x_now, w_now[c]);
    }
  }
  if (k < inner) {
    const int rest = static_cast<int>(inner - k);
    typename T::Operand w_now[C];
    for (int c = 0; c < C; ++c) w_now[c] = T::get_n(w_row[c] + k, rest);
    for (int r = 0; r < R; ++r) {
      typename T::Operand x_now = T::get_n(x + r * ldx + k, rest);
      for (int c = 0; c < C; ++c) acc[r * C + c] = T::dot(acc[r * C + c], x_now, w_now[c]);
    }
  }
  // The last group of four may lack vectors: any one fills the place, and `sums` has room for what it gives.
  for (int i = 0; i < R * C; i += 4) {
    store_sums(sums + i, acc[i], acc[i + 1 < R * C ? i + 1 : i], acc[i + 2 < R * C ? i + 2 : i],
               acc[i + 3 < R * C ? i + 3 : i]);
  }
}

template <class T>
using TileFn = void (*)(const typename T::Element*, int64_t, const typename T::Element* const*, int64_t, float*,
                        Prefetch);

template <class T, int Flat>
struct Tiles;
template <class T>
struct Tiles<T, 12> {
  static TileFn<T> of(int rows) {
    static constexpr TileFn<T> fns[] = {tile<T, 1, 4>, tile<T, 2, 4>,  tile<T, 3, 4>,  tile<T, 4, 4>,
                                        tile<T, 5, 4>, tile<T, 6, 4>,  tile<T, 7, 2>,  tile<T, 8, 2>,
                                        tile<T, 9, 2>, tile<T, 10, 2>, tile<T, 11, 2>, tile<T, 12, 2>};
    return fns[rows - 1];
  }
};
template <class T>
struct Tiles<T, 4> {
  static TileFn<T> of(int rows) {
    static constexpr TileFn<T> fns[] = {tile<T, 1, 4>, tile<T, 2, 4>, tile<T, 3, 4>, tile<T, 4, 4>};
    return fns[rows - 1];
  }
};
template <class T>
struct Tiles<T, 3> {
  static TileFn<T> of(int rows) {
    static constexpr TileFn<T> fns[] = {tile<T, 1, 4>, tile<T, 2, 4>, tile<T, 3, 4>};
    return fns[rows - 1];
  }
};
template <class T>
struct Tiles<T, 2> {
  static TileFn<T> of(int rows) {
    static constexpr TileFn<T> fns[] = {tile<T, 1, 4>, tile<T, 2, 4>};
    return fns[rows - 1];
  }
};

// ---- all tiles of y[:, begin:end] -----------------------------------------------------------------------------------

template <class T, int Which>
void run(const Linear& p, int64_t begin, int64_t end, Upcoming upcoming) {
  using Element = typename T::Element;
  if (begin >= end || p.rows == 0) return;
  const Element* x = static_cast<const Element*>(p.x);
  const Element* w = static_cast<const Element*>(p.w);
  const bool one_tile = p.rows <= kFlat[Which];
  const int64_t x_tiles = one_tile ? 1 : (p.rows + kTall[Which] - 1) / kTall[Which];
  const int columns = one_tile && p.rows > kTall[Which] ? 2 : 4;
  const int64_t panel_bytes = columns * p.inner * static_cast<int64_t>(sizeof(Element));
  const int64_t panels = (end - begin + columns - 1) / columns;
  const int64_t steps = p.inner / T::kLanes;
  const int64_t block = one_tile ? panels : kBlockBytes / panel_bytes > 0 ? kBlockBytes / panel_bytes : 1;
  const int64_t ahead = one_tile ? (kAheadBytes + panel_bytes - 1) / panel_bytes : block;
  alignas(64) float sums[kFlat[Which] * 4 + 4];

  for (int64_t first = 0; first < panels; first += block) {
    const int64_t last = first + block < panels ? first + block : panels;
    for (int64_t t = 0; t < x_tiles; ++t) {
      const Range rows = share(p.rows, static_cast<int>(t), static_cast<int>(x_tiles));
      const int count = static_cast<int>(rows.end - rows.begin);
      const TileFn<T> fn = Tiles<T, kFlat[Which]>::of(count);
      // The first x_tiles passes share the lines that the panel `ahead` has.
      const int lines = t >= columns ? 0 : static_cast<int>((columns + x_tiles - 1) / x_tiles);
      for (int64_t panel = first; panel < last; ++panel) {
        const int64_t n = begin + panel * columns;
        const Element* w_rows[4];
        for (int c = 0; c < 4; ++c) w_rows[c] = w + (n + c < end ? n + c : end - 1) * p.inner;
        Prefetch next{nullptr, 0};
        if (lines > 0) {
          const char* from;
          if (panel + ahead < panels) {
            from = reinterpret_cast<const char*>(w + (n + ahead * columns) * p.inner);
          } else {
            const int64_t offset = (panel + ahead - panels) * panel_bytes;
            from = offset < upcoming.bytes ? static_cast<const char*>(upcoming.data) + offset : nullptr;
          }
          if (from != nullptr) next = {from + t * lines * steps * kLine, lines};
        }
        fn(x + rows.begin * p.ldx, p.ldx, w_rows, p.inner, sums, next);
        const int wide = static_cast<int>(end - n < columns ? end - n : columns);
        for (int r = 0; r < count; ++r) {
          float* y = p.y + (rows.begin + r) * p.ldy + n;
          const float* s = sums + r * columns;
          if (p.accumulate) {
            for (int c = 0; c < wide; ++c) y[c] += s[c] + (p.bias ? p.bias[n + c] : 0.0f);
          } else {
            for (int c = 0; c < wide; ++c) y[c] = s[c] + (p.bias ? p.bias[n + c] : 0.0f);
          }
        }
      }
    }
  }
}

}  // namespace

void linear(const Linear& p, int64_t begin, int64_t end, Upcoming upcoming) {
  if (p.dtype == kFloat32) {
    run<Fp32, 0>(p, begin, end, upcoming);
  } else {
    run<Bfloat, 1>(p, begin, end, upcoming);
  }
}

}  // namespace RGTG_ISA
}  // namespace rgtg
