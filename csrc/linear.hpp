// The matrix product of a linear layer: y[m, n] = sum over k of x[m, k] * w[n, k], with w as in torch.nn.Linear.
#pragma once

#include "common.hpp"
#include "isa.hpp"

namespace rgtg {

// w is of `dtype`, fp32, bf16 or int8, and x of the same, bf16 where w is int8; sums, bias and y are fp32.
struct Linear {
  const void* x;      // [rows, inner], rows ldx elements apart
  const void* w;      // [outer, inner], contiguous
  const float* bias;  // [outer] or nullptr
  float* y;           // [rows, outer], rows ldy elements apart
  int64_t rows, inner, ldx, ldy;
  int dtype;
  bool accumulate;     // y += instead of y =
  const void* packed;  // the rows as pack_rows() stores them, or nullptr
  const float* scale;  // [outer], int8 alone: each sum is multiplied by its row's before the bias; or nullptr
};

// Packed rows: bf16 rows of x in the order in which an instruction set's tiles read them, packed once for several calls
// of linear() and several threads. Every kPackRows rows are packed apart, and every kPackColumns columns of them.
constexpr int64_t kPackRows = 16, kPackColumns = 32;
inline int64_t packed_bytes(int64_t rows, int64_t inner) {
  return (rows + kPackRows - 1) / kPackRows * kPackRows * ((inner + kPackColumns - 1) / kPackColumns) * kPackColumns *
         2;
}

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
// Packs rows and columns of x, whose rows of `inner` numbers are ldx apart; columns begin at an even one. Does nothing
// where linear() reads x as it is.
RGTG_DECLARE(void pack_rows(const void* x, int64_t ldx, int64_t inner, Range rows, Range columns, void* packed))
