// Draws one candidate per row by the Gumbel trick over Philox4x32-10 noise: a first pass finds the best score, a second
// one adds up the exponentials and compares the noisy scores, a chunk of candidates at a time.
#include "resample.hpp"

#include <math.h>

#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

// Counters that are encrypted together; each gives the noise of four candidates.
constexpr int64_t kCounters = 64;
constexpr int64_t kChunk = 4 * kCounters;
constexpr float kInf = __builtin_inff();
static_assert(kCounters % kWidth == 0, "a chunk is made of whole vectors");

// Gumbel noise of the candidates first to first + 4 * counters - 1, with first a multiple of 4.
void gumbel(int64_t seed, int64_t position, int64_t first, int64_t counters, float* noise) {
  alignas(64) uint32_t c0[kCounters], c1[kCounters], c2[kCounters], c3[kCounters];
  for (int64_t i = 0; i < counters; ++i) {
    c0[i] = static_cast<uint32_t>(first / 4 + i);
    c1[i] = static_cast<uint32_t>(position);
    c2[i] = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t i = 0; i < counters; ++i) {
      const uint64_t p0 = static_cast<uint64_t>(c0[i]) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2[i]) * 0xCD9E8D57u;
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int64_t i = 0; i < counters; ++i) {
    noise[4 * i] = static_cast<float>(c0[i]);
    noise[4 * i + 1] = static_cast<float>(c1[i]);
    noise[4 * i + 2] = static_cast<float>(c2[i]);
    noise[4 * i + 3] = static_cast<float>(c3[i]);
  }
  const Vec one = set1(1.0f), half = set1(0.5f), unit = set1(0x1p-32f), limit = set1(1.0f - 0x1p-24f);
  for (int64_t i = 0; i < 4 * counters; i += kWidth) {
    // v is uniform in (0, 1), e = -log(1 - v) exponential. Where 1 - v rounds to 1, v itself is e; dividing by the
    // v that w stands for makes up for the rounding elsewhere.
    const Vec v = min((load(noise + i) + half) * unit, limit), w = one - v;
    const Vec rest = one - w;
    const Vec e = where_zero(rest, v, (zero() - log(w)) * v / rest);
    store(noise + i, zero() - log(e));
  }
}

// The tilted score of a candidate.
struct Score {
  float beta;
  float operator()(float logprob, float reward) const {
    if (beta == 0) return logprob;
    // An excluded candidate stays excluded whatever its reward; only NaN is never hidden.
    if (logprob == -kInf) return reward != reward ? reward : logprob;
    return logprob + beta * reward;
  }
};

template <class T>
void draw(const Resample& a, int64_t row) {
  const T* logprobs = static_cast<const T*>(a.logprobs) + row * a.logprobs_row;
  const T* rewards = static_cast<const T*>(a.rewards) + row * a.rewards_row;
  const Score score = {a.beta[row]};
  const float tau = a.temperature[row];
  float best = -kInf;
  int64_t at = 0;
  for (int64_t j = 0; j < a.K; ++j) {
    const float x = score(to_float(logprobs[j]), to_float(rewards[j]));
    if (x > best || x != x) {
      best = x;
      at = j;
      if (x != x) break;
    }
  }
  if (!(best > -kInf && best < kInf)) {
    a.choice[row] = -1;
    a.chosen[row] = __builtin_nanf("");
    return;
  }
  if (tau == 0) {
    a.choice[row] = at;
    a.chosen[row] = 0;
    return;
  }
  alignas(64) float scaled[kChunk], noise[kChunk];
  float top = -kInf, chosen = 0;
  double total = 0;
  for (int64_t first = 0; first < a.K; first += kChunk) {
    const int64_t n = a.K - first < kChunk ? a.K - first : kChunk;
    const int64_t counters = ((n + 3) / 4 + kWidth - 1) / kWidth * kWidth;
    gumbel(a.seed[row], a.position[row], first, counters, noise);
    for (int64_t i = 0; i < n; ++i) {
      // Differences first: the best candidate is at 0 for every temperature, however small.
      scaled[i] = (score(to_float(logprobs[first + i]), to_float(rewards[first + i])) - best) / tau;
    }
    for (int64_t i = n; i < 4 * counters; ++i) scaled[i] = -kInf;
    Vec sums = zero();
    for (int64_t i = 0; i < n; i += kWidth) sums = sums + exp(load(scaled + i));
    total += sum(sums);
    for (int64_t i = 0; i < n; ++i) {
      const float x = scaled[i] + noise[i];
      if (x > top) {
        top = x;
        at = first + i;
        chosen = scaled[i];
      }
    }
  }
  a.choice[row] = at;
  a.chosen[row] = static_cast<float>(chosen - ::log(total));
}

}  // namespace

void resample(const Resample& a, int64_t row) {
  switch (a.dtype) {
    case kFloat32: return draw<float>(a, row);
    case kBFloat16: return draw<Bf16>(a, row);
    default: return draw<F16>(a, row);
  }
}

}  // namespace RGTG_ISA
}  // namespace rgtg
