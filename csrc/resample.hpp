// resample: one candidate of every row.
#pragma once

#include "common.hpp"
#include "isa.hpp"

namespace rgtg {

struct Resample {
  int dtype;
  int64_t B, K;
  const void *logprobs, *rewards;
  int64_t logprobs_row, rewards_row;  // strides in elements
  const float *beta, *temperature;    // [B]; temperatures are finite and not negative
  const int64_t *seed, *position;     // [B]
  int64_t* choice;                    // [B]
  float* chosen;                      // [B]
};

}  // namespace rgtg

RGTG_DECLARE(void resample(const ::rgtg::Resample& a, int64_t row))
