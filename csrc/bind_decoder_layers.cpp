#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.hpp"
#include "bindings.hpp"
#include "decoder_layers.hpp"
#include "linear.hpp"

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
  const int64_t norms = (threads + (s.out_norms ? 1 : 0)) * s.hidden;
  const int64_t packed = packed_bytes(chunk, s.inner) +
                         threads * (packed_bytes(chunk, s.hidden) + packed_bytes(chunk, s.heads * s.head_dim));
  return 4 * chunk * (per_row + norms + 3 * call.rank) + packed + 64 * (13 + 3 * threads);
}

TreeAttention decoder_attention(const DecoderShape& s, const DecoderCall& call) {
  TreeAttention a{};
  a.dtype = s.dtype;
  a.B = call.batch, a.H = s.heads, a.G = s.groups, a.S = call.tokens, a.T = call.cache_tokens, a.D = s.head_dim;
  a.lengths = call.lengths;
  a.slots = call.slots;
  a.ancestors = call.ancestors;
  a.scale = s.scale;
  a.softcap = s.softcap;
  a.causal = call.causal;
  a.count = call.batch * call.tokens;
  return a;
}

namespace {

using Optional = std::optional<Array>;

constexpr const char* kMatrixNames[] = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"};
constexpr size_t kNorms = 6;
// Of a layer: the matrices, their biases, the norms, and the matrices' scales.
constexpr size_t kTensors = 3 * kMatrices + kNorms;

const float* floats(const Optional& a) { return a ? memory<float>(*a) : nullptr; }

int64_t at_least_one(int64_t n, const char* name) {
  if (n < 1) refuse(std::string(name) + "=" + std::to_string(n) + ": use at least 1");
  return n;
}

// The model's weights as a table of addresses, and the scratch that its calls share.
class DecoderLayers {
 public:
  // Of each layer its tensors, and in `ropes` the number of its tables of cos and sin.
  DecoderLayers(const std::vector<std::vector<Optional>>& layers, const std::vector<int64_t>& ropes,
                const Array& final_norm, const Array& embedding, float embedding_scale, int64_t heads, int64_t groups,
                int64_t head_dim, int64_t rotary, float eps, float scale, float softcap, int activation)
      : embedding_(embedding), embedding_scale_(embedding_scale) {
    expect_rank(embedding, "the embedding", 2);
    expect_float(embedding, "the embedding", false);
    expect_contiguous(embedding, "the embedding");
    const int64_t hidden = at_least_one(size(embedding, 1), "hidden_size");
    if (at_least_one(heads, "heads") % at_least_one(groups, "key-value heads") != 0) {
      refuse(std::to_string(heads) + " heads cannot share " + std::to_string(groups) + " key-value heads");
    }
    // Larger ones have products that overflow, and no matrix that fits them.
    if (heads > kMost || at_least_one(head_dim, "head_dim") > kMost) refuse("heads or head_dim is too large");
    if (rotary < 0 || rotary > head_dim || rotary % 2 != 0) {
      refuse("rotary=" + std::to_string(rotary) + " of head_dim=" + std::to_string(head_dim) + ": use an even number");
    }
    if (activation != kSilu && activation != kGeluTanh) refuse("activation " + std::to_string(activation));
    at_least_one(static_cast<int64_t>(layers.size()), "layers");
    const Optional* const gate = layers[0].size() > kGate ? &layers[0][kGate] : nullptr;
    if (gate == nullptr || !*gate) refuse("a layer has no gate_proj");
    expect_rank(**gate, "gate_proj", 2);
    const int64_t inner = at_least_one(size(**gate, 0), "intermediate_size");
    if (ropes.size() != layers.size()) refuse("a layer has no rope");
    shape_ = {hidden,           heads,         groups, head_dim, inner,
              rotary,           eps,           scale,  softcap,  static_cast<Activation>(activation),
              dtype(embedding), dtype(**gate), false};
    if (shape_.weights != shape_.dtype && (shape_.weights != kInt8 || shape_.dtype != kBFloat16)) {
      refuse("gate_proj has dtype code " + std::to_string(shape_.weights) + " and the embedding " +
             std::to_string(shape_.dtype) + ": use one for both, or int8 beside bfloat16");
    }
    expect_contiguous(final_norm, "the final norm", kFloat32, {hidden});
    final_norm_ = memory<float>(final_norm);
    for (size_t i = 0; i < layers.size(); ++i) add(layers[i], ropes[i]);
  }

  // The low-rank factors a and b, or nothing, of every layer's matrices for every adapter, in this order. An empty table
  // means no adapters.
  void adapt(const std::vector<std::pair<Optional, Optional>>& table) {
    const size_t matrices = layers_.size() * kMatrices;
    if (table.size() % matrices != 0) refuse("a correction is missing");
    const size_t adapters = table.size() / matrices;
    std::vector<LowRank> low_rank;
    int64_t most = 0;
    for (size_t i = 0; i < table.size(); ++i) {
      const auto& [a, b] = table[i];
      if (a.has_value() != b.has_value()) refuse("a correction has one factor");
      if (!a) {
        low_rank.push_back({nullptr, nullptr, 0});
        continue;
      }
      const auto [outer, inner] = matrix_shape(static_cast<int>(i / adapters % kMatrices));
      expect_rank(*a, "lora_A", 2);
      const int64_t rank = at_least_one(size(*a, 0), "rank");
      expect_contiguous(*a, "lora_A", shape_.dtype, {rank, inner});
      expect_contiguous(*b, "lora_B", kFloat32, {(outer + kPanel - 1) / kPanel, rank, kPanel});
      low_rank.push_back({memory<void>(*a), memory<float>(*b), rank});
      if (rank > most) most = rank;
    }
    std::lock_guard<std::mutex> one_call(mutex_);
    low_rank_ = std::move(low_rank);
    rank_ = most;
  }

  // Layers first to last - 1 over x [B, S, hidden]; the last of all is followed by the final norm. Without ids [B, S], x
  // contains the input states. kv: k_cache, v_cache [last - first, N, G, T, D], k_new, v_new [last - first, B, G, S, D];
  // slots: [B] or nothing, then N = B.
  // windows: of each of these layers, 0 for none; empty: none in any. False, with nothing computed, where an id is
  // outside the vocabulary.
  bool forward(int64_t first, int64_t last, int64_t variants, const Optional& ids, const Array& x, const Array& cos,
               const Array& sin, const Array& positions, const std::vector<Array>& kv, const Array& lengths,
               const Optional& ancestors, const Optional& slots, const std::vector<int64_t>& windows, bool causal,
               int threads) {
    if (first < 0 || first >= last || last > static_cast<int64_t>(layers_.size())) refuse("no such layers");
    if (kv.size() != 4) refuse("keys and values are k_cache, v_cache, k_new and v_new");
    expect_rank(positions, "positions", 2);
    expect_rank(kv[0], "k_cache", 5);
    expect_rank(cos, "cos", 3);
    const int64_t B = size(positions, 0), S = size(positions, 1), T = size(kv[0], 3), P = size(cos, 1);
    const int64_t N = slots ? size(kv[0], 1) : B;
    expect_contiguous(positions, "positions", kInt64, {B, S});
    expect_contiguous(x, "x", kFloat32, {B, S, shape_.hidden});
    expect_contiguous(cos, "cos", kFloat32, {ropes_, P, shape_.rotary});
    expect_contiguous(sin, "sin", kFloat32, {ropes_, P, shape_.rotary});
    expect_contiguous(lengths, "lengths", kInt64, {N});
    if (slots) expect_slots(*slots, B, N, false);
    if (ids) expect_contiguous(*ids, "ids", kInt64, {B, S});
    if (ids && first != 0) refuse("ids enter layer 0");
    if (ancestors) expect_contiguous(*ancestors, "ancestors", kInt64, {B, S});
    if (ancestors && (causal || S > kMaskBits)) refuse("ancestors want causal=False and S <= 64");
    if (!windows.empty() && static_cast<int64_t>(windows.size()) != last - first) refuse("a layer has no window");
    for (int64_t window : windows) {
      if (window < 0) refuse("a window is negative");
    }
    for (size_t i = 0; i < kv.size(); ++i) {
      expect(kv[i], "keys or values", shape_.dtype,
             {last - first, i < 2 ? N : B, shape_.groups, i < 2 ? T : S, shape_.head_dim});
      expect_dense(kv[i], "keys or values");
      if (i >= 2) expect_apart(kv[i], "new keys or values");
    }
    for (int64_t b = 0; b < B; ++b) {
      const int64_t length = memory<int64_t>(lengths)[slots ? memory<int64_t>(*slots)[b] : b];
      if (length < 0 || length > T) refuse("a length is outside the cache");
    }
    for (int64_t n = 0; n < B * S; ++n) {
      if (memory<int64_t>(positions)[n] < 0 || memory<int64_t>(positions)[n] >= P) {
        refuse("a position is outside the tables");
      }
      if (ids && (memory<int64_t>(*ids)[n] < 0 || memory<int64_t>(*ids)[n] >= size(embedding_, 0))) return false;
    }
    if (B * S == 0) return true;
    if (threads < 1) threads = 1;
    auto key_values = [&](int i) {
      const Array& a = kv[i];
      return KeyValues{memory<void>(a), stride(a, 0), stride(a, 1), stride(a, 2), stride(a, 3)};
    };
    // From here on no other call changes the adapters or the scratch.
    std::lock_guard<std::mutex> one_call(mutex_);
    const int64_t adapters = static_cast<int64_t>(low_rank_.size() / (layers_.size() * kMatrices));
    if (variants != 1 && variants != 1 + adapters) refuse("variants are not those of adapt()");
    const DecoderCall call{layers_.data() + first,
                           last - first,
                           last == static_cast<int64_t>(layers_.size()) ? final_norm_ : nullptr,
                           low_rank_.data() + first * kMatrices * adapters,
                           variants,
                           variants > 1 ? rank_ : 0,
                           memory<void>(embedding_),
                           embedding_scale_,
                           ids ? memory<int64_t>(*ids) : nullptr,
                           memory<float>(x),
                           memory<float>(cos),
                           memory<float>(sin),
                           P * shape_.rotary,
                           memory<int64_t>(positions),
                           key_values(0),
                           key_values(1),
                           key_values(2),
                           key_values(3),
                           memory<int64_t>(lengths),
                           slots ? memory<int64_t>(*slots) : nullptr,
                           ancestors ? memory<int64_t>(*ancestors) : nullptr,
                           windows.empty() ? nullptr : windows.data(),
                           causal,
                           B,
                           S,
                           T};
    run(call, threads);
    return true;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static constexpr int64_t kMost = int64_t{1} << 30;

  // [outer, inner] of a layer's matrix.
  std::pair<int64_t, int64_t> matrix_shape(int matrix) const {
    const int64_t mixed = shape_.heads * shape_.head_dim, keys = shape_.groups * shape_.head_dim;
    switch (matrix) {
      case kQ: return {mixed, shape_.hidden};
      case kK:
      case kV: return {keys, shape_.hidden};
      case kO: return {shape_.hidden, mixed};
      case kDown: return {shape_.hidden, shape_.inner};
      default: return {shape_.inner, shape_.hidden};
    }
  }

  void add(const std::vector<Optional>& layer, int64_t rope) {
    if (layer.size() != kTensors) refuse("a layer has " + std::to_string(kTensors) + " tensors");
    if (rope < 0 || rope > kMost) refuse("a rope is negative");
    if (rope >= ropes_) ropes_ = rope + 1;
    for (int i = 0; i < kMatrices; ++i) {
      const auto [outer, inner] = matrix_shape(i);
      if (!layer[i]) refuse(std::string("a layer has no ") + kMatrixNames[i]);
      expect_contiguous(*layer[i], kMatrixNames[i], shape_.weights, {outer, inner});
      const Optional& bias = layer[kMatrices + i];
      if (bias) expect_contiguous(*bias, kMatrixNames[i], kFloat32, {outer});
      const Optional& scale = layer[2 * kMatrices + kNorms + i];
      if (scale.has_value() != (shape_.weights == kInt8)) refuse("int8 weights, and they alone, have a scale");
      if (scale) expect_contiguous(*scale, kMatrixNames[i], kFloat32, {outer});
    }
    const Optional* const norms = layer.data() + 2 * kMatrices;
    for (size_t i = 0; i < kNorms; ++i) {
      if (i < 2 && !norms[i]) refuse("a layer has no norm");
      const bool of_head = i == 2 || i == 3;
      if (norms[i]) expect_contiguous(*norms[i], "a norm", kFloat32, {of_head ? shape_.head_dim : shape_.hidden});
    }
    if (norms[4] || norms[5]) shape_.out_norms = true;
    auto matrix = [&](int i) {
      return Weights{memory<const void>(*layer[i]), floats(layer[kMatrices + i]),
                     floats(layer[2 * kMatrices + kNorms + i])};
    };
    layers_.push_back({matrix(kQ), matrix(kK), matrix(kV), matrix(kO), matrix(kGate), matrix(kUp), matrix(kDown),
                       floats(norms[0]), floats(norms[1]), floats(norms[2]), floats(norms[3]), floats(norms[4]),
                       floats(norms[5]), rope});
  }

  void run(const DecoderCall& call, int threads) {
    const TreeAttention attention = decoder_attention(shape_, call);
    const Isa isa = current_isa();
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
  }

  DecoderShape shape_;
  const float* final_norm_ = nullptr;
  Array embedding_;
  float embedding_scale_;
  std::vector<LayerWeights> layers_;
  int64_t ropes_ = 1;  // tables of cos and sin
  std::vector<LowRank> low_rank_;
  int64_t rank_ = 0;
  std::unique_ptr<char, Free> scratch_;
  int64_t scratch_bytes_ = 0;
  std::mutex mutex_;
};

}  // namespace

void bind_decoder_layers(pybind11::module_& m) {
  using Layers = std::vector<std::vector<Optional>>;
  using Guard = pybind11::call_guard<pybind11::gil_scoped_release>;
  pybind11::class_<DecoderLayers>(m, "DecoderLayers")
      .def(pybind11::init<const Layers&, const std::vector<int64_t>&, const Array&, const Array&, float, int64_t,
                          int64_t, int64_t, int64_t, float, float, float, int>())
      .def("adapt", &DecoderLayers::adapt, Guard())
      .def("forward", &DecoderLayers::forward, Guard());
}

}  // namespace rgtg
