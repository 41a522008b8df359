// Instructions on AMX tiles of 16 rows by 64 bytes. The compiler's own functions do not say that they read memory: stores
// to it could move across them.
#pragma once

#include "vec.hpp"

#if defined(__AMX_BF16__)

namespace rgtg {
namespace RGTG_ISA {
namespace {

constexpr int64_t kTileBytes = 1024;

// Tile registers have 16 rows, or fewer.
inline void configure_tiles(const uint8_t (&rows)[8]) {
  struct alignas(64) {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } config = {};
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = rows[i];
    config.row_bytes[i] = 64;
  }
  asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
}
inline void release_tiles() { asm volatile("tilerelease"); }

template <int Tile>
inline void tile_load(const void* p, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
// The same without keeping the lines in the first-level cache.
template <int Tile>
inline void tile_load_once(const void* p, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_store(void* p, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(Tile));
}
// sum[i][j] += a[i] . b[j], of a's rows of 32 numbers of bf16 and b's columns of 16 pairs of them.
template <int Sum, int A, int B>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" : : "i"(B), "i"(A), "i"(Sum));
}

}  // namespace
}  // namespace RGTG_ISA
}  // namespace rgtg

#endif
