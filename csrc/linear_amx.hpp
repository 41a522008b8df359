// bf16 products on AMX tiles: y^T = w x^T, with w read where it lies.
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
// first-level cache; the sums wait in memory.
#pragma once

#include "linear.hpp"
#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

constexpr int64_t kTileRows = kPackRows, kTileColumns = kPackColumns, kTileBytes = 1024;
// A panel of w and a group of rows of x have up to two tiles.
constexpr int64_t kPanelRows = 2 * kTileRows;
constexpr int64_t kSumsBytes = 4 * kTileBytes;
// Sums that wait: of up to so many pairs of a panel and a group.
constexpr int64_t kPairs = 8;
// The most columns of a stretch: a panel's 40 KB.
constexpr int64_t kStretchColumns = 640;
// The most columns of rows that linear() packs itself.
constexpr int64_t kPackedColumns = 1024;
// What is prefetched of the memory that is read after a product, at most.
constexpr int64_t kNextBytes = 96 << 10;

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tile registers: the sums of w's tile i and x's tile j in 2 i + j, w in 4 and 5, x in 6 and 7.
constexpr int kW = 4, kX = 6;

// The compiler's own functions take a register's number as a token and let stores move across a load.
template <int Tile>
inline void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
template <int I, int J>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(kX + J), "i"(kW + I), "i"(2 * I + J));
}

// Tiles of w and of sums have as many rows as the panel has left.
inline void configure_tiles(int64_t panel_rows) {
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  const auto first = static_cast<uint8_t>(least(panel_rows, kTileRows));
  const auto second = static_cast<uint8_t>(panel_rows > kTileRows ? panel_rows - kTileRows : kTileRows);
  const uint8_t rows[8] = {first, first, second, second, first, second, kTileRows, kTileRows};
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = rows[i];
    config.row_bytes[i] = 64;
  }
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
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
  const char* next;  // what is prefetched
  int64_t lines;     // how much of it
  int64_t step;      // lines with every tile of 32 columns
};

// A pass: a panel of w by a group of rows of x over a stretch of columns.
struct Pass {
  int64_t n, rows_n;  // the panel
  int64_t m, rows_m;  // the rows
  int64_t k, k_stop;  // the stretch
  const char* x;      // packed, from column k on
  int64_t x_tile;     // bytes from one tile of 16 rows to the next
  char* sums;         // where the sums wait from one stretch to the next
};

inline void prefetch_lines(Tiles& t) {
  const int64_t count = least(t.step, t.lines);
  for (int64_t i = 0; i < count; ++i) __builtin_prefetch(t.next + i * 64, 0, 2);
  t.next += count * 64;
  t.lines -= count;
}

template <int W, int X>
inline void multiply_tiles() {
  tile_multiply<0, 0>();
  if constexpr (X > 1) tile_multiply<0, 1>();
  if constexpr (W > 1) tile_multiply<1, 0>();
  if constexpr (W > 1 && X > 1) tile_multiply<1, 1>();
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

// y = (y +) sums^T + bias for one tile: `rows` of x by `columns` of y.
inline void write_tile(const Linear& p, const float* sums, int64_t m, int64_t rows, int64_t n, int64_t columns) {
  Vec y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) y[i] = load(sums + i * 16);
  transpose(y);
  const __mmask16 mask = first(static_cast<int>(columns));
  const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.bias + n);
  float* out = p.y + m * p.ldy + n;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (r >= rows) break;
    if (p.bias != nullptr) y[r].v = _mm512_add_ps(y[r].v, bias);
    if (p.accumulate) y[r].v = _mm512_add_ps(y[r].v, _mm512_maskz_loadu_ps(mask, out));
    _mm512_mask_storeu_ps(out, mask, y[r].v);
    out += p.ldy;
  }
}

template <int W, int X>
void run_pass(Tiles& t, const Pass& s) {
  const Linear& p = *t.p;
  const int64_t row_bytes = p.inner * 2;
  const char* w = static_cast<const char*>(p.w) + s.n * row_bytes + s.k * 2;
  const char* const second = w + kTileRows * row_bytes;
  const char* x = s.x;
  load_sums<W, X>(s.sums, s.k == 0);
  const int64_t whole = (s.k_stop - s.k) / kTileColumns;
  for (int64_t i = 0; i < whole; ++i, x += kTileBytes) {
    prefetch_lines(t);
    tile_load<kX>(x, 64);
    if constexpr (X > 1) tile_load<kX + 1>(x + s.x_tile, 64);
    tile_load<kW>(w + i * 64, row_bytes);
    if constexpr (W > 1) tile_load<kW + 1>(second + i * 64, row_bytes);
    multiply_tiles<W, X>();
  }
  const int64_t rest = s.k_stop - s.k - whole * kTileColumns;
  if (rest > 0) {
    // The last columns of w followed by zeros: what follows in memory may be another row, or nothing.
    alignas(64) char tail[2 * kTileBytes];
    for (int64_t r = 0; r < s.rows_n; ++r) {
      const __m512i line = _mm512_maskz_loadu_epi16((1u << rest) - 1, w + r * row_bytes + whole * 64);
      _mm512_store_si512(tail + r * 64, line);
    }
    tile_load<kX>(x, 64);
    if constexpr (X > 1) tile_load<kX + 1>(x + s.x_tile, 64);
    tile_load<kW>(tail, 64);
    if constexpr (W > 1) tile_load<kW + 1>(tail + kTileBytes, 64);
    multiply_tiles<W, X>();
  }
  store_sums<W, X>(s.sums);
  if (s.k_stop < p.inner) return;
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < X; ++j) {
      const float* sums = reinterpret_cast<const float*>(s.sums) + (2 * i + j) * (kTileBytes / 4);
      write_tile(p, sums, s.m + j * kTileRows, least(s.rows_m - j * kTileRows, kTileRows), s.n + i * kTileRows,
                 least(s.rows_n - i * kTileRows, kTileRows));
    }
  }
}

inline void run_pass_of_any_size(Tiles& t, const Pass& s) {
  const bool wide = s.rows_n > kTileRows, tall = s.rows_m > kTileRows;
  if (wide && tall) return run_pass<2, 2>(t, s);
  if (wide) return run_pass<2, 1>(t, s);
  if (tall) return run_pass<1, 2>(t, s);
  return run_pass<1, 1>(t, s);
}

inline void linear_tiles(const Linear& p, int64_t begin, int64_t end, Prefetch prefetch) {
  if (begin >= end || p.rows == 0) return;
  const int64_t depth = rounded_up(p.inner, kTileColumns), row_bytes = p.inner * 2;
  const bool packs = p.packed == nullptr;
  // Packed rows: up to kPairs groups of rows pass one panel; their stretches fit the first-level cache if they are more
  // than one. Others: one group, whose packed stretch serves up to kPairs panels.
  const int64_t block_rows = kPanelRows * (packs ? 1 : kPairs), block_columns = kPanelRows * (packs ? kPairs : 1);
  const int64_t most = packs ? kPackedColumns : p.rows > kPanelRows ? kStretchColumns : depth;
  const int64_t stretches = (depth + most - 1) / most;
  const int64_t stretch = rounded_up((depth + stretches - 1) / stretches, kTileColumns);
  alignas(64) char sums[kPairs * kSumsBytes];
  alignas(64) char own[kPanelRows * kPackedColumns * 2];
  int64_t configured = -1;
  for (int64_t first = 0; first < p.rows; first += block_rows) {
    const int64_t stop = least(first + block_rows, p.rows);
    const int64_t groups = (stop - first + kPanelRows - 1) / kPanelRows;
    for (int64_t column = begin; column < end; column += block_columns) {
      const int64_t column_stop = least(column + block_columns, end);
      Tiles t{&p, static_cast<const char*>(p.w) + column_stop * row_bytes, 0, 0};
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
          if (rows_n != configured) configure_tiles(rows_n);
          configured = rows_n;
          for (int64_t m = first; m < stop; m += kPanelRows, waiting += kSumsBytes) {
            const char* x =
                packs ? own
                      : static_cast<const char*>(p.packed) + m / kTileRows * x_tile + k / kTileColumns * kTileBytes;
            run_pass_of_any_size(t, {n, rows_n, m, least(kPanelRows, stop - m), k, k_stop, x, x_tile, waiting});
          }
        }
      }
    }
  }
  asm volatile("tilerelease");
}

}  // namespace
}  // namespace RGTG_ISA
}  // namespace rgtg
