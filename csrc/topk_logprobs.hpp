// topk_logprobs: workspace, plan and kernel.
#pragma once

#include "common.hpp"
#include "isa.hpp"

namespace rgtg {

struct TopkLogprobs {
  int dtype;
  int64_t B, V, k;
  const void* logits;
  int64_t logits_row;     // stride in elements
  const float* guidance;  // or null
  int64_t guidance_row;
  const float* beta;  // [B], with guidance
  float* logprobs;    // [B, k]
  int64_t* tokens;    // [B, k]
  float* entropy;     // [B]
  int64_t parts;      // work items per row, each with candidates of its own
  void* workspace;    // topk_workspace(a) bytes, 64-byte aligned; it begins with B counters, zeroed by the caller
};

namespace topk {

// Logits whose sums are added up on their own. Fixed, so that a row's result has the same bits on any number of
// threads.
constexpr int64_t kSegment = 8192;

// Of the logits x of one segment: m = max x, l = sum of e^(x - m), acc = sum of e^(x - m) (x - m).
struct Sums {
  float m, l, acc;
};

static inline int64_t segments(const TopkLogprobs& a) { return (a.V + kSegment - 1) / kSegment; }
static inline int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int64_t counter_bytes(const TopkLogprobs& a) { return round64(a.B * 4); }
static inline int64_t sums_bytes(const TopkLogprobs& a) {
  return round64(a.B * segments(a) * static_cast<int64_t>(sizeof(Sums)));
}
static inline int64_t candidate_bytes(const TopkLogprobs& a) { return round64(a.k * 8); }

}  // namespace topk

static inline int64_t topk_workspace(const TopkLogprobs& a) {
  return topk::counter_bytes(a) + topk::sums_bytes(a) + a.B * a.parts * topk::candidate_bytes(a);
}

}  // namespace rgtg

RGTG_DECLARE(void topk_logprobs(const ::rgtg::TopkLogprobs& a, int thread, int threads))
