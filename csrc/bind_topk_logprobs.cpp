// Python's topk_logprobs(threads, logits, k, guidance, beta, logprobs, tokens, entropy).
#include <cstring>
#include <optional>

#include "arguments.hpp"
#include "bindings.hpp"
#include "topk_logprobs.hpp"
#include "workspace.hpp"

namespace rgtg {
namespace {

// A candidate's token takes 32 bits, and the last number is reserved.
constexpr int64_t kMostTokens = 0xffffffff;

void call(int threads, const Array& logits, int64_t k, const std::optional<Array>& guidance,
          const std::optional<Array>& beta, const Array& logprobs, const Array& tokens, const Array& entropy) {
  expect_rank(logits, "logits", 2);
  expect_float(logits, "logits", true);
  expect_dense(logits, "logits");
  const int64_t B = size(logits, 0), V = size(logits, 1);
  if (k < 1 || k > V) refuse("k=" + std::to_string(k) + ": use 1 to V=" + std::to_string(V));
  if (V > kMostTokens) refuse("V=" + std::to_string(V) + ": use at most " + std::to_string(kMostTokens));
  if (guidance.has_value() != beta.has_value()) refuse("guidance and beta come together");
  if (guidance) {
    expect(*guidance, "guidance", kFloat32, {B, V});
    expect_dense(*guidance, "guidance");
    expect_contiguous(*beta, "beta", kFloat32, {B});
  }
  expect_contiguous(logprobs, "logprobs", kFloat32, {B, k});
  expect_contiguous(tokens, "tokens", kInt64, {B, k});
  expect_contiguous(entropy, "entropy", kFloat32, {B});
  if (B == 0) return;
  TopkLogprobs a = {dtype(logits),
                    B,
                    V,
                    k,
                    memory<void>(logits),
                    stride(logits, 0),
                    guidance ? memory<float>(*guidance) : nullptr,
                    guidance ? stride(*guidance, 0) : 0,
                    beta ? memory<float>(*beta) : nullptr,
                    memory<float>(logprobs),
                    memory<int64_t>(tokens),
                    memory<float>(entropy),
                    1,
                    nullptr};
  // Few rows are cut in parts, as long as a part is much longer than its list of candidates.
  int64_t parts = (threads + B - 1) / B;
  if (parts > topk::segments(a)) parts = topk::segments(a);
  if (parts > V / (8 * k)) parts = V / (8 * k);
  a.parts = parts < 1 ? 1 : parts;
  if (threads > B * a.parts) threads = static_cast<int>(B * a.parts);

  thread_local Workspace buffer;
  a.workspace = buffer.of(topk_workspace(a));
  std::memset(a.workspace, 0, topk::counter_bytes(a));
  const Isa isa = current_isa();
  auto body = [&](int thread, int count) { RGTG_DISPATCH(isa, topk_logprobs(a, thread, count)); };
  parallel_for(threads, body);
}

}  // namespace

void bind_topk_logprobs(pybind11::module_& m) {
  m.def("topk_logprobs", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
