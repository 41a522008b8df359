// Python's commit(threads, item bytes, (L, B, G, S, T, D), views, lengths, choice).
#include <array>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "commit.hpp"

namespace rgtg {
namespace {

// Address, strides of layers, rows, heads and tokens in elements.
using View = std::array<int64_t, 5>;

LayersView view(const View& v, int64_t item) {
  return {reinterpret_cast<char*>(v[0]), v[1] * item, v[2] * item, v[3] * item, v[4] * item};
}

bool call(int threads, int64_t item, const std::array<int64_t, 6>& shape, const std::array<View, 4>& views,
          const std::array<int64_t, 2>& lengths, int64_t choice) {
  const auto [L, B, G, S, T, D] = shape;
  return commit({L,
                 B,
                 G,
                 S,
                 T,
                 D * item,
                 view(views[0], item),
                 view(views[1], item),
                 view(views[2], item),
                 view(views[3], item),
                 reinterpret_cast<int64_t*>(lengths[0]),
                 lengths[1],
                 reinterpret_cast<const int64_t*>(choice)},
                threads);
}

}  // namespace

void bind_commit(pybind11::module_& m) {
  m.def("commit", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
