// The layers of a Llama-like decoder for N = batch * tokens new tokens, in one parallel region.
#pragma once

#include "common.hpp"
#include "isa.hpp"
#include "tree_attention.hpp"

namespace rgtg {

enum Activation : int { kSilu = 0, kGeluTanh = 1 };

// The matrix of a linear layer, [outer, inner] contiguous, of the dtype DecoderShape::weights.
struct Weights {
  const void* w;
  const float* bias;   // or nullptr
  const float* scale;  // as in Linear
};

// Norms are fp32, absent ones nullptr.
struct LayerWeights {
  Weights q, k, v, o, gate, up, down;
  const float *input_norm, *mlp_norm, *q_norm, *k_norm;
  const float *attention_out_norm, *mlp_out_norm;  // of what is added to the residual stream
  int64_t rope;                                    // which of the tables of cos and sin
};

// The matrices of a layer in the order of LayerWeights.
enum Matrix : int { kQ = 0, kK = 1, kV = 2, kO = 3, kGate = 4, kUp = 5, kDown = 6, kMatrices = 7 };

// A low-rank update y += b (a x) of one matrix: a [rank, inner] of the model's dtype, b in fp32 and in panels of kPanel
// outputs, [outer / kPanel][rank][kPanel], the last one padded.
constexpr int64_t kPanel = 16;
struct LowRank {
  const void* a;
  const float* b;
  int64_t rank;  // 0: the adapter has no update for this matrix
};

struct DecoderShape {
  int64_t hidden, heads, groups, head_dim, inner, rotary;
  float eps, scale, softcap;  // softcap: as in TreeAttention
  Activation activation;
  int dtype;       // of the embedding, keys, values and the products' inputs
  int weights;     // of the matrices: the same, or int8 beside bf16
  bool out_norms;  // whether layers have the norms of what is added to the residual stream
};

// Keys or values [layers, rows, groups, tokens, head_dim]: strides in elements, the last dimension contiguous.
struct KeyValues {
  void* data;
  int64_t layer, row, group, token;
};

struct DecoderCall {
  const LayerWeights* layers;
  int64_t layer_count;
  const float* final_norm;  // nullptr: x is the output of the last layer
  // Batch row b is of variant b % variants; 0 is the model itself, the others have an adapter each:
  // low_rank[layer][matrix][variant - 1]. rank is the largest of all.
  const LowRank* low_rank;
  int64_t variants, rank;
  const void* embedding;     // [vocabulary, hidden] of the model's dtype
  float embedding_scale;     // factor of its rows, rounded to that dtype
  const int64_t* ids;        // [N], or nullptr where x contains the input states
  float* x;                  // [N, hidden]: the residual stream, and the result
  const float *cos, *sin;    // [tables, positions, rotary]
  int64_t table;             // numbers of one table
  const int64_t* positions;  // [N]
  KeyValues k_cache, v_cache, k_new, v_new;
  const int64_t* lengths;    // [slots of the cache]: tokens of each
  const int64_t* slots;      // [batch]: the slot of each row's prefix, or nullptr: row b's is b
  const int64_t* ancestors;  // [batch, tokens] bit masks or nullptr
  const int64_t* windows;  // [layer_count]: positions that a new token sees, 0 for all; or nullptr: all in every layer
  bool causal;
  int64_t batch, tokens, cache_tokens;
};

// Rows of x that pass through a layer together, so that scratch stays small.
int64_t decoder_chunk(const DecoderCall& call);
int64_t decoder_scratch_bytes(const DecoderShape& shape, const DecoderCall& call, int threads);
// The attention of one layer, without its pointers.
TreeAttention decoder_attention(const DecoderShape& shape, const DecoderCall& call);

}  // namespace rgtg

// The share of one thread; all `threads` run it at once. `scratch` is aligned to 64 bytes, `workspace` is the prepared
// one of decoder_attention(), `state` starts zeroed.
RGTG_DECLARE(void decoder_layers(const DecoderShape& shape, const DecoderCall& call, char* scratch, void* workspace,
                                 BarrierState* state, int thread, int threads))
