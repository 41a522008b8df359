// Python's tree_attention(threads, q, k, v, k_cache, v_cache, lengths, ancestors, scale, causal, window, softcap, sinks,
// slots, out).
#include <optional>

#include "arguments.hpp"
#include "bindings.hpp"
#include "tree_attention.hpp"
#include "workspace.hpp"

namespace rgtg {
namespace {

HeadsView view(const Array& x) { return {memory<void>(x), stride(x, 0), stride(x, 1), stride(x, 2)}; }

void call(int threads, const Array& q, const Array& k, const Array& v, const Array& k_cache, const Array& v_cache,
          const Array& lengths, const std::optional<Array>& ancestors, double scale, bool causal, int64_t window,
          double softcap, const std::optional<Array>& sinks, const std::optional<Array>& slots, const Array& out) {
  expect_rank(q, "q", 4);
  expect_rank(k_cache, "k_cache", 4);
  expect_float(q, "q", true);
  const int code = dtype(q);
  const int64_t B = size(q, 0), H = size(q, 1), S = size(q, 2), D = size(q, 3);
  const int64_t N = slots ? size(k_cache, 0) : B, G = size(k_cache, 1), T = size(k_cache, 2);
  if (G < 1 || H < 1 || H % G != 0 || D < 1) {
    refuse("q has shape " + listed(shape(q)) + " and k_cache " + listed(shape(k_cache)) +
           ": H must be a multiple of G, and D at least 1");
  }
  expect(k, "k", code, {B, G, S, D});
  expect(v, "v", code, {B, G, S, D});
  expect(k_cache, "k_cache", code, {N, G, T, D});
  expect(v_cache, "v_cache", code, {N, G, T, D});
  expect(out, "out", code, {B, H, S, D});
  for (const Array* x : {&q, &k, &v, &k_cache, &v_cache, &out}) expect_dense(*x, "a tensor");
  expect_apart(out, "out");
  expect_contiguous(lengths, "lengths", kInt64, {N});
  if (slots) expect_slots(*slots, B, N, false);
  if (ancestors) {
    expect_contiguous(*ancestors, "ancestors", kInt64, {B, S});
    if (causal || S > kMaskBits) refuse("ancestors want causal=False and S <= " + std::to_string(kMaskBits));
  }
  if (window < 0) refuse("window=" + std::to_string(window) + ": use at least 1, or 0 for none");
  // Others are none, or no number, in float.
  if (softcap != 0 && !(softcap >= 1e-30 && softcap <= 1e30)) {
    refuse("softcap=" + std::to_string(softcap) + ": use 1e-30 to 1e30, or 0 for none");
  }
  if (sinks) expect_contiguous(*sinks, "sinks", code, {H});
  // Differences of positions stay in range.
  const int64_t most = int64_t{1} << 40;
  TreeAttention a = {code,
                     B,
                     H,
                     G,
                     S,
                     T,
                     D,
                     view(q),
                     view(k),
                     view(v),
                     view(k_cache),
                     view(v_cache),
                     view(out),
                     memory<int64_t>(lengths),
                     ancestors ? memory<int64_t>(*ancestors) : nullptr,
                     static_cast<float>(scale),
                     causal,
                     0,
                     B * S,
                     window < most ? window : most,
                     static_cast<float>(softcap),
                     sinks ? memory<void>(*sinks) : nullptr,
                     slots ? memory<int64_t>(*slots) : nullptr};
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = attention::length_of(a, b);
    if (length < 0 || length > T) refuse("a length is outside the cache");
  }
  if (B * S == 0) return;
  int64_t items = 0;
  for (int64_t b = 0; b < B; ++b) items += attention::row_blocks(a) * G * attention::splits(a, b);
  if (threads > items) threads = static_cast<int>(items);
  if (threads < 1) threads = 1;

  thread_local Workspace buffer;
  void* workspace = buffer.of(tree_attention_workspace(a, threads));
  tree_attention_prepare(a, workspace);
  const Isa isa = current_isa();
  auto body = [&](int thread, int count) { RGTG_DISPATCH(isa, tree_attention(a, workspace, thread, count)); };
  parallel_for(threads, body);
}

}  // namespace

void bind_tree_attention(pybind11::module_& m) {
  m.def("tree_attention", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
