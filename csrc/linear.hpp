// The matrix product of a linear layer: y[m, n] = sum over k of x[m, k] * w[n, k], with w as in torch.nn.Linear.
#pragma once

#include "common.hpp"
#include "isa.hpp"

namespace rgtg {

// x and w are both of `dtype` (kFloat32 or kBFloat16); sums, bias and y are fp32.
struct Linear {
  const void* x;      // [rows, inner], rows ldx elements apart
  const void* w;      // [outer, inner], contiguous
  const float* bias;  // [outer] or nullptr
  float* y;           // [rows, outer], rows ldy elements apart
  int64_t rows, inner, ldx, ldy;
  int dtype;
  bool accumulate;     // y += instead of y =
  const void* packed;  // x as pack_rows() stores it, or nullptr: then linear() packs what it needs
};

// Memory that a thread reads after this product; it is prefetched while the last rows are computed.
struct Prefetch {
  const void* data;
  int64_t bytes;
};

}  // namespace rgtg

// Computes y[:, begin:end] on the calling thread. The order of additions of one y[m, n] depends on `inner` alone, so
// a row has the same bits in any batch and on any number of threads.
RGTG_DECLARE(void linear(const Linear& p, int64_t begin, int64_t end, Prefetch prefetch);
             void round_to_bf16(const float* x, void* out, int64_t n))
// Columns begin to end of x [rows, inner] in the order in which the tiles of this instruction set read them, for calls
// of linear() that share these rows. packed_bytes(rows, inner) in size; 0 where linear() reads x where it lies.
RGTG_DECLARE(int64_t packed_bytes(int64_t rows, int64_t inner, int dtype);
             void pack_rows(const void* x, int64_t ldx, int64_t rows, int64_t inner, int64_t begin, int64_t end,
                            void* out))
