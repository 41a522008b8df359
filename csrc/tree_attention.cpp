// Attention of new tokens to a shared prefix and to each other. A work item is one row of the batch, one key-value
// head, up to kRows query rows (new tokens x heads of the group) and kSplit positions of the prefix. It loops over blocks
// of kBlock keys that stay in the first-level cache while all its query rows use them; the softmax is kept online.
// Items of one query row are merged, in the order of their positions, by the thread that finishes the last of them.
#include "tree_attention.hpp"

#include "tree_attention_amx.hpp"
#include "tree_attention_tiles.hpp"
#include "vec.hpp"

namespace rgtg {
namespace RGTG_ISA {
namespace {

using attention::kRows;
using attention::kSplit;
using attention::padded;

// Memory of one thread.
struct Scratch {
  float* q;       // [kRows][padded(D)], or pairs of Bf16 as one float each
  float* acc;     // [kRows][padded(D)]
  float* keys;    // [kBlock / kTileKeys][D][kTileKeys]
  float* values;  // [kBlock][padded(D)]
  float* scores;  // [kRows][kBlock]
  float* m;       // [kRows]
  float* l;       // [kRows]
  float* factor;  // [kRows]
};

float exp1(float x) {
  float buffer[kWidth];
  store(buffer, exp(set1(x)));
  return buffer[0];
}

template <class T>
const T* at(const HeadsView& x, int64_t row, int64_t head, int64_t token) {
  return static_cast<const T*>(x.data) + row * x.row + head * x.head + token * x.token;
}

// One work item.
template <class T, class P>
class Item {
 public:
  // Query row r of the item is new token (first + r) / group of batch row b, in head (first + r) % group of the group.
  Item(const TreeAttention& a, const Scratch& s, int64_t b, int64_t g, int64_t first, int64_t rows, int64_t split)
      : a_(a), s_(s), b_(b), g_(g), group_(a.H / a.G), first_(first), split_(split), units_(P::units(a.D)),
        width_(padded(a.D)), rows_(rows), slot_(attention::slot_of(a, b)), length_(attention::length_of(a, b)) {}

  void run() {
    pack_queries(static_cast<const P*>(nullptr));
    const bool independent = a_.ancestors == nullptr && !a_.causal;
    // Positions after the prefix that all query rows have left behind; negative: before its end. A block of these would
    // change no bit, so it is left out.
    const int64_t length = length_, unseen = a_.causal && a_.window > 0 ? token(0) - a_.window + 1 : -length;
    for (int64_t r = 0; r < whole_vectors(rows_); ++r) {
      s_.m[r] = -kInf;
      s_.l[r] = 0;
      std::memset(s_.acc + r * width_, 0, width_ * sizeof(float));
    }
    if (split_ == 0 && independent) start_with_itself();
    if (split_ == 0 && !independent) {
      const int64_t visible = a_.causal ? token(rows_ - 1) + 1 : a_.S;
      for (int64_t j = whole_blocks(unseen); j < visible; j += kBlock) {
        block<true>(at<T>(a_.k, b_, g_, j), a_.k.token, at<T>(a_.v, b_, g_, j), a_.v.token,
                    visible - j < kBlock ? visible - j : kBlock, j);
      }
    }
    const int64_t begin = attention::first_seen(a_, b_) + split_ * kSplit;
    const int64_t end = length < begin + kSplit ? length : begin + kSplit;
    for (int64_t t = begin + whole_blocks(length + unseen - begin); t < end; t += kBlock) {
      block<false>(at<T>(a_.k_cache, slot_, g_, t), a_.k_cache.token, at<T>(a_.v_cache, slot_, g_, t), a_.v_cache.token,
                   end - t < kBlock ? end - t : kBlock, t);
    }
  }

  // The result, where the row has one item only.
  void finish() {
    for (int64_t r = 0; r < rows_; ++r) write(r, s_.acc + r * width_, s_.m[r], s_.l[r]);
  }

  void save(float* partial) {
    std::memcpy(partial, s_.acc, rows_ * width_ * sizeof(float));
    const int64_t rows = attention::item_rows(a_);
    std::memcpy(partial + rows * width_, s_.m, rows_ * sizeof(float));
    std::memcpy(partial + rows * (width_ + 1), s_.l, rows_ * sizeof(float));
  }

  void merge(const float* partials, int64_t splits) {
    const int64_t size = attention::partial_floats(a_), maxima = attention::item_rows(a_) * width_;
    const int64_t sums = maxima + attention::item_rows(a_);
    for (int64_t r = 0; r < rows_; ++r) {
      float m = -kInf;
      for (int64_t i = 0; i < splits; ++i) {
        const float x = partials[i * size + maxima + r];
        if (!(x <= m)) m = x;
      }
      float l = 0;
      float* acc = s_.acc;
      std::memset(acc, 0, width_ * sizeof(float));
      for (int64_t i = 0; i < splits; ++i) {
        const float* partial = partials + i * size;
        // A split without anything visible to the row has the weight 0.
        const float x = partial[maxima + r];
        const float weight = x == -kInf ? 0.0f : exp1(x - m);
        l = l + weight * partial[sums + r];
        const Vec w = set1(weight);
        for (int64_t d = 0; d < width_; d += kWidth) {
          store(acc + d, fma(w, load(partial + r * width_ + d), load(acc + d)));
        }
      }
      write(r, acc, m, l);
    }
  }

 private:
  // A block of n keys and their values, for the query rows from `from` on; `first_key` is the number of the first among the
  // new tokens, or its position.
  struct Keys {
    const T *k, *v;
    int64_t k_stride, v_stride, n, first_key, from;
  };

  static int64_t whole_vectors(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }
  static uint64_t low_bits(int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }
  static int64_t whole_blocks(int64_t n) { return n > 0 ? n / kBlock * kBlock : 0; }
  int64_t token(int64_t r) const { return (first_ + r) / group_; }
  int64_t head(int64_t r) const { return g_ * group_ + (first_ + r) % group_; }

  const T* query(int64_t r) const { return at<T>(a_.q, b_, head(r), token(r)); }

  void pack_queries(const Product<T>*) const {
    for (int64_t r = 0; r < rows_; ++r) {
      const T* q = query(r);
      for (int64_t d = 0; d < a_.D; ++d) s_.q[r * width_ + d] = to_float(q[d]);
    }
  }
#if defined(__AVX512BF16__)
  void pack_queries(const PairProduct*) const {
    for (int64_t r = 0; r < rows_; ++r) std::memcpy(s_.q + r * width_, query(r), a_.D * sizeof(T));
  }
#endif

#if defined(__AMX_BF16__)
  void pack_queries(const AmxProduct*) const {
    for (int64_t r = 0; r < whole_vectors(rows_); ++r) {
      amx_put_query(r < rows_ ? query(r) : nullptr, a_.D, r % kLanes, amx_group(r));
    }
    for (int64_t r = 0; r < rows_; r += kLanes) {
      for (int64_t i = 0; i < amx_steps(a_.D); ++i) amx_turn(amx_group(r) + i * kTileBytes);
    }
  }
  char* amx_group(int64_t r) const { return reinterpret_cast<char*>(s_.q) + r / kLanes * amx_query_bytes(a_.D); }
#endif

  // Without a mask, a new token sees only itself: its own score is the first maximum.
  void start_with_itself() {
    for (int64_t r = 0; r < rows_; ++r) {
      const T* q = at<T>(a_.q, b_, head(r), token(r));
      const T* k = at<T>(a_.k, b_, g_, token(r));
      const T* v = at<T>(a_.v, b_, g_, token(r));
      float* acc = s_.acc + r * width_;
      Vec dot = zero();
      for (int64_t d = 0; d < width_; d += kWidth) {
        const int64_t left = a_.D - d;
        const int n = static_cast<int>(left < 0 ? 0 : left < kWidth ? left : kWidth);
        if (n < kWidth) {
          if (n > 0) dot = fma(load_n(q + d, n), load_n(k + d, n), dot);
          store(acc + d, n > 0 ? load_n(v + d, n) : zero());
        } else {
          dot = fma(load(q + d), load(k + d), dot);
          store(acc + d, load(v + d));
        }
      }
      const float own = sum(dot) * a_.scale;
      s_.m[r] = a_.softcap > 0 ? largest(capped(set1(own))) : own;
      s_.l[r] = s_.m[r] == -kInf ? 0.0f : 1.0f;
      if (s_.l[r] == 0) {
        for (int64_t d = 0; d < width_; d += kWidth) store(acc + d, load(acc + d) * zero());
      }
    }
  }

  Vec capped(Vec x) const { return tanh(x / set1(a_.softcap)) * set1(a_.softcap); }

  // Positions between the row's prefix and a new token.
  int64_t depth(int64_t token) const {
    if (a_.causal) return token;
    if (a_.ancestors == nullptr) return 0;
    const int64_t bits = __builtin_popcountll(static_cast<uint64_t>(a_.ancestors[b_ * a_.S + token]));
    return bits > 0 ? bits - 1 : 0;
  }

  // Which of n new tokens or positions, from number first_key on, query row r sees: bit t is number first_key + t.
  template <bool kNew>
  uint64_t visible(int64_t r, int64_t n, int64_t first_key) const {
    const int64_t token = this->token(r), least = depth(token) - a_.window + 1;
    uint64_t seen = low_bits(n);
    if (kNew && a_.causal) seen &= low_bits(token - first_key + 1);
    if (kNew && !a_.causal) seen &= static_cast<uint64_t>(a_.ancestors[b_ * a_.S + token]) >> first_key;
    if (a_.window == 0) return seen;
    if (!kNew || a_.ancestors == nullptr) return seen & ~low_bits((kNew ? least : length_ + least) - first_key);
    for (int64_t t = 0; t < n; ++t) {
      if (depth(first_key + t) < least) seen &= ~(uint64_t{1} << t);
    }
    return seen;
  }

  // Whether all n of them are visible to query rows `from` to `to`, where that is simple to say.
  template <bool kNew>
  bool all_visible(int64_t from, int64_t to, int64_t n, int64_t first_key) const {
    if (n < kBlock || (kNew && (!a_.causal || token(from) < first_key + n - 1))) return false;
    if (a_.window == 0) return true;
    return a_.ancestors == nullptr && (kNew ? 0 : length_) + depth(token(to)) - a_.window + 1 <= first_key;
  }

  // Query rows before this one see nothing from new token first_key on.
  int64_t first_row(int64_t first_key) const {
    const int64_t r = a_.causal ? first_key * group_ - first_ : 0;
    return r > 0 ? r : 0;
  }

  // Values as floats, padded with zeros to a whole number of vectors: in place where they already are.
  const float* values(const T* v, int64_t* stride, int64_t n) const {
    if (sizeof(T) == sizeof(float) && a_.D % kWidth == 0) return reinterpret_cast<const float*>(v);
    for (int64_t t = 0; t < n; ++t) {
      const T* row = v + t * *stride;
      float* out = s_.values + t * width_;
      int64_t d = 0;
      for (; d + kWidth <= a_.D; d += kWidth) store(out + d, load(row + d));
      if (d < a_.D) store(out + d, load_n(row + d, static_cast<int>(a_.D - d)));
    }
    *stride = width_;
    return s_.values;
  }

  template <bool kNew>
  void block(const T* k, int64_t k_stride, const T* v, int64_t v_stride, int64_t n, int64_t first_key) {
    const int64_t from = kNew ? first_row(first_key) / kWidth * kWidth : 0;
    add_keys<kNew>({k, v, k_stride, v_stride, n, first_key, from}, static_cast<const P*>(nullptr));
  }

  template <bool kNew, class Any>
  void add_keys(const Keys& b, const Any*) const {
    pack_keys<T, P>(b.k, b.k_stride, b.n, units_, s_.keys);
    for (int64_t r = b.from; r < rows_; r += kTile) {
      for (int64_t t = 0; t < b.n; t += kTileKeys) {
        score_rows<P>(rows_ - r, s_.q + r * width_, width_, s_.keys + t * units_, units_, a_.scale,
                      s_.scores + r * kBlock + t);
      }
    }
    const int64_t end = whole_vectors(b.n);
    if (a_.softcap > 0) cap_scores(b.from, end);
    weigh<kNew>(b.from, b.n, end, b.first_key);
    add_values(b.v, b.v_stride, b.n, b.from);
  }

  // Scores of the rows from `from` on become weights; their maxima and sums are brought up to date.
  template <bool kNew>
  void weigh(int64_t from, int64_t n, int64_t end, int64_t first_key) const {
    const bool all = all_visible<kNew>(from, rows_ - 1, n, first_key);
    for (int64_t r = from; r < rows_; ++r) {
      float* x = s_.scores + r * kBlock;
      const uint64_t seen = all ? ~uint64_t{0} : visible<kNew>(r, n, first_key);
      if (seen != ~uint64_t{0}) {
        for (int64_t t = 0; t < end; t += kWidth) store(x + t, where_bit(seen >> t, load(x + t), set1(-kInf)));
      }
      Vec top = load(x);
      for (int64_t t = kWidth; t < end; t += kWidth) top = max(top, load(x + t));
      const float old = s_.m[r], here = largest(top);
      s_.factor[r] = here > old ? here : old;
    }
    for (int64_t r = from; r < rows_; r += kWidth) {
      const Vec old = load(s_.m + r), m = load(s_.factor + r);
      store(s_.m + r, m);
      store(s_.factor + r, where_equal(old, m, set1(1.0f), exp(old - m)));
    }
    for (int64_t r = from; r < rows_; ++r) {
      float* x = s_.scores + r * kBlock;
      // Nothing visible yet: any finite number will do, every weight is 0.
      const Vec base = set1(s_.m[r] == -kInf ? 0.0f : s_.m[r]);
      Vec l = zero();
      for (int64_t t = 0; t < end; t += kWidth) {
        const Vec weight = exp(load(x + t) - base);
        store(x + t, weight);
        l = l + weight;
      }
      s_.l[r] = s_.l[r] * s_.factor[r] + sum(l);
    }
  }

  void add_values(const T* v, int64_t v_stride, int64_t n, int64_t first_row) const {
    const float* value = values(v, &v_stride, n);
    const int64_t vecs = (a_.D + kWidth - 1) / kWidth;
    for (int64_t r = first_row; r < rows_; r += kTile) {
      for (int64_t j = 0; j < vecs; j += kVecs) {
        const float* weights = s_.scores + r * kBlock;
        const float* from = value + j * kWidth;
        float* to = s_.acc + r * width_ + j * kWidth;
        switch (vecs - j) {
          case 1: sum_rows<1>(rows_ - r, weights, from, v_stride, n, s_.factor + r, to, width_); break;
#if defined(__AVX512F__)
          case 2: sum_rows<2>(rows_ - r, weights, from, v_stride, n, s_.factor + r, to, width_); break;
          case 3: sum_rows<3>(rows_ - r, weights, from, v_stride, n, s_.factor + r, to, width_); break;
#endif
          default: sum_rows<kVecs>(rows_ - r, weights, from, v_stride, n, s_.factor + r, to, width_);
        }
      }
    }
  }

#if defined(__AMX_BF16__)
  template <bool kNew>
  void add_keys(const Keys& b, const AmxProduct*) const {
    int64_t k_stride = b.k_stride;
    const Bf16* keys = amx_keys(b.k, &k_stride, b.n, a_.D, reinterpret_cast<Bf16*>(s_.keys));
    char* const values = reinterpret_cast<char*>(s_.values);
    char* const weights = values + width_ / kLanes * 2 * kTileBytes;
    amx_values(b.v, b.v_stride, b.n, a_.D, values);
    const int64_t n = b.n, first_key = b.first_key;
    const int64_t count = whole_vectors(n);
    for (int64_t r = b.from; r < rows_; r += kLanes) {
      const int64_t last = r + kLanes < rows_ ? r + kLanes : rows_;
      uint64_t seen[kLanes] = {}, any = 0;
      const bool all = all_visible<kNew>(r, last - 1, n, first_key);
      if (!all) {
        for (int64_t i = r; i < last; ++i) any |= seen[i - r] = visible<kNew>(i, n, first_key);
        if (any == 0) continue;
      }
      amx_scores(keys, k_stride, n, amx_group(r), amx_steps(a_.D), s_.scores);
      amx_add(s_.scores, count, a_.scale, a_.softcap, all ? nullptr : seen, values, weights, width_, s_.m + r, s_.l + r,
              s_.acc + r * width_);
    }
  }
#endif

  void cap_scores(int64_t from, int64_t n) const {
    for (int64_t r = from; r < rows_; ++r) {
      float* x = s_.scores + r * kBlock;
      for (int64_t t = 0; t < n; t += kWidth) store(x + t, capped(load(x + t)));
    }
  }

  // What the sum of weighted values is multiplied with, given the maximum m of its scores and the sum l of its weights.
  float inverse(int64_t r, float m, float l) const {
    // A token to which nothing is visible gives zeros.
    if (a_.sinks == nullptr) return l == 0 ? 0.0f : 1 / l;
    const float sink = to_float(static_cast<const T*>(a_.sinks)[head(r)]), top = sink > m ? sink : m;
    const float base = top == -kInf ? 0.0f : top, weight = exp1(m - base), total = l * weight + exp1(sink - base);
    return total == 0 ? 0.0f : weight / total;
  }

  void write(int64_t r, const float* acc, float m, float l) const {
    const float inverse = this->inverse(r, m, l);
    T* out = const_cast<T*>(at<T>(a_.out, b_, head(r), token(r)));
    int64_t d = 0;
    for (; d + kWidth <= a_.D; d += kWidth) store(out + d, load(acc + d) * set1(inverse));
    if (d < a_.D) store_n(out + d, load(acc + d) * set1(inverse), static_cast<int>(a_.D - d));
  }

  const TreeAttention& a_;
  const Scratch& s_;
  int64_t b_, g_, group_, first_, split_, units_, width_, rows_, slot_, length_;
};

// Takes work items until none is left.
template <class T, class P>
void work(const TreeAttention& a, char* workspace, int thread, int threads) {
  const attention::Layout layout = attention::layout(a, workspace, threads);
  const int64_t group = a.H / a.G, width = padded(a.D);
  float* buffer = layout.scratch + thread * attention::thread_floats(a);
  Scratch s;
  s.q = buffer;
  s.acc = s.q + kRows * width;
  s.keys = s.acc + kRows * width;
  s.values = s.keys + kBlock * width;
  s.scores = s.values + kBlock * width;
  s.m = s.scores + kRows * kBlock;
  s.l = s.m + kRows;
  s.factor = s.l + kRows;
  attention::Header* header = layout.header;

  int64_t item = __atomic_fetch_add(&header->next, 1, __ATOMIC_RELAXED);
  int64_t before = 0, saved = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    const Range tokens = attention::tokens_of_row(a, b);
    const int64_t rows = (tokens.end - tokens.begin) * group, blocks = (rows + kRows - 1) / kRows;
    // Rows of an item: about the same in all of them.
    const int64_t share = blocks == 0 ? 0 : ((rows + blocks - 1) / blocks + kWidth - 1) / kWidth * kWidth;
    const int64_t splits = attention::splits(a, b), items = blocks * a.G * splits;
    while (item < before + items) {
      const int64_t i = item - before, split = i % splits, g = i / splits % a.G;
      // The last query rows of a prompt see the most keys, so they are computed first.
      const int64_t block = blocks - 1 - i / splits / a.G, first = block * share;
      Item<T, P> work_item(a, s, b, g, tokens.begin * group + first, rows - first < share ? rows - first : share,
                           split);
      work_item.run();
      if (splits == 1) {
        work_item.finish();
      } else {
        float* partials = layout.partials + (saved + (block * a.G + g) * splits) * attention::partial_floats(a);
        work_item.save(partials + split * attention::partial_floats(a));
        int32_t* done = layout.done + (b * attention::row_blocks(a) + block) * a.G + g;
        if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) == splits) {
          work_item.merge(partials, splits);
          *done = 0;
        }
      }
      item = __atomic_fetch_add(&header->next, 1, __ATOMIC_RELAXED);
    }
    before += items;
    if (splits > 1) saved += items;
  }
  // The last thread to find no item resets the counters.
  if (__atomic_add_fetch(&header->finished, 1, __ATOMIC_ACQ_REL) == threads) {
    header->next = 0;
    header->finished = 0;
  }
}

}  // namespace

void tree_attention(const TreeAttention& a, void* workspace, int thread, int threads) {
  char* memory = static_cast<char*>(workspace);
  switch (a.dtype) {
    case kFloat32: return work<float, Product<float>>(a, memory, thread, threads);
    case kFloat16: return work<F16, Product<F16>>(a, memory, thread, threads);
    default:
#if defined(__AMX_BF16__)
      configure_tiles({16, 16, 16, 16, 16, 16, 16, 16});
      work<Bf16, AmxProduct>(a, memory, thread, threads);
      return release_tiles();
#elif defined(__AVX512BF16__)
      if (a.D % 2 == 0) return work<Bf16, PairProduct>(a, memory, thread, threads);
#endif
      return work<Bf16, Product<Bf16>>(a, memory, thread, threads);
  }
}

}  // namespace RGTG_ISA
}  // namespace rgtg
