#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "decoder_layers.hpp"

namespace rgtg {

namespace {

constexpr int64_t kChunkRows = 256;

}  // namespace

int64_t decoder_chunk(const DecoderCall& call) {
  const int64_t n = call.batch * call.tokens;
  if (n <= kChunkRows) return n;
  // A tree's token may see any other of its tree, so a tree is never cut.
  if (call.ancestors == nullptr) return kChunkRows;
  return call.tokens >= kChunkRows ? call.tokens : kChunkRows / call.tokens * call.tokens;
}

int64_t decoder_scratch_bytes(const DecoderShape& s, const DecoderCall& call, int threads) {
  const int64_t chunk = decoder_chunk(call);
  const int64_t per_row = (s.heads + 2 * s.groups) * s.head_dim + 3 * s.inner + 2 * s.heads * s.head_dim;
  return 4 * chunk * (per_row + threads * s.hidden + 3 * call.rank) + 64 * (9 + threads);
}

TreeAttention decoder_attention(const DecoderShape& s, const DecoderCall& call) {
  TreeAttention a{};
  a.dtype = s.dtype;
  a.B = call.batch, a.H = s.heads, a.G = s.groups, a.S = call.tokens, a.T = call.cache_tokens, a.D = s.head_dim;
  a.lengths = call.lengths;
  a.ancestors = call.ancestors;
  a.scale = s.scale;
  a.causal = call.causal;
  a.count = call.batch * call.tokens;
  return a;
}

namespace {

using Addresses = std::vector<uintptr_t>;

// The model's weights as a table of addresses, and the scratch that its calls share.
class DecoderLayers {
 public:
  DecoderLayers(const std::vector<Addresses>& layers, uintptr_t final_norm, uintptr_t embedding, int64_t vocabulary,
                float embedding_scale, int64_t hidden, int64_t heads,
                int64_t groups, int64_t head_dim, int64_t inner, int64_t rotary, float eps, float scale, int activation,
                int dtype)
      : shape_{hidden, heads, groups, head_dim, inner, rotary, eps, scale, static_cast<Activation>(activation), dtype},
        final_norm_(reinterpret_cast<const float*>(final_norm)),
        embedding_(reinterpret_cast<const void*>(embedding)),
        vocabulary_(vocabulary),
        embedding_scale_(embedding_scale) {
    for (const Addresses& a : layers) {
      if (a.size() != 18) throw std::invalid_argument("a layer has 18 addresses");
      auto matrix = [&](int i) { return reinterpret_cast<const void*>(a[i]); };
      auto vector = [&](int i) { return reinterpret_cast<const float*>(a[i]); };
      layers_.push_back({matrix(0), matrix(1), matrix(2), matrix(3), matrix(4), matrix(5), matrix(6), vector(7),
                         vector(8), vector(9), vector(10), vector(11), vector(12), vector(13), vector(14), vector(15),
                         vector(16), vector(17)});
    }
  }

  // The corrections of every layer's matrices by every adapter, in this order: (a, b, rank) each. An empty table: none.
  void adapt(const std::vector<Addresses>& table) {
    std::lock_guard<std::mutex> one_call(mutex_);
    low_rank_.clear();
    rank_ = 0;
    for (const Addresses& p : table) {
      if (p.size() != 3) throw std::invalid_argument("a correction has two addresses and a rank");
      low_rank_.push_back({reinterpret_cast<const void*>(p[0]), reinterpret_cast<const float*>(p[1]),
                           static_cast<int64_t>(p[2])});
      if (low_rank_.back().rank > rank_) rank_ = low_rank_.back().rank;
    }
    if (table.size() % (layers_.size() * kMatrices) != 0) throw std::invalid_argument("a correction is missing");
  }

  // Layers first to last - 1; the last of all is followed by the final norm. Without ids, x holds the states that enter.
  // Addresses and strides of k_cache, v_cache, k_new and v_new: (address, layer, row, group, token) each.
  // False, with nothing computed, where an id is outside the vocabulary.
  bool forward(int64_t first, int64_t last, int64_t variants, uintptr_t ids, uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t positions,
               const std::vector<Addresses>& kv, uintptr_t lengths,
               uintptr_t ancestors, bool causal, int64_t batch, int64_t tokens,
               int64_t cache_tokens, int threads) {
    auto key_values = [&](int i) {
      const Addresses& a = kv.at(i);
      return KeyValues{reinterpret_cast<void*>(a.at(0)), static_cast<int64_t>(a.at(1)), static_cast<int64_t>(a.at(2)),
                       static_cast<int64_t>(a.at(3)), static_cast<int64_t>(a.at(4))};
    };
    const int64_t adapters = static_cast<int64_t>(low_rank_.size() / (layers_.size() * kMatrices));
    if (variants != 1 && variants != 1 + adapters) throw std::invalid_argument("variants are not those of adapt()");
    const bool ends = last == static_cast<int64_t>(layers_.size());
    DecoderCall call{layers_.data() + first,
                     last - first,
                     ends ? final_norm_ : nullptr,
                     low_rank_.data() + first * kMatrices * adapters,
                     variants,
                     variants > 1 ? rank_ : 0,
                     embedding_,
                     embedding_scale_,
                     reinterpret_cast<const int64_t*>(ids),
                     reinterpret_cast<float*>(x),
                     reinterpret_cast<const float*>(cos),
                     reinterpret_cast<const float*>(sin),
                     reinterpret_cast<const int64_t*>(positions),
                     key_values(0),
                     key_values(1),
                     key_values(2),
                     key_values(3),
                     reinterpret_cast<const int64_t*>(lengths),
                     reinterpret_cast<const int64_t*>(ancestors),
                     causal,
                     batch,
                     tokens,
                     cache_tokens};
    for (int64_t n = 0; call.ids != nullptr && n < batch * tokens; ++n) {
      if (call.ids[n] < 0 || call.ids[n] >= vocabulary_) return false;
    }
    const TreeAttention attention = decoder_attention(shape_, call);
    const Isa isa = current_isa();
    pybind11::gil_scoped_release release;
    std::lock_guard<std::mutex> one_call(mutex_);
    const int64_t own = (decoder_scratch_bytes(shape_, call, threads) + 63) / 64 * 64;
    const int64_t bytes = own + static_cast<int64_t>(tree_attention_workspace(attention, threads));
    if (bytes > scratch_bytes_) {
      scratch_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      scratch_bytes_ = scratch_ ? bytes : 0;
      if (!scratch_) throw std::bad_alloc();
    }
    void* workspace = scratch_.get() + own;
    tree_attention_prepare(attention, workspace);
    BarrierState state{};
    auto body = [&](int thread, int n) {
      RGTG_DISPATCH(isa, decoder_layers(shape_, call, scratch_.get(), workspace, &state, thread, n));
    };
    parallel_for(threads, body);
    return true;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  DecoderShape shape_;
  const float* final_norm_;
  const void* embedding_;
  int64_t vocabulary_;
  float embedding_scale_;
  std::vector<LayerWeights> layers_;
  std::vector<LowRank> low_rank_;
  int64_t rank_ = 0;
  std::unique_ptr<char, Free> scratch_;
  int64_t scratch_bytes_ = 0;
  std::mutex mutex_;
};

}  // namespace

void bind_decoder_layers(pybind11::module_& m) {
  pybind11::class_<DecoderLayers>(m, "DecoderLayers")
      .def(pybind11::init<const std::vector<Addresses>&, uintptr_t, uintptr_t, int64_t, float, int64_t, int64_t,
                          int64_t, int64_t, int64_t, int64_t, float, float, int, int>())
      .def("adapt", &DecoderLayers::adapt)
      .def("forward", &DecoderLayers::forward);
}

}  // namespace rgtg
