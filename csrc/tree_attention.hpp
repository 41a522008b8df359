// tree_attention, as a whole op and from inside a parallel region:
//
//     bytes = tree_attention_workspace(a, threads);    with first = 0, count = B * S; the memory is 64-byte aligned
//     tree_attention_prepare(a, workspace);            once, outside the region
//     in every thread of the region, for every layer and every range of tokens:
//         RGTG_DISPATCH(isa, tree_attention(a, workspace, thread, threads));    or without, in an ISA's own namespace
//         barrier(...);                                before any thread reads a.out or calls again
//
// Between the calls of one preparation only pointers, strides, first, count, window, softcap and sinks may change; where
// the window does, tree_attention_workspace() wants a window of 0, which needs the most. The order of additions of one new
// token depends on the window, on its own row's length, on its own index in the row and on its mask alone: its result has
// the same bits in any batch, any range and on any number of threads.
#pragma once

#include <cstring>

#include "common.hpp"
#include "isa.hpp"

namespace rgtg {

// New tokens that an ancestor mask can name.
constexpr int64_t kMaskBits = 64;

// [rows, heads, tokens, D], contiguous in D; strides in elements.
struct HeadsView {
  void* data;
  int64_t row, head, token;
};

struct TreeAttention {
  int dtype;
  int64_t B, H, G, S, T, D;
  HeadsView q, k, v, k_cache, v_cache, out;
  const int64_t* lengths;    // [slots of the cache], each from 0 to T
  const int64_t* ancestors;  // [B, S] bit masks, or null
  float scale;
  bool causal;
  // The new tokens that are computed: count of all B * S (token s of row b is number b * S + s), beginning with first.
  int64_t first, count;
  // Positions that a new token sees, its own included; 0: all. Its own is its row's length plus its depth: 0 without a
  // mask, its index with `causal`, else the bits of its mask - 1 (0 for an empty mask).
  int64_t window = 0;
  float softcap = 0;            // c: a scaled score x becomes c tanh(x / c); 0: it stays
  const void* sinks = nullptr;  // [H] of dtype: logits of the softmax without a value, or null
  // [B]: row b's prefix is in slots[b] of k_cache, v_cache and lengths, which are then of any number of slots; null: in b.
  const int64_t* slots = nullptr;
};

// Bytes of memory that the threads share while they work.
static inline size_t tree_attention_workspace(const TreeAttention& a, int threads);
static inline void tree_attention_prepare(const TreeAttention& a, void* workspace);

// The plan of the work, the same for every instruction set.
namespace attention {

// Query rows (a new token of a query head) of one work item.
constexpr int64_t kRows = 128;
// Positions of the prefix of one work item. Fixed, so that the order of additions depends on the row's own length (and the
// window) only.
constexpr int64_t kSplit = 128;

struct Header {
  alignas(64) int64_t next;      // first work item that no thread has taken
  alignas(64) int64_t finished;  // threads that found none left
};

struct Layout {
  Header* header;
  int32_t* done;    // [B][row blocks][G]: items of the query rows that are done
  float* scratch;   // [threads][thread_floats]
  float* partials;  // [items of rows with several splits][partial_floats]
};

static inline int64_t row_blocks(const TreeAttention& a) { return (a.S * (a.H / a.G) + kRows - 1) / kRows; }
// Where the prefix of row b is, and its tokens.
static inline int64_t slot_of(const TreeAttention& a, int64_t b) { return a.slots == nullptr ? b : a.slots[b]; }
static inline int64_t length_of(const TreeAttention& a, int64_t b) { return a.lengths[slot_of(a, b)]; }
// The first position that a new token of row b sees. Those before it are not read: splits are counted from here.
static inline int64_t first_seen(const TreeAttention& a, int64_t b) {
  const int64_t length = length_of(a, b);
  return a.window > 0 && length >= a.window ? length - a.window + 1 : 0;
}
static inline int64_t splits(const TreeAttention& a, int64_t b) {
  const int64_t seen = length_of(a, b) - first_seen(a, b);
  return seen <= kSplit ? 1 : (seen + kSplit - 1) / kSplit;
}
static inline int64_t padded(int64_t d) { return (d + 15) / 16 * 16; }
// Query rows of the largest work item.
static inline int64_t item_rows(const TreeAttention& a) {
  const int64_t rows = a.S * (a.H / a.G);
  return rows < kRows ? rows : kRows;
}
// Floats of one work item's partial result: acc, m and l of every query row.
static inline int64_t partial_floats(const TreeAttention& a) { return item_rows(a) * (padded(a.D) + 2); }
// Floats of one thread: queries, acc, keys, values, scores, m, l and factors.
constexpr int64_t kBlock = 64;
static inline int64_t thread_floats(const TreeAttention& a) {
  // A whole number of cache lines, because kRows * 67 is not.
  return (padded(a.D) * (2 * kRows + 2 * kBlock) + kRows * (kBlock + 3) + 15) / 16 * 16;
}

static inline int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }
static inline int64_t counters(const TreeAttention& a) { return a.B * row_blocks(a) * a.G; }
static inline Layout layout(const TreeAttention& a, void* workspace, int threads) {
  char* p = static_cast<char*>(workspace);
  Layout l;
  l.header = reinterpret_cast<Header*>(p);
  p += sizeof(Header);
  l.done = reinterpret_cast<int32_t*>(p);
  p += round64(counters(a) * static_cast<int64_t>(sizeof(int32_t)));
  l.scratch = reinterpret_cast<float*>(p);
  p += threads * thread_floats(a) * static_cast<int64_t>(sizeof(float));
  l.partials = reinterpret_cast<float*>(p);
  return l;
}

// The new tokens of row b that are computed.
static inline Range tokens_of_row(const TreeAttention& a, int64_t b) {
  const int64_t begin = a.first - b * a.S, end = begin + a.count;
  const Range tokens = {begin < 0 ? 0 : begin, end < a.S ? end : a.S};
  return tokens.begin < tokens.end ? tokens : Range{0, 0};
}

}  // namespace attention

static inline size_t tree_attention_workspace(const TreeAttention& a, int threads) {
  int64_t items = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    const int64_t splits = attention::splits(a, b);
    if (splits > 1) items += attention::row_blocks(a) * a.G * splits;
  }
  const attention::Layout l = attention::layout(a, nullptr, threads);
  return reinterpret_cast<size_t>(l.partials + items * attention::partial_floats(a));
}

static inline void tree_attention_prepare(const TreeAttention& a, void* workspace) {
  const attention::Layout l = attention::layout(a, workspace, 1);
  std::memset(workspace, 0, reinterpret_cast<char*>(l.scratch) - static_cast<char*>(workspace));
}

}  // namespace rgtg

RGTG_DECLARE(void tree_attention(const ::rgtg::TreeAttention& a, void* workspace, int thread, int threads))
