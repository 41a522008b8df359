// partial_bt_loss: every prefix of every pair of answers, with the gradient.
#pragma once

#include "common.hpp"

namespace rgtg {

enum class Prefixes : int { kEos = 0, kRepeatLast = 1, kTruncate = 2 };

struct PartialBtLoss {
  bool is_double;
  int64_t M, N;
  const void* rewards;     // [M] double or float
  const int64_t* offsets;  // [2N + 1]
  Prefixes mode;
  bool by_pair;              // every pair counts once, not every term
  const double* normalizer;  // null: the batch's own count
  double* sums;              // [N], for a pair each
  void *loss, *gradient;     // one and [M] numbers of the rewards' type
};

// False, with nothing written, where the offsets do not rise from 0 to M by at least one, or answers differ in length
// in mode kEos.
bool partial_bt_loss(const PartialBtLoss& a, int threads);

}  // namespace rgtg
