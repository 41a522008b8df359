// Python's topk_logprobs(threads, dtype, (B, V, k), logits, guidance, beta, outputs).
#include <array>
#include <cstring>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "topk_logprobs.hpp"
#include "workspace.hpp"

namespace rgtg {
namespace {

// Address and stride of rows.
using Rows = std::array<int64_t, 2>;

void call(int threads, int dtype, const std::array<int64_t, 3>& shape, const Rows& logits, const Rows& guidance,
          int64_t beta, const std::array<int64_t, 3>& outputs) {
  const auto [B, V, k] = shape;
  if (B == 0) return;
  TopkLogprobs a = {dtype,
                    B,
                    V,
                    k,
                    reinterpret_cast<const void*>(logits[0]),
                    logits[1],
                    reinterpret_cast<const float*>(guidance[0]),
                    guidance[1],
                    reinterpret_cast<const float*>(beta),
                    reinterpret_cast<float*>(outputs[0]),
                    reinterpret_cast<int64_t*>(outputs[1]),
                    reinterpret_cast<float*>(outputs[2]),
                    1,
                    nullptr};
  // Few rows are cut in parts, as long as a part is much longer than its list of candidates.
  int64_t parts = (threads + B - 1) / B;
  if (parts > topk::segments(a)) parts = topk::segments(a);
  if (parts > V / (8 * k)) parts = V / (8 * k);
  a.parts = parts < 1 ? 1 : parts;
  if (threads > B * a.parts) threads = static_cast<int>(B * a.parts);

  thread_local Workspace room;
  a.workspace = room.of(topk_workspace(a));
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
