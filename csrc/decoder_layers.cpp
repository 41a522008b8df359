// Runs decoder layers: norm, q/k/v, rotary embedding, attention over cache and new tokens, output projection, norm,
// gated MLP. Rows of several adapters run together: a product reads its weights once for all rows, then each row
// gets its own adapter's low-rank update. Activations are fp32 between the products; where the weights are bf16 or int8
// the products' inputs are rounded to bf16. Every value of a row depends on that row's own inputs in a fixed order of
// operations: batch, chunk and thread count change nothing.
#include "decoder_layers.hpp"
#include "linear.hpp"
#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

// With at most this many rows every thread normalizes and packs all of them itself, which is faster than a barrier.
constexpr int64_t kPrivateRows = 16;
// Columns of the gate that a thread computes before the same columns of `up`: they stay in its cache.
constexpr int64_t kMlpColumns = 128;
// Threads share the columns of a product in units of this many.
constexpr int64_t kUnit = 4;

// out = x / rms(x) * weight
template <class T>
void rms_norm(const float* x, const float* weight, T* out, int64_t n, float eps) {
  Vec squares = zero();
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    Vec a = load(x + i);
    squares = fma(a, a, squares);
  }
  const int rest = static_cast<int>(n - i);
  if (rest > 0) {
    Vec a = load_n(x + i, rest);
    squares = fma(a, a, squares);
  }
  const Vec factor = set1(1.0f / sqrtf(sum(squares) / static_cast<float>(n) + eps));
  for (i = 0; i + kWidth <= n; i += kWidth) store(out + i, load(x + i) * factor * load(weight + i));
  if (rest > 0) store_n(out + i, load_n(x + i, rest) * factor * load_n(weight + i, rest), rest);
}

// x / (1 + e^-x), or its tanh approximation of GELU, which is the same with another argument.
inline Vec activate(Vec x, Activation which) {
  Vec u = x;
  if (which == kGeluTanh) {
    u = x * fma(x * x, set1(2.0f * 0.7978845608028654f * 0.044715f), set1(2.0f * 0.7978845608028654f));
  }
  return x / (set1(1.0f) + exp(zero() - u));
}

template <class T>
void activate_and_multiply(const float* gate, const float* up, T* out, int64_t n, Activation which) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, activate(load(gate + i), which) * load(up + i));
  const int rest = static_cast<int>(n - i);
  if (rest > 0) store_n(out + i, activate(load_n(gate + i, rest), which) * load_n(up + i, rest), rest);
}

// out[0:rotary] = x cos + rotate_half(x) sin, the rest is copied.
template <class T>
void rotate(const float* x, const float* cos, const float* sin, T* out, int64_t rotary, int64_t n) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; i += kWidth) {
    const int count = static_cast<int>(half - i < kWidth ? half - i : kWidth);
    Vec a = load_n(x + i, count), b = load_n(x + half + i, count);
    Vec lower = a * load_n(cos + i, count) - b * load_n(sin + i, count);
    Vec upper = b * load_n(cos + half + i, count) + a * load_n(sin + half + i, count);
    store_n(out + i, lower, count);
    store_n(out + half + i, upper, count);
  }
  for (int64_t i = rotary; i < n; i += kWidth) {
    const int count = static_cast<int>(n - i < kWidth ? n - i : kWidth);
    store_n(out + i, load_n(x + i, count), count);
  }
}

// y[r, begin:end] += sum over i of t[r, i] b[i, begin:end] for all rows, in the order of i. b is stored in panels
// [columns / kPanel][rank][kPanel], so that it is read sequentially.
void add_products(const float* t, int64_t ldt, const float* b, int64_t rank, float* y, int64_t ldy, int64_t rows,
                  int64_t begin, int64_t end) {
  constexpr int kTile = 10;
  for (int64_t n = begin; n < end;) {
    const int64_t offset = n % kPanel, space = kPanel - offset < kWidth ? kPanel - offset : kWidth;
    const int count = static_cast<int>(end - n < space ? end - n : space);
    const float* const panel = b + n / kPanel * rank * kPanel + offset;
    for (int64_t first = 0; first < rows; first += kTile) {
      const int tile = static_cast<int>(rows - first < kTile ? rows - first : kTile);
      Vec acc[kTile];
      for (int r = 0; r < kTile; ++r) acc[r] = zero();
      const float* own = t + first * ldt;
      for (int64_t i = 0; i < rank; ++i) {
        const Vec column = load_n(panel + i * kPanel, count);
        if (tile == kTile) {
#pragma GCC unroll 10
          for (int r = 0; r < kTile; ++r) acc[r] = fma(set1(own[r * ldt + i]), column, acc[r]);
        } else {
          for (int r = 0; r < tile; ++r) acc[r] = fma(set1(own[r * ldt + i]), column, acc[r]);
        }
      }
      for (int r = 0; r < tile; ++r) {
        float* out = y + (first + r) * ldy + n;
        store_n(out, load_n(out, count) + acc[r], count);
      }
    }
    n += count;
  }
}

template <class T>
T* at(const KeyValues& kv, int64_t layer, int64_t row, int64_t group) {
  return static_cast<T*>(kv.data) + layer * kv.layer + row * kv.row + group * kv.group;
}

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Whether products read packed rows, which are bf16.
#if defined(__AMX_BF16__)
constexpr bool kPacks = true;
#else
constexpr bool kPacks = false;
#endif

// The input of a product [chunk, width], and the same rows packed.
template <class T>
struct Rows {
  static constexpr bool kPacked = kPacks && sizeof(T) == 2;
  T* x;
  char* packed;
  int64_t width;

  void pack(Range rows, Range columns) const {
    if constexpr (kPacked) pack_rows(x, width, width, rows, columns, packed);
  }
};

template <class T>
struct Worker {
  const DecoderShape& s;
  const DecoderCall& c;
  void* workspace;
  BarrierState* state;
  const int thread, threads;
  TreeAttention attention;
  const int64_t chunk, weight_bytes;
  Rows<T> norm, mixed, hidden;
  T* q;
  float *qkv, *gate, *up, *low, *added;

  Worker(const DecoderShape& shape, const DecoderCall& call, char* scratch, void* attention_workspace,
         BarrierState* barrier_state, int index, int count)
      : s(shape), c(call), workspace(attention_workspace), state(barrier_state), thread(index), threads(count),
        attention(decoder_attention(shape, call)), chunk(decoder_chunk(call)),
        weight_bytes(dtype_bytes(shape.weights)) {
    auto take = [&](auto*& pointer, int64_t elements) {
      pointer = reinterpret_cast<decltype(pointer)>(scratch);
      scratch += aligned(elements * static_cast<int64_t>(sizeof(*pointer)));
    };
    auto packed = [&](int64_t width) { return Rows<T>::kPacked ? packed_bytes(chunk, width) : 0; };
    take(qkv, chunk * (s.heads + 2 * s.groups) * s.head_dim);
    take(gate, chunk * s.inner);
    take(up, chunk * s.inner);
    take(q, chunk * s.heads * s.head_dim);
    mixed.width = s.heads * s.head_dim;
    take(mixed.x, chunk * mixed.width);
    hidden.width = s.inner;
    take(hidden.x, chunk * hidden.width);
    take(hidden.packed, packed(hidden.width));
    take(low, chunk * 3 * c.rank);
    take(added, s.out_norms ? chunk * s.hidden : 0);
    norm.width = s.hidden;
    for (int i = 0; i <= (private_rows() ? thread : 0); ++i) {
      take(norm.x, chunk * norm.width);
      take(norm.packed, packed(norm.width));
      // Attention writes `mixed` for all threads; packed it is each one's own.
      take(mixed.packed, packed(mixed.width));
    }
  }

  bool private_rows() const { return c.batch * c.tokens <= kPrivateRows; }
  void wait() { barrier(state, threads); }

  // This thread's columns of a product with n columns.
  Range columns(int64_t n) const {
    Range units = share((n + kUnit - 1) / kUnit, thread, threads);
    return {units.begin * kUnit, units.end * kUnit < n ? units.end * kUnit : n};
  }
  // Rows [begin, end) of a matrix.
  Prefetch rows_of(const Weights& m, int64_t begin, int64_t end, int64_t inner) const {
    return {static_cast<const char*>(m.w) + begin * inner * weight_bytes, (end - begin) * inner * weight_bytes};
  }
  Prefetch prefetch(const Weights& m, int64_t n, int64_t inner) const {
    Range mine = columns(n);
    return rows_of(m, mine.begin, mine.end, inner);
  }
  Prefetch prefetch_qkv(const LayerWeights& w) const {
    const int64_t nq = s.heads * s.head_dim, nk = s.groups * s.head_dim;
    const int64_t first = columns(nq + 2 * nk).begin;
    if (first < nq) return rows_of(w.q, first, nq, s.hidden);
    if (first < nq + nk) return rows_of(w.k, first - nq, nk, s.hidden);
    return rows_of(w.v, first - nq - nk, nk, s.hidden);
  }
  Linear product(const Rows<T>& x, const Weights& m, float* y, int64_t rows, int64_t ldy, bool accumulate) const {
    return {x.x, m.w, m.bias, y, rows, x.width, x.width, ldy, s.weights, accumulate, x.packed, m.scale};
  }

  // The chunk's rows that have an adapter, as runs of one variant: body(variant, first row, rows, row distance).
  template <class Body>
  void adapted(int64_t first, int64_t rows, Body body) const {
    if (c.tokens == 1) {
      for (int64_t variant = 1; variant < c.variants; ++variant) {
        const int64_t begin = (variant - first % c.variants + c.variants) % c.variants;
        if (begin < rows) body(variant, begin, (rows - begin + c.variants - 1) / c.variants, c.variants);
      }
      return;
    }
    for (int64_t r = 0; r < rows;) {
      const int64_t b = (first + r) / c.tokens, stop = (b + 1) * c.tokens - first;
      const int64_t end = stop < rows ? stop : rows;
      if (b % c.variants > 0) body(b % c.variants, r, end - r, int64_t{1});
      r = end;
    }
  }
  const LowRank& low_rank(int64_t layer, int matrix, int64_t variant) const {
    return c.low_rank[(layer * kMatrices + matrix) * (c.variants - 1) + variant - 1];
  }

  // low = a x for the matrices from `matrix` on that share their input x [rows, inner]. Ends with a barrier.
  void lora_down(int64_t layer, int matrix, int count, const Rows<T>& x, int64_t first, int64_t rows) {
    if (c.variants == 1) return;
    adapted(first, rows, [&](int64_t variant, int64_t begin, int64_t n, int64_t step) {
      for (int i = 0; i < count; ++i) {
        const LowRank& p = low_rank(layer, matrix + i, variant);
        const Range mine = columns(p.rank);
        linear({x.x + begin * x.width, p.a, nullptr, low + begin * 3 * c.rank + i * c.rank, n, x.width, step * x.width,
                step * 3 * c.rank, s.dtype, false, nullptr},
               mine.begin, mine.end, {nullptr, 0});
      }
    });
    wait();
  }

  // y[:, begin:end] += b low for the rows with an adapter; `index` is the matrix's index in the last lora_down().
  void lora_up(int64_t layer, int matrix, int index, float* y, int64_t ldy, int64_t first, int64_t rows, int64_t begin,
               int64_t end) const {
    if (c.variants == 1) return;
    adapted(first, rows, [&](int64_t variant, int64_t start, int64_t n, int64_t step) {
      const LowRank& p = low_rank(layer, matrix, variant);
      add_products(low + start * 3 * c.rank + index * c.rank, step * 3 * c.rank, p.b, p.rank, y + start * ldy,
                   step * ldy, n, begin, end);
    });
  }

  void embed(int64_t n) {
    if (c.ids == nullptr) return;
    const T* table = static_cast<const T*>(c.embedding);
    const Vec scale = set1(c.embedding_scale);
    T rounded[kWidth];
    const Range mine = share(n, thread, threads);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const T* from = table + c.ids[r] * s.hidden;
      float* x = c.x + r * s.hidden;
      for (int64_t i = 0; i < s.hidden; i += kWidth) {
        const int count = static_cast<int>(s.hidden - i < kWidth ? s.hidden - i : kWidth);
        store(rounded, load_n(from + i, count) * scale);
        store_n(x + i, load(rounded), count);
      }
    }
    wait();
  }

  // The rows that this thread prepares for a product; after a barrier where they are not all.
  Range prepared(int64_t rows) const { return private_rows() ? Range{0, rows} : share(rows, thread, threads); }

  void normalize(const float* x, const float* weight, int64_t rows) {
    const Range mine = prepared(rows);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      rms_norm(x + r * s.hidden, weight, norm.x + r * s.hidden, s.hidden, s.eps);
    }
    norm.pack(mine, {0, norm.width});
    if (!private_rows()) wait();
  }

  void pack_mixed(int64_t rows) {
    if (!Rows<T>::kPacked) return;
    mixed.pack(prepared(rows), {0, mixed.width});
    if (!private_rows()) wait();
  }

  // x += the norm of y, which is overwritten; the other rows of the chunk are other threads'.
  void add_normalized(float* y, const float* weight, float* x, int64_t rows) {
    const Range mine = share(rows, thread, threads);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      float *from = y + r * s.hidden, *to = x + r * s.hidden;
      rms_norm(from, weight, from, s.hidden, s.eps);
      for (int64_t i = 0; i < s.hidden; i += kWidth) {
        const int count = static_cast<int>(s.hidden - i < kWidth ? s.hidden - i : kWidth);
        store_n(to + i, load_n(to + i, count) + load_n(from + i, count), count);
      }
    }
    wait();
  }

  void project_qkv(const LayerWeights& w, int64_t layer, int64_t first, int64_t rows) {
    const int64_t nq = s.heads * s.head_dim, nk = s.groups * s.head_dim, all = nq + 2 * nk;
    const Range mine = columns(all);
    const int64_t starts[] = {0, nq, nq + nk, all};
    const Weights* matrices[] = {&w.q, &w.k, &w.v};
    for (int i = 0; i < 3; ++i) {
      const int64_t begin = (mine.begin > starts[i] ? mine.begin : starts[i]) - starts[i];
      const int64_t end = (mine.end < starts[i + 1] ? mine.end : starts[i + 1]) - starts[i];
      if (begin >= end) continue;
      const Prefetch next = mine.end > starts[i + 1] ? rows_of(*matrices[i + 1], 0, mine.end - starts[i + 1], s.hidden)
                                                     : prefetch(w.o, s.hidden, nq);
      linear(product(norm, *matrices[i], qkv + starts[i], rows, all, false), begin, end, next);
      lora_up(layer, kQ + i, i, qkv + starts[i], all, first, rows, begin, end);
    }
  }

  // Normalizes queries and new keys (where the model does), applies the rotary embedding, and stores the new keys and
  // values.
  void rope_and_store(const LayerWeights& w, int64_t layer, int64_t first, int64_t rows) {
    const int64_t all = s.heads + 2 * s.groups;
    const Range mine = share(rows * all, thread, threads);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t r = i / all, head = i % all, n = first + r, b = n / c.tokens, token = n % c.tokens;
      float* x = qkv + i * s.head_dim;
      const int64_t angles = w.rope * c.table + c.positions[n] * s.rotary;
      const float *cos = c.cos + angles, *sin = c.sin + angles;
      if (head < s.heads) {
        if (w.q_norm != nullptr) rms_norm(x, w.q_norm, x, s.head_dim, s.eps);
        rotate(x, cos, sin, q + (r * s.heads + head) * s.head_dim, s.rotary, s.head_dim);
      } else if (head < s.heads + s.groups) {
        if (w.k_norm != nullptr) rms_norm(x, w.k_norm, x, s.head_dim, s.eps);
        rotate(x, cos, sin, at<T>(c.k_new, layer, b, head - s.heads) + token * c.k_new.token, s.rotary, s.head_dim);
      } else {
        rotate(x, x, x, at<T>(c.v_new, layer, b, head - s.heads - s.groups) + token * c.v_new.token, 0, s.head_dim);
      }
    }
  }

  void attend(int64_t layer, int64_t first, int64_t rows) {
    auto heads = [&](const KeyValues& kv) { return HeadsView{at<T>(kv, layer, 0, 0), kv.row, kv.group, kv.token}; };
    const int64_t width = s.heads * s.head_dim;
    // The op numbers tokens from the beginning of the batch, the scratch from the beginning of the chunk.
    auto chunked = [&](T* p) { return HeadsView{p - first * width, c.tokens * width, s.head_dim, width}; };
    attention.q = chunked(q);
    attention.out = chunked(mixed.x);
    attention.k = heads(c.k_new);
    attention.v = heads(c.v_new);
    attention.k_cache = heads(c.k_cache);
    attention.v_cache = heads(c.v_cache);
    attention.first = first;
    attention.count = rows;
    attention.window = c.windows == nullptr ? 0 : c.windows[layer];
    tree_attention(attention, workspace, thread, threads);
  }

  void mlp(const LayerWeights& w, int64_t layer, int64_t first, int64_t rows) {
    const Range mine = columns(s.inner);
    // Few rows: a long range of each matrix uses the full bandwidth. Many: a short one stays in the cache.
    const int64_t all = mine.end - mine.begin, step = rows <= kPrivateRows || all < kMlpColumns ? all : kMlpColumns;
    for (int64_t begin = mine.begin; begin < mine.end; begin += step) {
      const int64_t end = begin + step < mine.end ? begin + step : mine.end;
      // [rows, step] of this thread's share of each, the same memory in every step.
      float *const own_gate = gate + mine.begin * chunk - begin, *const own_up = up + mine.begin * chunk - begin;
      linear(product(norm, w.gate, own_gate, rows, step, false), begin, end, rows_of(w.up, begin, end, s.hidden));
      const Prefetch next =
          end < mine.end ? rows_of(w.gate, end, end + (end - begin), s.hidden) : prefetch(w.down, s.hidden, s.inner);
      linear(product(norm, w.up, own_up, rows, step, false), begin, end, next);
      lora_up(layer, kGate, 0, own_gate, step, first, rows, begin, end);
      lora_up(layer, kUp, 1, own_up, step, first, rows, begin, end);
      for (int64_t r = 0; r < rows; ++r) {
        activate_and_multiply(own_gate + r * step + begin, own_up + r * step + begin, hidden.x + r * s.inner + begin,
                              end - begin, s.activation);
      }
      hidden.pack({0, rows}, {begin, end});
    }
  }

  void run() {
    const int64_t n = c.batch * c.tokens;
    const Range out = columns(s.hidden);
    embed(n);
    for (int64_t layer = 0; layer < c.layer_count; ++layer) {
      const LayerWeights& w = c.layers[layer];
      for (int64_t first = 0; first < n; first += chunk) {
        const int64_t rows = first + chunk < n ? chunk : n - first;
        float* x = c.x + first * s.hidden;
        normalize(x, w.input_norm, rows);
        lora_down(layer, kQ, 3, norm, first, rows);
        project_qkv(w, layer, first, rows);
        wait();
        rope_and_store(w, layer, first, rows);
        wait();
        attend(layer, first, rows);
        wait();
        pack_mixed(rows);
        lora_down(layer, kO, 1, mixed, first, rows);
        float* mixed_out = w.attention_out_norm == nullptr ? x : added;
        linear(product(mixed, w.o, mixed_out, rows, s.hidden, mixed_out == x), out.begin, out.end,
               prefetch(w.gate, s.inner, s.hidden));
        lora_up(layer, kO, 0, mixed_out, s.hidden, first, rows, out.begin, out.end);
        wait();
        if (mixed_out != x) add_normalized(mixed_out, w.attention_out_norm, x, rows);
        normalize(x, w.mlp_norm, rows);
        lora_down(layer, kGate, 2, norm, first, rows);
        mlp(w, layer, first, rows);
        wait();
        lora_down(layer, kDown, 1, hidden, first, rows);
        const bool again = first + chunk < n;
        const Prefetch next = again                       ? prefetch_qkv(w)
                              : layer + 1 < c.layer_count ? prefetch_qkv(c.layers[layer + 1])
                                                          : Prefetch{nullptr, 0};
        float* mlp_out = w.mlp_out_norm == nullptr ? x : added;
        linear(product(hidden, w.down, mlp_out, rows, s.hidden, mlp_out == x), out.begin, out.end, next);
        lora_up(layer, kDown, 0, mlp_out, s.hidden, first, rows, out.begin, out.end);
        wait();
        if (mlp_out != x) add_normalized(mlp_out, w.mlp_out_norm, x, rows);
      }
    }
    if (c.final_norm == nullptr) return;
    const Range mine = share(n, thread, threads);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      float* x = c.x + r * s.hidden;
      rms_norm(x, c.final_norm, x, s.hidden, s.eps);
    }
  }
};

}  // namespace

void decoder_layers(const DecoderShape& shape, const DecoderCall& call, char* scratch, void* workspace,
                    BarrierState* state, int thread, int threads) {
  if (shape.dtype == kFloat32) {
    Worker<float>(shape, call, scratch, workspace, state, thread, threads).run();
  } else {
    Worker<Bf16>(shape, call, scratch, workspace, state, thread, threads).run();
  }
}

}  // namespace RGTG_ISA
}  // namespace rgtg
