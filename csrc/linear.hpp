// The matrix product of a linear layer: y[m, n] = sum over k of x[m, k] * w[n, k], with w as torch.nn.Linear keeps it.
#pragma once

#include "common.hpp"
#include "isa.hpp"

namespace rgtg {

// x and w are both of `dtype` (kFloat32 or kBFloat16); sums, bias and y are fp32.
struct Linear {
  const void* x;        // [rows, inner], rows ldx elements apart
  const void* w;        // [outer, inner], contiguous
  const float* bias;    // [outer] or nullptr
  float* y;             // [rows, outer], rows ldy elements apart
  int64_t rows, inner, ldx, ldy;
  int dtype;
  bool accumulate;      // y += instead of y =
};

// What a thread reads after the present product; it is brought into the cache while the last rows are computed.
struct Upcoming {
  const void* data;
  int64_t bytes;
};

}  // namespace rgtg

// Computes y[:, begin:end] on the calling thread. The order of additions of one y[m, n] depends on `inner` alone, so
// a row's values are the same bits in any batch, whatever the split over threads.
RGTG_DECLARE(void linear(const Linear& p, int64_t begin, int64_t end, Upcoming upcoming);
             void round_to_bf16(const float* x, void* out, int64_t n))
