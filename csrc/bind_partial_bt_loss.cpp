// Python's partial_bt_loss(threads, is double, rewards, offsets, mode, by pair, normalizer, outputs).
#include <array>
#include <optional>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "partial_bt_loss.hpp"

namespace rgtg {
namespace {

// Address and number of elements.
using Array = std::array<int64_t, 2>;

bool call(int threads, bool is_double, const Array& rewards, const Array& offsets, int mode, bool by_pair,
          std::optional<double> normalizer, const std::array<int64_t, 2>& outputs) {
  const int64_t N = offsets[1] / 2;
  std::vector<double> sums(N);
  return partial_bt_loss({is_double,
                          rewards[1],
                          N,
                          reinterpret_cast<const void*>(rewards[0]),
                          reinterpret_cast<const int64_t*>(offsets[0]),
                          static_cast<Prefixes>(mode),
                          by_pair,
                          normalizer ? &*normalizer : nullptr,
                          sums.data(),
                          reinterpret_cast<void*>(outputs[0]),
                          reinterpret_cast<void*>(outputs[1])},
                         threads);
}

}  // namespace

void bind_partial_bt_loss(pybind11::module_& m) {
  m.def("partial_bt_loss", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
