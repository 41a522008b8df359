// Draws one candidate per row by the Gumbel trick over Philox4x32-10 noise: a first pass finds the best score, a second
// adds up the exponentials and compares the noisy scores, a chunk of candidates at a time.
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
    // v is uniform in (0, 1), e = -log(1 - v) exponential. Where 1 - v rounds to 1, v itself is e; elsewhere the
    // division by 1 - w corrects the rounding.
    const Vec v = min((load(noise + i) + half) * unit, limit), w = one - v;
    const Vec rest = one - w;
    const Vec e = where_equal(rest, zero(), v, (zero() - log(w)) * v / rest);
    store(noise + i, zero() - log(e));
  }
}

// The tilted scores of n candidates, at most a chunk, filled up with −inf to whole vectors.
template <class T>
void tilt(const T* logprobs, const T* rewards, float beta, int64_t n, float* scores) {
  const Vec excluded = set1(-kInf), weight = set1(beta);
  for (int64_t i = 0; i < n; i += kWidth) {
    const int count = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    Vec x = count == kWidth ? load(logprobs + i) : load_n(logprobs + i, count);
    if (beta != 0) {
      const Vec r = count == kWidth ? load(rewards + i) : load_n(rewards + i, count);
      // An excluded candidate stays excluded whatever its reward; only NaN is never hidden.
      x = where_equal(x, excluded, where_equal(r, r, excluded, r), x + weight * r);
    }
    store(scores + i, x);
  }
  for (int64_t i = n; i % kWidth != 0; ++i) scores[i] = -kInf;
}

// The largest of n scores; NaN where any is.
float best_of(const float* scores, int64_t n) {
  const Vec one = set1(1.0f);
  Vec top = set1(-kInf), nans = zero();
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec x = load(scores + i);
    top = max(x, top);
    nans = nans + where_equal(x, x, zero(), one);
  }
  return sum(nans) == 0 ? largest(top) : __builtin_nanf("");
}

// The index of the first x among n scores.
int64_t index_of(float x, const float* scores, int64_t n) {
  int64_t i = 0;
  while (i < n - 1 && scores[i] != x) ++i;
  return i;
}

template <class T>
void draw(const Resample& a, int64_t row) {
  const T* logprobs = static_cast<const T*>(a.logprobs) + row * a.logprobs_row;
  const T* rewards = static_cast<const T*>(a.rewards) + row * a.rewards_row;
  const float beta = a.beta[row], tau = a.temperature[row];
  alignas(64) float scores[kChunk], noise[kChunk];
  float best = -kInf;
  int64_t choice = 0;
  for (int64_t first = 0; first < a.K && best == best; first += kChunk) {
    const int64_t n = a.K - first < kChunk ? a.K - first : kChunk;
    tilt(logprobs + first, rewards + first, beta, n, scores);
    const float here = best_of(scores, n);
    if (here <= best) continue;
    best = here;
    if (here == here) choice = first + index_of(here, scores, n);
  }
  if (!(best > -kInf && best < kInf)) {
    a.choice[row] = -1;
    a.chosen[row] = __builtin_nanf("");
    return;
  }
  float chosen = 0;
  double log_l = 0;
  if (tau > 0) {
    float top = -kInf;
    double l = 0;
    for (int64_t first = 0; first < a.K; first += kChunk) {
      const int64_t n = a.K - first < kChunk ? a.K - first : kChunk;
      gumbel(a.seed[row], a.position[row], first, ((n + 3) / 4 + kWidth - 1) / kWidth * kWidth, noise);
      tilt(logprobs + first, rewards + first, beta, n, scores);
      Vec sums = zero(), highest = set1(-kInf);
      for (int64_t i = 0; i < n; i += kWidth) {
        // Differences first: the best candidate is at 0 for every temperature, however small.
        const Vec x = (load(scores + i) - set1(best)) / set1(tau), noisy = x + load(noise + i);
        sums = sums + exp(x);
        highest = max(noisy, highest);
        store(scores + i, x);
        store(noise + i, noisy);
      }
      l += sum(sums);
      const float here = largest(highest);
      if (here <= top) continue;
      top = here;
      choice = index_of(here, noise, n);
      chosen = scores[choice];
      choice += first;
    }
    log_l = ::log(l);
  }
  a.choice[row] = choice;
  a.chosen[row] = static_cast<float>(chosen - log_l);
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
