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
// The same for weights of 8 bits, which are read beside what they are widened to.
constexpr int64_t kWidenedColumns = 320;
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

// 16 rows of x by 32 columns: [pair of columns][row][2], zeros where there are fewer.
inline void pack_tile(const Bf16* x, int64_t ldx, int64_t rows, int64_t columns, void* out) {
  Vec pairs[16];
  const __mmask32 mask = columns < kTileColumns ? (1u << columns) - 1 : 0xffffffffu;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    pairs[r].v = r < rows ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, x + r * ldx)) : _mm512_setzero_ps();
  }
  transpose(pairs);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) store(static_cast<float*>(out) + i * 16, pairs[i]);
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
  const char* w;      // bf16, from row n and column k on
  int64_t row_bytes;  // bytes from one row of w to the next
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

// y = (y +) sums^T * scale + bias for one tile: `rows` of x by `columns` of y.
inline void write_tile(const Linear& p, const float* sums, int64_t m, int64_t rows, int64_t n, int64_t columns) {
  Vec y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) y[i] = load(sums + i * 16);
  transpose(y);
  const __mmask16 mask = first(static_cast<int>(columns));
  const __m512 scale = p.scale == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.scale + n);
  const __m512 bias = p.bias == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, p.bias + n);
  float* out = p.y + m * p.ldy + n;
#pragma GCC unroll 16
  for (int r = 0; r < 16; ++r) {
    if (r >= rows) break;
    if (p.scale != nullptr) y[r].v = _mm512_mul_ps(y[r].v, scale);
    if (p.bias != nullptr) y[r].v = _mm512_add_ps(y[r].v, bias);
    if (p.accumulate) y[r].v = _mm512_add_ps(y[r].v, _mm512_maskz_loadu_ps(mask, out));
    _mm512_mask_storeu_ps(out, mask, y[r].v);
    out += p.ldy;
  }
}

// W is the dtype of s.w: weights of 8 bits are widened a step ahead of the tiles.
template <class Weight, int W, int X>
void run_pass(Tiles& t, const Pass& s) {
  constexpr bool kWidens = sizeof(Weight) == 1;
  const Linear& p = *t.p;
  const int64_t row_bytes = s.row_bytes, length = s.k_stop - s.k;
  const char *const w = s.w, *const second = w + kTileRows * row_bytes;
  const char* x = s.x;
  load_sums<W, X>(s.sums, s.k == 0);
  // The last columns of bf16 weights come from a copy that zeros follow: what follows in memory may be another row, or
  // nothing.
  alignas(64) char copies[kWidens ? 2 : 1][2 * kTileBytes];
  auto copy = [&](int64_t i) {
    const int64_t columns = least(length - i * kTileColumns, kTileColumns);
    if (kWidens) return widen(w + i * kTileColumns, row_bytes, s.rows_n, columns, copies[i % 2]);
    for (int64_t r = 0; r < s.rows_n; ++r) {
      _mm512_store_si512(copies[0] + r * 64, _mm512_maskz_loadu_epi16((1u << columns) - 1, w + r * row_bytes + i * 64));
    }
  };
  const int64_t steps = (length + kTileColumns - 1) / kTileColumns, whole = kWidens ? 0 : length / kTileColumns;
  if (kWidens) copy(0);
  for (int64_t i = 0; i < steps; ++i, x += kTileBytes) {
    prefetch_lines(t);
    tile_load<kX>(x, 64);
    if constexpr (X > 1) tile_load<kX + 1>(x + s.x_tile, 64);
    if (i < whole) {
      tile_load<kW>(w + i * 64, row_bytes);
      if constexpr (W > 1) tile_load<kW + 1>(second + i * 64, row_bytes);
    } else {
      if (!kWidens || i + 1 < steps) copy(kWidens ? i + 1 : i);
      const char* const from = copies[kWidens ? i % 2 : 0];
      tile_load<kW>(from, 64);
      if constexpr (W > 1) tile_load<kW + 1>(from + kTileBytes, 64);
    }
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

template <class Weight>
inline void run_pass_of_any_size(Tiles& t, const Pass& s) {
  const bool wide = s.rows_n > kTileRows, tall = s.rows_m > kTileRows;
  if (wide && tall) return run_pass<Weight, 2, 2>(t, s);
  if (wide) return run_pass<Weight, 2, 1>(t, s);
  if (tall) return run_pass<Weight, 1, 2>(t, s);
  return run_pass<Weight, 1, 1>(t, s);
}

inline void linear_tiles(const Linear& p, int64_t begin, int64_t end, Prefetch prefetch) {
  if (begin >= end || p.rows == 0) return;
  const bool widens = p.dtype == kInt8;
  const int64_t depth = rounded_up(p.inner, kTileColumns), row_bytes = p.inner * (widens ? 1 : 2);
  const bool packs = p.packed == nullptr;
  // Packed rows: up to kPairs groups of rows pass one panel; their stretches fit the first-level cache if they are more
  // than one. Others: one group, whose packed stretch serves up to kPairs panels.
  const int64_t block_rows = kPanelRows * (packs ? 1 : kPairs), block_columns = kPanelRows * (packs ? kPairs : 1);
  const int64_t most = widens                ? kWidenedColumns
                       : packs               ? kPackedColumns
                       : p.rows > kPanelRows ? kStretchColumns
                                             : depth;
  const int64_t stretches = (depth + most - 1) / most;
  const int64_t stretch = rounded_up((depth + stretches - 1) / stretches, kTileColumns);
  alignas(64) char sums[kPairs * kSumsBytes];
  alignas(64) char own[kPanelRows * kPackedColumns * 2];
  alignas(64) char widened[kPanelRows * kWidenedColumns * 2];
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
          for (int64_t r = first; r < stop; r += kTileRows) {
            const Bf16* x = static_cast<const Bf16*>(p.x) + r * p.ldx;
            char* out = own + (r - first) / kTileRows * (stretch / kTileColumns) * kTileBytes;
            for (int64_t i = k; i < k_stop; i += kTileColumns, out += kTileBytes) {
              pack_tile(x + i, p.ldx, least(stop - r, kTileRows), least(k_stop - i, kTileColumns), out);
            }
          }
        }
        const int64_t x_tile = (packs ? stretch : depth) / kTileColumns * kTileBytes;
        char* waiting = sums;
        for (int64_t n = column; n < column_stop; n += kPanelRows) {
          const int64_t rows_n = least(kPanelRows, column_stop - n);
          if (rows_n != configured) configure_tiles(rows_n);
          configured = rows_n;
          const char* w = static_cast<const char*>(p.w) + n * row_bytes + k * (widens ? 1 : 2);
          const int64_t widened_bytes = rounded_up(k_stop - k, kTileColumns) * 2;
          const bool widened_once = widens && groups > 1;
          if (widened_once) widen(w, row_bytes, rows_n, k_stop - k, widened);
          for (int64_t m = first; m < stop; m += kPanelRows, waiting += kSumsBytes) {
            const char* x =
                packs ? own
                      : static_cast<const char*>(p.packed) + m / kTileRows * x_tile + k / kTileColumns * kTileBytes;
            Pass s{n, rows_n, m, least(kPanelRows, stop - m), k, k_stop, w, row_bytes, x, x_tile, waiting};
            if (widens && !widened_once) {
              run_pass_of_any_size<int8_t>(t, s);
              continue;
            }
            if (widens) s.w = widened, s.row_bytes = widened_bytes, s.k_stop = k + widened_bytes / 2;
            run_pass_of_any_size<Bf16>(t, s);
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
