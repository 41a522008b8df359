// Python's commit(threads, k_new, v_new, k_cache, v_cache, lengths, choice, slots).
#include <optional>

#include "arguments.hpp"
#include "bindings.hpp"
#include "commit.hpp"

namespace rgtg {
namespace {

LayersView view(const Array& x, int64_t item) {
  return {memory<char>(x), stride(x, 0) * item, stride(x, 1) * item, stride(x, 2) * item, stride(x, 3) * item};
}

void call(int threads, const Array& k_new, const Array& v_new, const Array& k_cache, const Array& v_cache,
          const Array& lengths, const Array& choice, const std::optional<Array>& slots) {
  expect_rank(k_new, "k_new", 5);
  expect_rank(k_cache, "k_cache", 5);
  const int code = dtype(k_new);
  if (code < kFloat32 || code > kFloat64) refuse("k_new has dtype code " + std::to_string(code));
  const int64_t L = size(k_new, 0), B = size(k_new, 1), G = size(k_new, 2), S = size(k_new, 3), D = size(k_new, 4);
  const int64_t N = slots ? size(k_cache, 1) : B, T = size(k_cache, 3), item = dtype_bytes(code);
  expect(v_new, "v_new", code, {L, B, G, S, D});
  expect(k_cache, "k_cache", code, {L, N, G, T, D});
  expect(v_cache, "v_cache", code, {L, N, G, T, D});
  expect_dense(k_new, "k_new");
  expect_dense(v_new, "v_new");
  for (const Array* cache : {&k_cache, &v_cache}) {
    expect_dense(*cache, "a cache");
    expect_apart(*cache, "a cache");
  }
  expect(lengths, "lengths", kInt64, {N});
  expect_apart(lengths, "lengths");
  expect_contiguous(choice, "choice", kInt64, {B});
  if (slots) expect_slots(*slots, B, N, true);
  const bool legal = commit({L, B, G, S, T, D * item, view(k_new, item), view(v_new, item), view(k_cache, item),
                             view(v_cache, item), memory<int64_t>(lengths), stride(lengths, 0), memory<int64_t>(choice),
                             slots ? memory<int64_t>(*slots) : nullptr},
                            threads);
  if (!legal) refuse("a choice is no new token, or a row's cache is full");
}

}  // namespace

void bind_commit(pybind11::module_& m) { m.def("commit", &call, pybind11::call_guard<pybind11::gil_scoped_release>()); }

}  // namespace rgtg
