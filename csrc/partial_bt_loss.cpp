// The Bradley-Terry terms of all prefixes. A packed batch has a few thousand, each an exponential and a logarithm, so
// this is scalar code in double precision, the same for every instruction set.
#include "partial_bt_loss.hpp"

#include <math.h>

namespace rgtg {
namespace {

// Terms that are worth a thread of their own.
constexpr int64_t kWorthAThread = 4096;

int64_t terms(const PartialBtLoss& a, int64_t chosen, int64_t rejected) {
  return (chosen < rejected) == (a.mode == Prefixes::kTruncate) ? chosen : rejected;
}

template <class T>
double pair_loss(const PartialBtLoss& a, int64_t pair, double scale) {
  const int64_t *at = a.offsets + 2 * pair, chosen = at[1] - at[0], rejected = at[2] - at[1];
  const T *w = static_cast<const T*>(a.rewards) + at[0], *l = w + chosen;
  T *slope_w = static_cast<T*>(a.gradient) + at[0], *slope_l = slope_w + chosen;
  const int64_t n = terms(a, chosen, rejected);
  const double share = a.by_pair ? scale / static_cast<double>(n) : scale;
  // The last reward of the shorter answer sums the slopes of all terms that it appears in.
  double sum = 0, last_w = 0, last_l = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t iw = i < chosen ? i : chosen - 1, il = i < rejected ? i : rejected - 1;
    const double margin = static_cast<double>(w[iw]) - static_cast<double>(l[il]);
    const double e = ::exp(-::fabs(margin));
    sum += (margin < 0 ? -margin : 0) + ::log1p(e);
    const double slope = share * (margin >= 0 ? e : 1.0) / (1.0 + e);
    if (iw < chosen - 1) {
      slope_w[iw] = static_cast<T>(-slope);
    } else {
      last_w -= slope;
    }
    if (il < rejected - 1) {
      slope_l[il] = static_cast<T>(slope);
    } else {
      last_l += slope;
    }
  }
  for (int64_t i = n; i < chosen - 1; ++i) slope_w[i] = 0;
  for (int64_t i = n; i < rejected - 1; ++i) slope_l[i] = 0;
  slope_w[chosen - 1] = static_cast<T>(last_w);
  slope_l[rejected - 1] = static_cast<T>(last_l);
  return share * sum;
}

}  // namespace

bool partial_bt_loss(const PartialBtLoss& a, int threads) {
  if (a.offsets[0] != 0 || a.offsets[2 * a.N] != a.M) return false;
  int64_t count = 0;
  for (int64_t pair = 0; pair < a.N; ++pair) {
    const int64_t* at = a.offsets + 2 * pair;
    // Compared before they are subtracted: only offsets within the rewards have differences that cannot overflow.
    if (at[1] <= at[0] || at[2] <= at[1] || at[2] > a.M) return false;
    const int64_t chosen = at[1] - at[0], rejected = at[2] - at[1];
    if (a.mode == Prefixes::kEos && chosen != rejected) return false;
    count += terms(a, chosen, rejected);
  }
  const double normalizer = a.normalizer != nullptr ? *a.normalizer : static_cast<double>(a.by_pair ? a.N : count);
  const double scale = 1.0 / normalizer;
  const int64_t useful = (count + kWorthAThread - 1) / kWorthAThread, most = useful < a.N ? useful : a.N;
  if (threads > most) threads = most < 1 ? 1 : static_cast<int>(most);
  auto body = [&](int thread, int n) {
    const Range mine = share(a.N, thread, n);
    for (int64_t pair = mine.begin; pair < mine.end; ++pair) {
      a.sums[pair] = a.is_double ? pair_loss<double>(a, pair, scale) : pair_loss<float>(a, pair, scale);
    }
  };
  parallel_for(threads, body);
  // Pair after pair, whatever the number of threads.
  double loss = 0;
  for (int64_t pair = 0; pair < a.N; ++pair) loss += a.sums[pair];
  if (a.is_double) {
    *static_cast<double*>(a.loss) = loss;
  } else {
    *static_cast<float*>(a.loss) = static_cast<float>(loss);
  }
  return true;
}

}  // namespace rgtg
