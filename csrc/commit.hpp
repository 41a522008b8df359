// commit: copies the chosen tokens' keys and values to the end of the prefix. Bytes are copied, so neither instruction set
// nor dtype matters.
#pragma once

#include "common.hpp"

namespace rgtg {

// [layers, rows, heads, tokens, D], contiguous in D; strides in bytes.
struct LayersView {
  char* data;
  int64_t layer, row, head, token;
};

struct Commit {
  int64_t L, B, G, S, T;
  int64_t bytes;  // of the D numbers of one token and head
  LayersView k_new, v_new, k_cache, v_cache;
  int64_t* lengths;  // [slots of the cache], lengths_stride apart
  int64_t lengths_stride;
  const int64_t* choice;  // [B], each from -1 to S - 1
  const int64_t* slots;   // [B], all different: the slot of row b in the caches and lengths; null: b
};

// False, with nothing written, where a choice is no new token or a row's cache is full.
bool commit(const Commit& a, int threads);

}  // namespace rgtg
