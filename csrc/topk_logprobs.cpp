// Top k of a row, its log-sum-exp and its entropy from one read of the logits. A work item is a part of a row: whole
// segments, processed in blocks that stay in the first-level cache between the maximum and the exponentials.
// Candidates are in a heap whose smallest is the threshold for the next; a candidate is one integer that orders by
// score and then by lower token. The thread that finishes the last part of a row merges the parts.
#include "topk_logprobs.hpp"

#include <math.h>

#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

using topk::kSegment;
using topk::Sums;

constexpr int64_t kBlock = 512;
constexpr float kInf = __builtin_inff();

// Larger for the larger score (NaN is the largest), then for the lower token.
inline uint64_t candidate(float score, int64_t token) {
  // Adding 0 turns -0 into 0.
  const uint32_t bits = bits_of_float(score + 0.0f);
  const uint32_t order = score != score ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(order) << 32 | (0xffffffffu - static_cast<uint32_t>(token));
}
inline int64_t token_of(uint64_t candidate) { return 0xffffffffu - static_cast<uint32_t>(candidate); }
inline float score_of(uint64_t candidate) {
  const uint32_t order = static_cast<uint32_t>(candidate >> 32);
  return float_of_bits(order & 0x80000000u ? order & 0x7fffffffu : ~order);
}

// The k largest candidates so far; the smallest of them is at the top.
struct Heap {
  uint64_t* items;
  int64_t capacity, size;

  void sink(int64_t i, int64_t end, uint64_t x) {
    for (;;) {
      int64_t child = 2 * i + 1;
      if (child >= end) break;
      if (child + 1 < end && items[child + 1] < items[child]) ++child;
      if (items[child] >= x) break;
      items[i] = items[child];
      i = child;
    }
    items[i] = x;
  }

  void add(uint64_t x) {
    if (size == capacity) {
      if (x > items[0]) sink(0, size, x);
      return;
    }
    int64_t i = size++;
    while (i > 0 && items[(i - 1) / 2] > x) {
      items[i] = items[(i - 1) / 2];
      i = (i - 1) / 2;
    }
    items[i] = x;
  }

  // A score must be above this to enter, given that its token is higher than all before.
  float threshold() const { return size < capacity ? -kInf : score_of(items[0]); }

  // Largest first.
  void sort() {
    for (int64_t end = size - 1; end > 0; --end) {
      const uint64_t last = items[end];
      items[end] = items[0];
      sink(0, end, last);
    }
  }
};

void offer(Heap* heap, const float* scores, int64_t n, int64_t first_token) {
  int64_t i = 0;
  // Until the heap is full everything enters, −inf too.
  for (; i < n && heap->size < heap->capacity; ++i) heap->add(candidate(scores[i], first_token + i));
  if (i == n) return;
  for (; i % kWidth != 0 && i < n; ++i) heap->add(candidate(scores[i], first_token + i));
  Vec threshold = set1(heap->threshold());
  for (; i < n; i += kWidth) {
    uint32_t hits = greater_or_nan(load(scores + i), threshold);
    if (hits == 0) continue;
    for (; hits != 0; hits &= hits - 1) {
      const int64_t j = i + __builtin_ctz(hits);
      if (j < n) heap->add(candidate(scores[j], first_token + j));
    }
    threshold = set1(heap->threshold());
  }
}

template <class T>
Sums segment(const TopkLogprobs& a, int64_t row, int64_t begin, int64_t end, Heap* heap) {
  alignas(64) float buffer[kBlock], scores[kBlock];
  const T* logits = static_cast<const T*>(a.logits) + row * a.logits_row;
  const float beta = a.guidance == nullptr ? 0.0f : a.beta[row];
  float m = -kInf;
  Vec l = zero(), acc = zero();
  for (int64_t v = begin; v < end; v += kBlock) {
    const int64_t n = end - v < kBlock ? end - v : kBlock, padded = (n + kWidth - 1) / kWidth * kWidth;
    const float* x = reinterpret_cast<const float*>(logits + v);
    if (sizeof(T) != sizeof(float) || padded != n) {
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) store(buffer + i, load(logits + v + i));
      for (; i < n; ++i) buffer[i] = to_float(logits[v + i]);
      for (; i < padded; ++i) buffer[i] = -kInf;
      x = buffer;
    }
    if (beta == 0) {
      offer(heap, x, n, v);
    } else {
      const float* guidance = a.guidance + row * a.guidance_row + v;
      for (int64_t i = 0; i < n; ++i) scores[i] = x[i] + beta * guidance[i];
      for (int64_t i = n; i < padded; ++i) scores[i] = -kInf;
      offer(heap, scores, n, v);
    }
    Vec top = set1(-kInf);
    for (int64_t i = 0; i < padded; i += kWidth) top = max(load(x + i), top);
    const float here = largest(top);
    if (here > m) {
      // Nothing was added before where m was −inf, except NaN, which stays.
      const float shift = m == -kInf ? 0.0f : m - here;
      const Vec factor = set1(m == -kInf ? 0.0f : expf(shift));
      acc = fma(l, set1(shift), acc) * factor;
      l = l * factor;
      m = here;
    }
    const Vec base = set1(m == -kInf ? 0.0f : m), lowest = set1(-104.0f);
    for (int64_t i = 0; i < padded; i += kWidth) {
      // e^-104 is 0, and 0 * -104 too, where 0 * -inf would be NaN.
      const Vec d = max(lowest, load(x + i) - base), e = exp(d);
      l = l + e;
      acc = fma(e, d, acc);
    }
  }
  return {m, sum(l), sum(acc)};
}

template <class T>
void finish_row(const TopkLogprobs& a, int64_t row, const Sums* sums, Heap* heap) {
  float m = -kInf;
  for (int64_t i = 0; i < topk::segments(a); ++i) m = sums[i].m > m ? sums[i].m : m;
  double l = 0, acc = 0;
  for (int64_t i = 0; i < topk::segments(a); ++i) {
    const double shift = sums[i].m == -kInf ? 0.0 : static_cast<double>(sums[i].m) - m;
    const double factor = ::exp(shift);
    l += factor * sums[i].l;
    acc += factor * (sums[i].acc + shift * sums[i].l);
  }
  const double log_l = ::log(l);
  a.entropy[row] = static_cast<float>(log_l - acc / l);
  heap->sort();
  const T* logits = static_cast<const T*>(a.logits) + row * a.logits_row;
  for (int64_t i = 0; i < a.k; ++i) {
    const int64_t token = token_of(heap->items[i]);
    a.tokens[row * a.k + i] = token;
    a.logprobs[row * a.k + i] = static_cast<float>(static_cast<double>(to_float(logits[token])) - m - log_l);
  }
}

template <class T>
void work(const TopkLogprobs& a, int thread, int threads) {
  char* memory = static_cast<char*>(a.workspace);
  int32_t* done = reinterpret_cast<int32_t*>(memory);
  Sums* all_sums = reinterpret_cast<Sums*>(memory + topk::counter_bytes(a));
  char* candidates = memory + topk::counter_bytes(a) + topk::sums_bytes(a);
  const int64_t segments = topk::segments(a), size = topk::candidate_bytes(a);
  for (int64_t item = thread; item < a.B * a.parts; item += threads) {
    const int64_t row = item / a.parts, part = item % a.parts;
    Sums* sums = all_sums + row * segments;
    Heap heap = {reinterpret_cast<uint64_t*>(candidates + item * size), a.k, 0};
    const int64_t last = segments * (part + 1) / a.parts;
    for (int64_t s = segments * part / a.parts; s < last; ++s) {
      const int64_t end = (s + 1) * kSegment < a.V ? (s + 1) * kSegment : a.V;
      sums[s] = segment<T>(a, row, s * kSegment, end, &heap);
    }
    // A part shorter than k is filled up with the smallest key.
    while (heap.size < a.k) heap.add(0);
    if (__atomic_add_fetch(done + row, 1, __ATOMIC_ACQ_REL) < a.parts) continue;
    for (int64_t other = row * a.parts; other < (row + 1) * a.parts; ++other) {
      const uint64_t* found = reinterpret_cast<const uint64_t*>(candidates + other * size);
      if (other == item) continue;
      for (int64_t i = 0; i < a.k; ++i) heap.add(found[i]);
    }
    finish_row<T>(a, row, sums, &heap);
  }
}

}  // namespace

void topk_logprobs(const TopkLogprobs& a, int thread, int threads) {
  switch (a.dtype) {
    case kFloat32: return work<float>(a, thread, threads);
    case kBFloat16: return work<Bf16>(a, thread, threads);
    default: return work<F16>(a, thread, threads);
  }
}

}  // namespace RGTG_ISA
}  // namespace rgtg
