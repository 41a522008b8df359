// Python's partial_bt_loss(threads, rewards, offsets, mode, by_pair, normalizer, loss, gradient).
#include <optional>
#include <vector>

#include "arguments.hpp"
#include "bindings.hpp"
#include "partial_bt_loss.hpp"

namespace rgtg {
namespace {

void call(int threads, const Array& rewards, const Array& offsets, int mode, bool by_pair,
          std::optional<double> normalizer, const Array& loss, const Array& gradient) {
  expect_rank(rewards, "rewards", 1);
  expect_rank(offsets, "offsets", 1);
  const int code = dtype(rewards);
  if (code != kFloat32 && code != kFloat64) refuse("rewards have dtype code " + std::to_string(code));
  const int64_t M = size(rewards, 0), N = size(offsets, 0) / 2;
  expect_contiguous(rewards, "rewards", code, {M});
  expect_contiguous(offsets, "offsets", kInt64, {2 * N + 1});
  expect_contiguous(gradient, "gradient", code, {M});
  expect(loss, "loss", code, {});
  if (mode < static_cast<int>(Prefixes::kEos) || mode > static_cast<int>(Prefixes::kTruncate)) {
    refuse("mode " + std::to_string(mode) + " is unknown");
  }
  if (N == 0 && !normalizer) refuse("there is no pair to average over");
  std::vector<double> sums(N);
  const bool legal = partial_bt_loss(
      {code == kFloat64, M, N, memory<void>(rewards), memory<int64_t>(offsets), static_cast<Prefixes>(mode), by_pair,
       normalizer ? &*normalizer : nullptr, sums.data(), memory<void>(loss), memory<void>(gradient)},
      threads);
  if (!legal) refuse("offsets do not rise from 0 to M by at least one, or answers differ in length in mode eos");
}

}  // namespace

void bind_partial_bt_loss(pybind11::module_& m) {
  m.def("partial_bt_loss", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
