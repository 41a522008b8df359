// y = x w^T for few rows (bound by reading w) and for many (bound by multiply-adds), without repacking w.
//
// A tile of R rows of x and C rows of w has R * C vector accumulators and loops over k; each y[m, n] has one
// accumulator, whose lanes are added in one fixed tree at the end. That order is the same in tiles of every size, hence
// the bit-exact independence of the batch and of the threads. Where few rows make the product bound by memory, every
// step also prefetches the rows of w that the following tiles need: without it two cores leave a fifth of the
// bandwidth unused.
#include "linear.hpp"
#include "vec.hpp"
#if defined(__AMX_BF16__)
#include "linear_amx.hpp"
#endif

namespace rgtg {
namespace RGTG_ISA {
namespace {

// Bytes of w that stay in the second-level cache while the tiles of many rows read them.
constexpr int64_t kBlockBytes = 256 << 10;
// How far ahead w is prefetched when one tile holds all rows: enough to cover the memory's latency at full bandwidth.
constexpr int64_t kPrefetchBytes = 8 << 10;
// A tile's share of the first-level cache.
constexpr int64_t kStretchBytes = 28 << 10;
constexpr int64_t kPartialFloats = 16 << 10;
// Rows of int8 weights that are widened for many rows of x.
constexpr int64_t kWidenedBytes = 128 << 10;
constexpr int64_t kLine = 64;

// Tiles have up to kTall rows of x by 4 rows of w or up to kFlat by 2, as the registers allow. More than kFlat rows of
// x make several tiles of up to kTall.
template <int Tall, int Flat>
struct TileSizes {
  static constexpr int kTall = Tall, kFlat = Flat;
  // The fewest rows of a tile where several share the rows of x evenly.
  static constexpr int kLeast = (Flat + 1) / ((Flat + Tall) / Tall);
};

#if defined(__AVX512F__) || defined(__aarch64__)
struct Fp32 : TileSizes<6, 12> {
#else
struct Fp32 : TileSizes<3, 3> {
#endif
  using Element = float;
  using Weight = float;
  using Operand = Vec;
  static constexpr int kLanes = kWidth;
  static Operand get(const float* p) {
    Vec x = load(p);
    // Keep it in a register: as a memory operand of the multiply-adds it would be loaded once for each of them.
#if defined(__AVX512F__)
    asm("" : "+v"(x.v));
#elif defined(__AVX2__)
    asm("" : "+x"(x.v));
#endif
    return x;
  }
  static Operand get_n(const float* p, int n) { return load_n(p, n); }
  static Vec dot(Vec acc, Operand a, Operand b) { return fma(a, b, acc); }
};

// With AMX, products of bf16 run on tiles.
#if !defined(__AMX_BF16__)
#if defined(__AVX512BF16__)

struct Bfloat : TileSizes<6, 12> {
  using Element = Bf16;
  using Weight = Bf16;
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
#if defined(__AVX512F__) || defined(__aarch64__)
struct Bfloat : TileSizes<4, 4> {
#else
struct Bfloat : TileSizes<2, 2> {
#endif
  using Element = Bf16;
  using Weight = Bf16;
  typedef uint32_t Words __attribute__((vector_size(16)));
  struct Operand {
    Vec even, odd;
  };
  static constexpr int kLanes = 2 * kWidth;
  // clang-format off
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
    Words pair;
    std::memcpy(&pair, p, sizeof pair);
    const Words even = pair << 16, odd = pair & 0xffff0000u;
    Operand r;
    std::memcpy(&r.even, &even, sizeof even);
    std::memcpy(&r.odd, &odd, sizeof odd);
    return r;
#endif
  }
  // clang-format on
  static Operand get_n(const Bf16* p, int n) {
    Bf16 buffer[kLanes] = {};
    std::memcpy(buffer, p, n * sizeof(Bf16));
    return get(buffer);
  }
  static Vec dot(Vec acc, const Operand& a, const Operand& b) { return fma(a.even, b.even, fma(a.odd, b.odd, acc)); }
};

#endif

// Weights of 8 bits, which bf16 holds exactly: the sums are those of the same numbers as bf16, bit for bit.
struct Int8 : Bfloat {
  using Weight = int8_t;
  using Bfloat::get;
  using Bfloat::get_n;
  // clang-format off
  static Operand get(const int8_t* p) {
#if defined(__AVX512BF16__)
    return _mm512_cvtne2ps_pbh(load(p + 16).v, load(p).v);
#elif defined(__AVX512F__)
    __m512i pair = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {{_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(pair, 16), 16))},
            {_mm512_cvtepi32_ps(_mm512_srai_epi32(pair, 16))}};
#elif defined(__AVX2__)
    __m256i pair = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {{_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(pair, 16), 16))},
            {_mm256_cvtepi32_ps(_mm256_srai_epi32(pair, 16))}};
#else
    float even[4], odd[4];
    for (int i = 0; i < 4; ++i) {
      even[i] = static_cast<float>(p[2 * i]);
      odd[i] = static_cast<float>(p[2 * i + 1]);
    }
    return {load(even), load(odd)};
#endif
  }
  // clang-format on
  static Operand get_n(const int8_t* p, int n) {
    int8_t buffer[kLanes] = {};
    std::memcpy(buffer, p, n);
    return get(buffer);
  }
};

#endif

typedef float Four __attribute__((vector_size(16)));

// The sums of four vectors' lanes, every vector in the same order.
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

// A sweep's prefetching. Near: the lines of w that it needs itself a little later, one of each row at every step along
// k. Otherwise: so many lines at every step of memory that is needed much later.
constexpr int kNear = -1;

struct Sweep {
  const Linear* p;
  const void* x;           // R rows from k_begin on; near: packed, R times kLanes elements after one another
  int64_t row;             // the first of them
  int64_t begin, end;      // rows of w
  int64_t k_begin, k_end;  // columns of w
  float* partial;          // accumulators [run][R][kWidth] between two stretches of columns
  const char* next;        // near: what follows the run, rows next_row bytes apart; far: what is to be prefetched
  int64_t next_row;
};

// Adds w[begin : end, k_begin : k_end], C rows of w at a time, to the accumulators of R rows of x, and writes y after
// the last columns.
template <class T, int R, int C, int Ahead>
void sweep(const Sweep& s) {
  using Element = typename T::Element;
  using Weight = typename T::Weight;
  static_assert(C == 4 || C == 2, "sums are stored in fours");
  constexpr int64_t kBytes = sizeof(Weight);
  const int64_t inner = s.p->inner, ldy = s.p->ldy, length = s.k_end - s.k_begin;
  const Element* const x = static_cast<const Element*>(s.x);
  const int64_t ldx = s.p->ldx;
  auto x_at = [&](int r, int64_t k) { return Ahead == kNear ? x + k * R + r * T::kLanes : x + r * ldx + k; };
  const float *const bias = s.p->bias, *const scale = s.p->scale;
  const int64_t whole = length / T::kLanes * T::kLanes;
  // Near: as many bytes ahead as that many panels and columns.
  const int64_t ahead_columns = kPrefetchBytes / (C * kBytes) / T::kLanes * T::kLanes;
  const int64_t ahead_rows = whole > 0 ? ahead_columns / whole * C : 0;
  const int64_t ahead_rest = whole > 0 ? ahead_columns % whole : 0;
  auto row_at = [&](int64_t n) {
    return n < s.end ? static_cast<const char*>(s.p->w) + (n * inner + s.k_begin) * kBytes
                     : s.next + (n - s.end) * s.next_row;
  };

  for (int64_t n = s.begin; n < s.end; n += C) {
    const int wide = static_cast<int>(s.end - n < C ? s.end - n : C);
    const Weight* const w = static_cast<const Weight*>(s.p->w) + n * inner + s.k_begin;
    // The last rows of w may be fewer than C: the last one is computed again for each that is missing.
    const Weight* w_row[C];
    for (int c = 0; c < C; ++c) w_row[c] = w + (c < wide ? c : wide - 1) * inner;
    float* const partial = s.partial + (n - s.begin) * R * kWidth;
    Vec acc[R * C];
    if (s.k_begin == 0) {
#pragma GCC unroll 32
      for (int i = 0; i < R * C; ++i) acc[i] = zero();
    } else {
#pragma GCC unroll 32
      for (int i = 0; i < R * C; ++i) acc[i] = load(partial + i * kWidth);
    }
    const char* far = s.next + (n - s.begin) * inner * kBytes;
    int64_t k = 0;
    // Near: columns up to `turn` prefetch from one row, those after it from the next.
    for (int part = Ahead == kNear ? 0 : 1; part < 2; ++part) {
      const int64_t stop = part == 0 ? whole - ahead_rest : whole;
      const char* near = nullptr;
      int64_t near_row = inner * kBytes;
      if (Ahead == kNear) {
        const int64_t from = n + ahead_rows + part * C;
        near = row_at(from) + (part == 0 ? ahead_rest : ahead_rest - whole) * kBytes;
        if (from >= s.end) near_row = s.next_row;
      }
      for (; k < stop; k += T::kLanes) {
        if (Ahead == kNear) {
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) __builtin_prefetch(near + c * near_row + k * kBytes, 0, 3);
        } else if (Ahead > 0) {
#pragma GCC unroll 4
          for (int i = 0; i < Ahead; ++i) __builtin_prefetch(far + i * kLine, 0, 2);
          far += Ahead * kLine;
        }
        typename T::Operand w_now[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) w_now[c] = T::get(w_row[c] + k);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          const typename T::Operand x_now = T::get(x_at(r, k));
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) acc[r * C + c] = T::dot(acc[r * C + c], x_now, w_now[c]);
        }
      }
    }
    if (s.k_end < inner) {
#pragma GCC unroll 32
      for (int i = 0; i < R * C; ++i) store(partial + i * kWidth, acc[i]);
      continue;
    }
    if (k < length) {
      const int rest = static_cast<int>(length - k);
      typename T::Operand w_now[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) w_now[c] = T::get_n(w_row[c] + k, rest);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const typename T::Operand x_now = T::get_n(x_at(r, k), rest);
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
        if (scale != nullptr) {
          Four factors;
          std::memcpy(&factors, scale + n, sizeof factors);
          out *= factors;
        }
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
        const float product = scale != nullptr ? four[j] * scale[n + j % C] : four[j];
        const float value = product + (bias != nullptr ? bias[n + j % C] : 0.0f);
        *out = s.p->accumulate ? value + *out : value;
      }
    }
  }
}

using SweepFn = void (*)(const Sweep&);

template <class T, int R>
SweepFn one_tile(int rows) {
  if (rows == R) return &sweep<T, R, (R > T::kTall ? 2 : 4), kNear>;
  if constexpr (R > 1) return one_tile<T, R - 1>(rows);
  return nullptr;
}

template <class T, int R>
SweepFn many_tiles(int rows, int lines) {
  if (rows == R) return lines == 0 ? &sweep<T, R, 4, 0> : lines == 1 ? &sweep<T, R, 4, 1> : &sweep<T, R, 4, 2>;
  if constexpr (R > T::kLeast) return many_tiles<T, R - 1>(rows, lines);
  return nullptr;
}

// Rows of x that are a power of two apart map to the same few sets of the first-level cache: for a tile that meets many
// rows of w they are packed in the order in which it reads them.
template <class T>
void pack(const typename T::Element* x, int64_t ldx, int64_t rows, int64_t length, typename T::Element* out) {
  constexpr int64_t kBytes = sizeof(typename T::Element);
  for (int64_t k = 0; k < length; k += T::kLanes) {
    const int64_t bytes = (length - k < T::kLanes ? length - k : T::kLanes) * kBytes;
    for (int64_t r = 0; r < rows; ++r, out += T::kLanes) {
      if (bytes == T::kLanes * kBytes) {
        std::memcpy(out, x + r * ldx + k, T::kLanes * kBytes);
      } else {
        std::memcpy(out, x + r * ldx + k, bytes);
      }
    }
  }
}

inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void run(const Linear& p, int64_t begin, int64_t end, Prefetch prefetch) {
  if (begin >= end || p.rows == 0) return;
  constexpr int64_t kBytes = sizeof(typename T::Element), kWeightBytes = sizeof(typename T::Weight);
  // Cache lines of w that a step of four rows reads.
  constexpr int kLines = kWeightBytes == 1 ? 2 : 4;
  const int64_t row_bytes = p.inner * kWeightBytes;
  const char* const w = static_cast<const char*>(p.w);
  const auto* const x = static_cast<const typename T::Element*>(p.x);
  const bool single = p.rows <= T::kFlat;
  const int64_t tiles = single ? 1 : (p.rows + T::kTall - 1) / T::kTall;
  const int64_t tile_rows = (p.rows + tiles - 1) / tiles;

  // Columns are taken in stretches for which a tile's rows of x stay in the first-level cache.
  const int64_t stretches = (tile_rows * p.inner * kBytes + kStretchBytes - 1) / kStretchBytes;
  const int64_t stretch = (p.inner / stretches + T::kLanes - 1) / T::kLanes * T::kLanes;
  const bool whole = stretch >= p.inner;
  alignas(64) float partial[kPartialFloats];
  // A stretch is rounded up to whole vectors, at most one for each row.
  alignas(64) typename T::Element packed[kStretchBytes / kBytes + T::kFlat * T::kLanes];
  if (single && whole) pack<T>(x, p.ldx, p.rows, p.inner, packed);
  int64_t block = end - begin;
  if (!single) block = at_least(kBlockBytes / row_bytes / 4 * 4, 4);
  if (!whole) block = at_most(block, kPartialFloats / (tile_rows * kWidth) / 4 * 4);

  for (int64_t n = begin; n < end; n += block) {
    const int64_t stop = at_most(n + block, end);
    const char* const after = stop < end ? w + stop * row_bytes : static_cast<const char*>(prefetch.data);
    for (int64_t t = 0, sharing = 0; t < tiles; ++t) {
      const Range rows = share(p.rows, static_cast<int>(t), static_cast<int>(tiles));
      const int count = static_cast<int>(rows.end - rows.begin);
      // The first tiles share the lines that a step of the next block needs.
      const bool two = kLines == 4 && (tiles == 2 || (tiles == 3 && t == 0));
      const int lines = after == nullptr || sharing >= kLines ? 0 : two ? 2 : 1;
      const SweepFn fn = single ? one_tile<T, T::kFlat>(count) : many_tiles<T, T::kTall>(count, lines);
      for (int64_t k = 0; k < p.inner; k += stretch) {
        const int64_t k_stop = at_most(k + stretch, p.inner);
        Sweep s{&p, packed, rows.begin, n, stop, k, k_stop, partial, nullptr, row_bytes};
        if (single && !whole) pack<T>(x + k, p.ldx, p.rows, k_stop - k, packed);
        if (!single) {
          s.x = x + rows.begin * p.ldx + k;
          s.next = after + (sharing * (p.inner / T::kLanes) + lines * (k / T::kLanes)) * kLine;
        } else if (k_stop < p.inner) {
          s.next = w + n * row_bytes + k_stop * kWeightBytes;
        } else {
          s.next = after;
          // What comes after the product is read from its beginning on.
          if (stop == end) s.next_row = (k_stop - k) * kWeightBytes;
        }
        fn(s);
      }
      sharing += lines;
    }
  }
}

#if !defined(__AMX_BF16__)
// For many rows of x, weights of 8 bits are widened once for all of them, a few rows of w at a time.
void run_widened(const Linear& p, int64_t begin, int64_t end, Prefetch prefetch) {
  const int64_t block = kWidenedBytes / (p.inner * static_cast<int64_t>(sizeof(Bf16))) / 4 * 4;
  if (p.rows <= Int8::kFlat || block == 0) return run<Int8>(p, begin, end, prefetch);
  alignas(64) Bf16 widened[kWidenedBytes / sizeof(Bf16)];
  const int8_t* const w = static_cast<const int8_t*>(p.w);
  Linear part = p;
  part.w = widened;
  for (int64_t n = begin; n < end; n += block) {
    const int64_t stop = at_most(n + block, end), count = (stop - n) * p.inner;
    const int8_t* const from = w + n * p.inner;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(widened + i, load(from + i));
    for (; i < count; ++i) from_float(static_cast<float>(from[i]), widened + i);
    part.bias = p.bias == nullptr ? nullptr : p.bias + n;
    part.scale = p.scale + n;
    part.y = p.y + n;
    run<Bfloat>(part, 0, stop - n, stop < end ? Prefetch{w + stop * p.inner, count} : prefetch);
  }
}
#endif

}  // namespace

void linear(const Linear& p, int64_t begin, int64_t end, Prefetch prefetch) {
  if (p.dtype == kFloat32) {
    run<Fp32>(p, begin, end, prefetch);
    return;
  }
#if defined(__AMX_BF16__)
  linear_tiles(p, begin, end, prefetch);
#else
  if (p.dtype == kInt8) {
    run_widened(p, begin, end, prefetch);
  } else {
    run<Bfloat>(p, begin, end, prefetch);
  }
#endif
}

void pack_rows(const void* x, int64_t ldx, int64_t inner, Range rows, Range columns, void* packed) {
#if defined(__AMX_BF16__)
  pack_tiles(static_cast<const Bf16*>(x), ldx, inner, rows, columns, static_cast<char*>(packed));
#endif
}

void round_to_bf16(const float* x, void* out, int64_t n) {
  Bf16* to = static_cast<Bf16*>(out);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(x + i));
  if (i < n) store_n(to + i, load_n(x + i, static_cast<int>(n - i)), static_cast<int>(n - i));
}

}  // namespace RGTG_ISA
}  // namespace rgtg
