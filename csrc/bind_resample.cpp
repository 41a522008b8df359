// Python's resample(threads, dtype, (B, K), logprobs, rewards, rows, outputs).
#include <array>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "resample.hpp"

namespace rgtg {
namespace {

// Candidates that are worth a thread of their own.
constexpr int64_t kWorthAThread = 2048;

// Address and stride of rows.
using Rows = std::array<int64_t, 2>;

// False, with nothing written, where a temperature is not a finite number >= 0.
bool call(int threads, int dtype, const std::array<int64_t, 2>& shape, const Rows& logprobs, const Rows& rewards,
          const std::array<int64_t, 4>& rows, const std::array<int64_t, 2>& outputs) {
  const auto [B, K] = shape;
  const Resample a = {dtype,
                      B,
                      K,
                      reinterpret_cast<const void*>(logprobs[0]),
                      reinterpret_cast<const void*>(rewards[0]),
                      logprobs[1],
                      rewards[1],
                      reinterpret_cast<const float*>(rows[0]),
                      reinterpret_cast<const float*>(rows[1]),
                      reinterpret_cast<const int64_t*>(rows[2]),
                      reinterpret_cast<const int64_t*>(rows[3]),
                      reinterpret_cast<int64_t*>(outputs[0]),
                      reinterpret_cast<float*>(outputs[1])};
  for (int64_t b = 0; b < B; ++b) {
    if (!(a.temperature[b] >= 0 && a.temperature[b] < __builtin_inff())) return false;
  }
  if (B == 0) return true;
  const int64_t useful = (B * K + kWorthAThread - 1) / kWorthAThread, most = useful < B ? useful : B;
  if (threads > most) threads = static_cast<int>(most);
  const Isa isa = current_isa();
  auto body = [&](int thread, int count) {
    const Range mine = share(B, thread, count);
    for (int64_t b = mine.begin; b < mine.end; ++b) RGTG_DISPATCH(isa, resample(a, b));
  };
  parallel_for(threads, body);
  return true;
}

}  // namespace

void bind_resample(pybind11::module_& m) {
  m.def("resample", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
