// Products of bf16, and of bf16 with int8 weights, on AMX tiles: y^T = w x^T, with w read where it lies.
//
// A tile of w is 16 of its rows by 32 columns, loaded with the rows' own distance. The other operand is a tile of x:
// 16 rows by the same 32 columns, packed in pairs of columns as the instruction wants them. Their product is a tile of
// y^T, 16 columns of y by 16 rows. A pass holds up to two tiles of w and two of x, whose four products it adds up.
//
// The order of additions of one y[m, n] is the instruction's: of every 32 columns the even and the odd ones are added
// apart, by multiply-adds in the order of k that start at zero; then their sum is added to y. Columns beyond the last
// are zeros. Nothing of this depends on the number of rows or on where a tile begins, so neither do the bits.
// tests/models/tiles.py computes the same in plain PyTorch.
//
// All rows of x pass a panel of 32 rows of w before the next panel, which is prefetched meanwhile: panels are contiguous
// memory, read once. Where there are many rows, columns are taken in stretches for which the panel stays in the
// first-level cache; the sums wait in memory. Weights of 8 bits, which bf16 holds exactly, are widened to it: for one
// group of rows a tile at a time, for several a panel's stretch, which all groups read. The sums are those of the same
// numbers as bf16.
#pragma once

#include "amx.hpp"
#include "linear.hpp"
#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

constexpr int64_t kTileRows = kPackRows, kTileColumns = kPackColumns;
// A panel of w and a group of rows of x have up to two tiles.
constexpr int64_t kPanelRows = 2 * kTileRows;
constexpr int64_t kSumsBytes = 4 * kTileBytes;
// Sums that wait: of up to so many pairs of a panel and a group.
constexpr int64_t kPairs = 8;
// The most columns of a stretch: a panel's 40 KB.
constexpr int64_t kStretchColumns = 640;
// The most columns of rows that linear() packs itself.
constexpr int64_t kPackedColumns = 1024;
// What is prefetched of the memory that is read after a product of many rows, at most.
constexpr int64_t kNextBytes = 96 << 10;
// How many tiles of columns ahead a panel is prefetched for few rows.
constexpr int64_t kAhead = 8;

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tile registers: the sums of w's tile i and x's tile j in 2 i + j, w in 4 and 5, x in 6 and 7.
constexpr int kW = 4, kX = 6;

// Tiles of w and of sums have as many rows as the panel has left.
inline void configure_panel(int64_t panel_rows) {
  const auto first = static_cast<uint8_t>(least(panel_rows, kTileRows));
  const auto second = static_cast<uint8_t>(panel_rows > kTileRows ? panel_rows - kTileRows : kTileRows);
  configure_tiles({first, first, second, second, first, second, kTileRows, kTileRows});
}

// Packs a tile of x, [pair of columns][row][2]: its rows and columns from `rows.begin` and `columns.begin` on, zeros for
// columns after the last one of x. What other threads pack of the same tile is left alone.
inline void pack_tile(const Bf16* x, int64_t ldx, Range rows, Range columns, bool last, char* out) {
  Vec pairs[16];
  const auto below = [](int64_t n) { return static_cast<uint32_t>((uint64_t{1} << n) - 1); };
  const __mmask32 mask = below(columns.end) & ~below(columns.begin);
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    const bool given = r >= rows.begin && r < rows.end;
    pairs[r].v = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(given ? mask : 0, x + r * ldx));
  }
  transpose(pairs);
  const __mmask16 lanes = static_cast<__mmask16>(below(rows.end) & ~below(rows.begin));
  const int64_t end = last ? 16 : columns.end / 2;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    if (i >= columns.begin / 2 && i < end) _mm512_mask_storeu_ps(out + i * 64, lanes, pairs[i].v);
  }
}

inline void pack_tiles(const Bf16* x, int64_t ldx, int64_t inner, Range rows, Range columns, char* out) {
  const int64_t depth = rounded_up(inner, kTileColumns) / kTileColumns;
  auto part = [](Range range, int64_t first, int64_t size) {
    return Range{range.begin > first ? range.begin - first : 0, least(range.end - first, size)};
  };
  for (int64_t m = rows.begin / kTileRows * kTileRows; m < rows.end; m += kTileRows) {
    for (int64_t k = columns.begin / kTileColumns * kTileColumns; k < columns.end; k += kTileColumns) {
      const Range own = part(columns, k, kTileColumns);
      pack_tile(x + m * ldx + k, ldx, part(rows, m, kTileRows), own, k + own.end == inner,
                out + (m / kTileRows * depth + k / kTileColumns) * kTileBytes);
    }
  }
}

// What all passes of a product share.
struct Tiles {
  const Linear* p;
  // What is prefetched: so many lines, `step` of them with every tile of 32 columns.
  const char* next;
  int64_t lines, step;
  // Sums of the last pass, written to y a quarter of a tile at a time between the multiplications of the next one.
  const char* sums;
  Range m, n;
  int quarter, quarters;
};

// A pass: a panel of w by a group of rows of x over a stretch of columns.
struct Pass {
  Range n, m, k;
  const char* w;      // from the panel's first row and the stretch's first column on
  int64_t row_bytes;  // from one row of w to the next
  const char* x;      // packed, from the stretch's first column on
  int64_t x_tile;     // bytes from one tile of 16 rows to the next
  char* sums;         // where the sums wait from one stretch to the next
  const char* next;   // the panel after this one, or nullptr
  bool many;          // groups of rows
};

inline void prefetch_lines(Tiles& t) {
  const int64_t count = least(t.step, t.lines);
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(t.next + i * 64, 0, 2);
  t.next += count * 64;
  t.lines -= count;
}

// rows of int8 weights as bf16, zeros after the last column.
inline void widen(const char* w, int64_t row_bytes, int64_t rows, int64_t columns, char* out) {
  for (int64_t r = 0; r < rows; ++r, w += row_bytes) {
    for (int64_t k = 0; k < columns; k += kTileColumns, out += 64) {
      const int64_t rest = columns - k;
      const __m256i bytes = _mm256_maskz_loadu_epi8(rest < kTileColumns ? (1u << rest) - 1 : 0xffffffffu, w + k);
      const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
      const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
      _mm512_store_si512(out, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
}

// 16 rows of int8 weights by 32 columns as a tile of bf16.
inline void widen_tile(const char* w, int64_t row_bytes, char* out) {
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r, w += row_bytes) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
    const __m512 high =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16))));
    _mm512_store_si512(out + r * 64, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

template <int W, int X>
inline void multiply_tiles() {
  tile_multiply<0, kW, kX>();
  if constexpr (X > 1) tile_multiply<1, kW, kX + 1>();
  if constexpr (W > 1) tile_multiply<2, kW + 1, kX>();
  if constexpr (W > 1 && X > 1) tile_multiply<3, kW + 1, kX + 1>();
}

template <int W, int X>
inline void load_sums(const char* sums, bool zeros) {
  if (zeros) {
    tile_zero<0>();
    if constexpr (X > 1) tile_zero<1>();
    if constexpr (W > 1) tile_zero<2>();
    if constexpr (W > 1 && X > 1) tile_zero<3>();
  } else {
    tile_load<0>(sums, 64);
    if constexpr (X > 1) tile_load<1>(sums + kTileBytes, 64);
    if constexpr (W > 1) tile_load<2>(sums + 2 * kTileBytes, 64);
    if constexpr (W > 1 && X > 1) tile_load<3>(sums + 3 * kTileBytes, 64);
  }
}

template <int W, int X>
inline void store_sums(char* sums) {
  tile_store<0>(sums, 64);
  if constexpr (X > 1) tile_store<1>(sums + kTileBytes, 64);
  if constexpr (W > 1) tile_store<2>(sums + 2 * kTileBytes, 64);
  if constexpr (W > 1 && X > 1) tile_store<3>(sums + 3 * kTileBytes, 64);
}

// y = (y +) sums^T * scale + bias for four rows of one tile.
inline void write_quarter(Tiles& t) {
  const Linear& p = *t.p;
  const int tile = t.quarter / 4, part = t.quarter % 4;
  ++t.quarter;
  const int64_t m = t.m.begin + tile % 2 * kTileRows + part * 4, n = t.n.begin + tile / 2 * kTileRows;
  if (m >= t.m.end) return;
  const float* const sums = reinterpret_cast<const float*>(t.sums + tile * kTileBytes) + part * 4;
  // Lane l of row[j] has sums 4 l + j of the four rows.
  __m512 row[4];
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    row[j] = _mm512_castps128_ps512(_mm_load_ps(sums + j * 16));
    row[j] = _mm512_insertf32x4(row[j], _mm_load_ps(sums + (4 + j) * 16), 1);
    row[j] = _mm512_insertf32x4(row[j], _mm_load_ps(sums + (8 + j) * 16), 2);
    row[j] = _mm512_insertf32x4(row[j], _mm_load_ps(sums + (12 + j) * 16), 3);
  }
  const __m512 a = _mm512_unpacklo_ps(row[0], row[1]), b = _mm512_unpacklo_ps(row[2], row[3]);
  const __m512 c = _mm512_unpackhi_ps(row[0], row[1]), d = _mm512_unpackhi_ps(row[2], row[3]);
  __m512 y[4] = {_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee), _mm512_shuffle_ps(c, d, 0x44),
                 _mm512_shuffle_ps(c, d, 0xee)};
  const __mmask16 mask = first(static_cast<int>(least(t.n.end - n, kTileRows)));
  const __m512 scale = p.scale == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.scale + n);
  const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.bias + n);
  float* out = p.y + m * p.ldy + n;
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r, out += p.ldy) {
    if (m + r >= t.m.end) break;
    if (p.scale != nullptr) y[r] = _mm512_mul_ps(y[r], scale);
    if (p.bias != nullptr) y[r] = _mm512_add_ps(y[r], bias);
    if (p.accumulate) y[r] = _mm512_add_ps(y[r], _mm512_maskz_loadu_ps(mask, out));
    _mm512_mask_storeu_ps(out, mask, y[r]);
  }
}

inline void write_rest(Tiles& t) {
  while (t.quarter < t.quarters) write_quarter(t);
}

// The lines of w that the pass of few rows needs kAhead tiles later.
template <class Weight, int W>
inline void prefetch_ahead(const char* w, const char* next, int64_t row_bytes, int64_t i, int64_t whole) {
  constexpr int64_t kBytes = kTileColumns * sizeof(Weight);
  // A line of weights of 8 bits serves two tiles.
  if (kBytes < 64 && i % 2 != 0) return;
  const int64_t ahead = i + kAhead;
  const char* from = w + ahead * kBytes;
  if (ahead >= whole) {
    if (next == nullptr) return;
    from = next + (ahead - whole) * kBytes;
  }
#pragma GCC unroll 16
  for (int r = 0; r < W * kTileRows; ++r, from += row_bytes) __builtin_prefetch(from, 0, 3);
}

template <int W, int X, bool Once>
inline void load_rows(const char* x, int64_t x_tile) {
  if constexpr (Once) {
    tile_load_once<kX>(x, 64);
    if constexpr (X > 1) tile_load_once<kX + 1>(x + x_tile, 64);
  } else {
    tile_load<kX>(x, 64);
    if constexpr (X > 1) tile_load<kX + 1>(x + x_tile, 64);
  }
}

// Weight: the dtype of s.w; weights of 8 bits are widened a step ahead of their tiles. Many: whether several groups of
// rows pass a panel of w. The first-level cache then keeps the panel, not x, and the next panel is prefetched into the
// second one. Otherwise w passes the first-level cache once and x stays.
template <class Weight, int W, int X, bool Many>
void run_pass(Tiles& t, const Pass& s) {
  const Linear& p = *t.p;
  constexpr bool kWidens = sizeof(Weight) == 1;
  const char *const w = s.w, *const second = w + kTileRows * s.row_bytes;
  const char* x = s.x;
  load_sums<W, X>(s.sums, s.k.begin == 0);
  const int64_t length = s.k.end - s.k.begin, steps = (length + kTileColumns - 1) / kTileColumns;
  // Tiles of w that are not loaded where they lie: widened ones, and the last columns followed by zeros, since what
  // follows in memory may be another row, or nothing.
  const int64_t whole = kWidens ? 0 : length / kTileColumns;
  alignas(64) char copies[2][2 * kTileBytes];
  auto copy = [&](int64_t i) {
    const int64_t columns = least(length - i * kTileColumns, kTileColumns), rows = s.n.end - s.n.begin;
    char* const out = copies[i % 2];
    if (kWidens && columns == kTileColumns && rows == W * kTileRows) {
      widen_tile(w + i * kTileColumns, s.row_bytes, out);
      if (W > 1) widen_tile(second + i * kTileColumns, s.row_bytes, out + kTileBytes);
      return;
    }
    if (kWidens) return widen(w + i * kTileColumns, s.row_bytes, rows, columns, out);
    for (int64_t r = 0; r < rows; ++r) {
      const __m512i line = _mm512_maskz_loadu_epi16((1u << columns) - 1, w + r * s.row_bytes + i * 64);
      _mm512_store_si512(out + r * 64, line);
    }
  };
  if (kWidens) copy(0);
  for (int64_t i = 0; i < steps; ++i, x += kTileBytes) {
    if constexpr (Many) {
      prefetch_lines(t);
    } else if (i < length / kTileColumns) {
      prefetch_ahead<Weight, W>(w, s.next, s.row_bytes, i, length / kTileColumns);
    }
    load_rows<W, X, Many>(x, s.x_tile);
    if (i < whole) {
      tile_load<kW>(w + i * 64, s.row_bytes);
      if constexpr (W > 1) tile_load<kW + 1>(second + i * 64, s.row_bytes);
    } else {
      if (!kWidens) copy(i);
      if (kWidens && i + 1 < steps) copy(i + 1);
      tile_load<kW>(copies[i % 2], 64);
      if constexpr (W > 1) tile_load<kW + 1>(copies[i % 2] + kTileBytes, 64);
    }
    multiply_tiles<W, X>();
    if (t.quarter < t.quarters) write_quarter(t);
  }
  write_rest(t);
  store_sums<W, X>(s.sums);
  if (s.k.end < p.inner) return;
  t.sums = s.sums;
  t.m = s.m;
  t.n = s.n;
  t.quarter = 0;
  t.quarters = W > 1 ? 16 : 8;
}

template <class Weight>
inline void run_pass_of_any_size(Tiles& t, const Pass& s) {
  const bool wide = s.n.end - s.n.begin > kTileRows, tall = s.m.end - s.m.begin > kTileRows;
  if (wide && tall) return s.many ? run_pass<Weight, 2, 2, true>(t, s) : run_pass<Weight, 2, 2, false>(t, s);
  if (wide) return s.many ? run_pass<Weight, 2, 1, true>(t, s) : run_pass<Weight, 2, 1, false>(t, s);
  if (tall) return s.many ? run_pass<Weight, 1, 2, true>(t, s) : run_pass<Weight, 1, 2, false>(t, s);
  return s.many ? run_pass<Weight, 1, 1, true>(t, s) : run_pass<Weight, 1, 1, false>(t, s);
}

inline void linear_tiles(const Linear& p, int64_t begin, int64_t end, Prefetch prefetch) {
  if (begin >= end || p.rows == 0) return;
  const bool widens = p.dtype == kInt8;
  const int64_t depth = rounded_up(p.inner, kTileColumns), row_bytes = p.inner * (widens ? 1 : 2);
  const bool packs = p.packed == nullptr;
  // Packed rows: up to kPairs groups of rows pass one panel; their stretches fit the first-level cache if they are more
  // than one. Others: one group, whose packed stretch serves up to kPairs panels.
  const int64_t block_rows = kPanelRows * (packs ? 1 : kPairs), block_columns = kPanelRows * (packs ? kPairs : 1);
  const int64_t most = packs ? kPackedColumns : p.rows > kPanelRows ? kStretchColumns : depth;
  const int64_t stretches = (depth + most - 1) / most;
  const int64_t stretch = rounded_up((depth + stretches - 1) / stretches, kTileColumns);
  alignas(64) char sums[kPairs * kSumsBytes];
  alignas(64) char own[kPanelRows * kPackedColumns * 2];
  alignas(64) char widened[kPanelRows * kStretchColumns * 2];
  int64_t configured = -1;
  Tiles t{};
  t.p = &p;
  for (int64_t first = 0; first < p.rows; first += block_rows) {
    const int64_t stop = least(first + block_rows, p.rows);
    const int64_t groups = (stop - first + kPanelRows - 1) / kPanelRows;
    for (int64_t column = begin; column < end; column += block_columns) {
      const int64_t column_stop = least(column + block_columns, end);
      t.next = static_cast<const char*>(p.w) + column_stop * row_bytes;
      int64_t bytes = least(column_stop - column, end - column_stop) * row_bytes;
      if (column_stop == end) {
        t.next = static_cast<const char*>(prefetch.data);
        bytes = least(prefetch.bytes, kNextBytes);
      }
      t.lines = first > 0 ? 0 : bytes / 64;
      const int64_t passes = groups * ((column_stop - column + kPanelRows - 1) / kPanelRows);
      t.step = (t.lines * kTileColumns + passes * depth - 1) / (passes * depth);
      for (int64_t k = 0; k < p.inner; k += stretch) {
        const int64_t k_stop = least(k + stretch, p.inner);
        if (packs) {
          const Bf16* x = static_cast<const Bf16*>(p.x) + first * p.ldx + k;
          pack_tiles(x, p.ldx, k_stop - k, {0, stop - first}, {0, k_stop - k}, own);
        }
        const int64_t x_tile = rounded_up(packs ? k_stop - k : p.inner, kTileColumns) / kTileColumns * kTileBytes;
        char* waiting = sums;
        for (int64_t n = column; n < column_stop; n += kPanelRows) {
          const int64_t rows_n = least(kPanelRows, column_stop - n);
          if (rows_n != configured) configure_panel(rows_n);
          configured = rows_n;
          const char* const w = static_cast<const char*>(p.w) + n * row_bytes + k * (widens ? 1 : 2);
          const char* next = static_cast<const char*>(p.w) + (n + rows_n) * row_bytes;
          if (n + rows_n == end) next = static_cast<const char*>(prefetch.data);
          if (k_stop < p.inner) next = w + (k_stop - k) * (widens ? 1 : 2);
          const bool many = groups > 1;
          if (widens && many) widen(w, row_bytes, rows_n, k_stop - k, widened);
          for (int64_t m = first; m < stop; m += kPanelRows, waiting += kSumsBytes) {
            const char* x =
                packs ? own
                      : static_cast<const char*>(p.packed) + m / kTileRows * x_tile + k / kTileColumns * kTileBytes;
            const Range panel{n, n + rows_n}, group{m, least(m + kPanelRows, stop)};
            Pass pass{panel, group, {k, k_stop}, w, row_bytes, x, x_tile, waiting, next, many};
            if (widens && !many) {
              run_pass_of_any_size<int8_t>(t, pass);
              continue;
            }
            if (widens) {
              const int64_t columns = rounded_up(k_stop - k, kTileColumns);
              pass.w = widened;
              pass.row_bytes = columns * 2;
              pass.k.end = k + columns;
            }
            run_pass_of_any_size<Bf16>(t, pass);
          }
        }
      }
    }
  }
  write_rest(t);
  release_tiles();
}

}  // namespace
}  // namespace RGTG_ISA
}  // namespace rgtg
