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

// Bytes of w that stay in the second-level cache while the tiles of many rows pass over them.
constexpr int64_t kBlockBytes = 256 << 10;
// How far ahead w is prefetched when one tile holds all rows: enough to cover the memory's latency at full bandwidth.
constexpr int64_t kAheadBytes = 8 << 10;
constexpr int64_t kLine = 64;

// ---- the inner loops' operands --------------------------------------------------------------------------------------

// Tiles have up to kTall rows of x by 4 rows of w, or up to kFlat by 2, as the registers allow.
template <int Tall, int Flat>
struct TileSizes {
  static constexpr int kTall = Tall, kFlat = Flat;
  // The fewest rows of a tile where several share the rows of x evenly.
  static constexpr int kLeast = (Flat + 1) / ((Flat + Tall) / Tall);
};

#if defined(__AVX512F__)
struct Fp32 : TileSizes<6, 12> {
#else
struct Fp32 : TileSizes<3, 3> {
#endif
  using Element = float;
  using Operand = Vec;
  static constexpr int kLanes = kWidth;
  static Operand get(const float* p) { return load(p); }
  static Operand get_n(const float* p, int n) { return load_n(p, n); }
  static Vec dot(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
};

#if defined(__AVX512BF16__)

struct Bfloat : TileSizes<6, 12> {
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
#if defined(__AVX512F__)
struct Bfloat : TileSizes<4, 4> {
#else
struct Bfloat : TileSizes<2, 2> {
#endif
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

typedef float Four __attribute__((vector_size(16)));

inline Four sums_of(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
  return (Four)_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
#else
  return Four{sum(a), sum(b), sum(c), sum(d)};
#endif
}

// ---- R rows of x against a run of w's rows --------------------------------------------------------------------------

struct Sweep {
  const Linear* p;
  int64_t row;          // the first of the R rows of x
  int64_t begin, end;   // rows of w
  const char* ahead;    // memory to prefetch, laid out like the rows of w from `begin` on
};

// Writes y[row : row + R, begin : end], C columns at a time, and prefetches Ahead lines at every step along k.
template <class T, int R, int C, int Ahead>
void sweep(const Sweep& s) {
  using Element = typename T::Element;
  static_assert(C == 4 || C == 2, "sums are stored in fours");
  const int64_t inner = s.p->inner, ldy = s.p->ldy;
  const Element* const x = static_cast<const Element*>(s.p->x) + s.row * s.p->ldx;
  const Element* x_row[R];
  for (int r = 0; r < R; ++r) x_row[r] = x + r * s.p->ldx;
  const float* const bias = s.p->bias;
  for (int64_t n = s.begin; n < s.end; n += C) {
    const int wide = static_cast<int>(s.end - n < C ? s.end - n : C);
    const Element* const w = static_cast<const Element*>(s.p->w) + n * inner;
    const char* ahead = s.ahead + (n - s.begin) * inner * static_cast<int64_t>(sizeof(Element));
    // The last columns of a run may be fewer: one is computed again in the place of each that is missing.
    const Element* w_row[C];
    for (int c = 0; c < C; ++c) w_row[c] = w + (c < wide ? c : wide - 1) * inner;
    Vec acc[R * C];
#pragma GCC unroll 32
    for (int i = 0; i < R * C; ++i) acc[i] = zero();
    int64_t k = 0;
    for (; k + T::kLanes <= inner; k += T::kLanes) {
      if (Ahead > 0) {
#pragma GCC unroll 4
        for (int i = 0; i < Ahead; ++i) __builtin_prefetch(ahead + i * kLine, 0, 3);
        ahead += Ahead * kLine;
      }
      typename T::Operand w_now[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) w_now[c] = T::get(w_row[c] + k);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const typename T::Operand x_now = T::get(x_row[r] + k);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r * C + c] = T::dot(acc[r * C + c], x_now, w_now[c]);
      }
    }
    if (k < inner) {
      const int rest = static_cast<int>(inner - k);
      typename T::Operand w_now[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) w_now[c] = T::get_n(w_row[c] + k, rest);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const typename T::Operand x_now = T::get_n(x_row[r] + k, rest);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) acc[r * C + c] = T::dot(acc[r * C + c], x_now, w_now[c]);
      }
    }
    float* y = s.p->y + s.row * ldy + n;
    constexpr int kRowsOfFour = 4 / C;
#pragma GCC unroll 12
    for (int r = 0; r < R; r += kRowsOfFour) {
      const int i = r * C, last = R * C - 1;
      const Four four = sums_of(acc[i], acc[i + 1], acc[i + 2 < last ? i + 2 : last], acc[i + 3 < last ? i + 3 : last]);
      if (C == 4 && wide == 4) {
        Four out = four;
        if (bias != nullptr) {
          Four b;
          std::memcpy(&b, bias + n, sizeof b);
          out += b;
        }
        if (s.p->accumulate) {
          Four old;
          std::memcpy(&old, y + r * ldy, sizeof old);
          out += old;
        }
        std::memcpy(y + r * ldy, &out, sizeof out);
        continue;
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        if (r + j / C >= R || j % C >= wide) continue;
        float* out = y + (r + j / C) * ldy + j % C;
        const float value = four[j] + (bias != nullptr ? bias[n + j % C] : 0.0f);
        *out = s.p->accumulate ? value + *out : value;
      }
    }
  }
}

using SweepFn = void (*)(const Sweep&);

template <class T, int R, int C>
SweepFn one_tile(int rows) {
  if (rows == R) return &sweep<T, R, C, C>;
  if constexpr (R > 1) return one_tile<T, R - 1, (R - 1 > T::kTall ? 2 : 4)>(rows);
  return nullptr;
}

template <class T, int R>
SweepFn many_tiles(int rows, int ahead) {
  if (rows == R) return ahead == 0 ? &sweep<T, R, 4, 0> : ahead == 1 ? &sweep<T, R, 4, 1> : &sweep<T, R, 4, 2>;
  if constexpr (R > T::kLeast) return many_tiles<T, R - 1>(rows, ahead);
  return nullptr;
}

// ---- all of y[:, begin:end] -----------------------------------------------------------------------------------------

template <class T>
void run(const Linear& p, int64_t begin, int64_t end, Upcoming upcoming) {
  if (begin >= end || p.rows == 0) return;
  const int64_t row_bytes = p.inner * static_cast<int64_t>(sizeof(typename T::Element));
  const char* const w = static_cast<const char*>(p.w);
  const char* const after = static_cast<const char*>(upcoming.data);

  if (p.rows <= T::kFlat) {
    const SweepFn fn = one_tile<T, T::kFlat, (T::kFlat > T::kTall ? 2 : 4)>(static_cast<int>(p.rows));
    const int64_t unit = 4, distance = (kAheadBytes / row_bytes / unit + 1) * unit;
    const int64_t turn = (end - begin) / unit * unit > distance ? end - distance - (end - begin) % unit : begin;
    fn({&p, 0, begin, turn, w + (begin + distance) * row_bytes});
    fn({&p, 0, turn, end, after != nullptr ? after : w + turn * row_bytes});
    return;
  }

  const int64_t tiles = (p.rows + T::kTall - 1) / T::kTall;
  // The first tiles share the lines of the next block.
  const int ahead = tiles >= 4 ? 1 : 2, sharing = 4 / ahead;
  const int64_t share_bytes = ahead * (p.inner / T::kLanes) * kLine;
  const int64_t block = kBlockBytes / row_bytes / 4 > 0 ? kBlockBytes / row_bytes / 4 * 4 : 4;
  for (int64_t n = begin; n < end; n += block) {
    const int64_t stop = n + block < end ? n + block : end;
    const char* const next = stop < end ? w + stop * row_bytes : after;
    for (int64_t t = 0; t < tiles; ++t) {
      const Range rows = share(p.rows, static_cast<int>(t), static_cast<int>(tiles));
      const bool prefetches = t < sharing && next != nullptr;
      const SweepFn fn = many_tiles<T, T::kTall>(static_cast<int>(rows.end - rows.begin), prefetches ? ahead : 0);
      fn({&p, rows.begin, n, stop, prefetches ? next + t * share_bytes : nullptr});
    }
  }
}

}  // namespace

void linear(const Linear& p, int64_t begin, int64_t end, Upcoming upcoming) {
  if (p.dtype == kFloat32) {
    run<Fp32>(p, begin, end, upcoming);
  } else {
    run<Bfloat>(p, begin, end, upcoming);
  }
}

}  // namespace RGTG_ISA
}  // namespace rgtg
