// Python's tree_attention(threads, dtype, (B, H, G, S, T, D), views, lengths, ancestors, scale, causal).
#include <array>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "tree_attention.hpp"
#include "workspace.hpp"

namespace rgtg {
namespace {

// Address, stride of rows, of heads, of tokens.
using View = std::array<int64_t, 4>;

HeadsView view(const View& v) { return {reinterpret_cast<void*>(v[0]), v[1], v[2], v[3]}; }

// False, with nothing written, where a length is outside the cache.
bool call(int threads, int dtype, const std::array<int64_t, 6>& shape, const std::array<View, 6>& views,
          int64_t lengths, int64_t ancestors, double scale, bool causal) {
  const auto [B, H, G, S, T, D] = shape;
  TreeAttention a = {dtype,
                     B,
                     H,
                     G,
                     S,
                     T,
                     D,
                     view(views[0]),
                     view(views[1]),
                     view(views[2]),
                     view(views[3]),
                     view(views[4]),
                     view(views[5]),
                     reinterpret_cast<const int64_t*>(lengths),
                     reinterpret_cast<const int64_t*>(ancestors),
                     static_cast<float>(scale),
                     causal,
                     0,
                     B * S};
  for (int64_t b = 0; b < B; ++b) {
    if (a.lengths[b] < 0 || a.lengths[b] > T) return false;
  }
  if (B * S == 0) return true;
  int64_t items = 0;
  for (int64_t b = 0; b < B; ++b) items += attention::row_blocks(a) * G * attention::splits(a.lengths[b]);
  if (threads > items) threads = static_cast<int>(items);

  thread_local Workspace room;
  void* workspace = room.of(tree_attention_workspace(a, threads));
  tree_attention_prepare(a, workspace);
  const Isa isa = current_isa();
  auto body = [&](int thread, int count) { RGTG_DISPATCH(isa, tree_attention(a, workspace, thread, count)); };
  parallel_for(threads, body);
  return true;
}

}  // namespace

void bind_tree_attention(pybind11::module_& m) {
  m.def("tree_attention", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
