// Python's resample(threads, logprobs, rewards, beta, temperature, seed, position, choice, chosen).
#include "arguments.hpp"
#include "bindings.hpp"
#include "resample.hpp"

namespace rgtg {
namespace {

// Candidates that are worth a thread of their own.
constexpr int64_t kWorthAThread = 2048;

void call(int threads, const Array& logprobs, const Array& rewards, const Array& beta, const Array& temperature,
          const Array& seed, const Array& position, const Array& choice, const Array& chosen) {
  expect_rank(logprobs, "logprobs", 2);
  expect_float(logprobs, "logprobs", true);
  const int64_t B = size(logprobs, 0), K = size(logprobs, 1);
  if (K < 1) refuse("logprobs have shape " + listed(shape(logprobs)) + ": use K >= 1");
  expect(rewards, "rewards", dtype(logprobs), {B, K});
  expect_dense(logprobs, "logprobs");
  expect_dense(rewards, "rewards");
  expect_contiguous(beta, "beta", kFloat32, {B});
  expect_contiguous(temperature, "temperature", kFloat32, {B});
  expect_contiguous(seed, "seed", kInt64, {B});
  expect_contiguous(position, "position", kInt64, {B});
  expect_contiguous(choice, "choice", kInt64, {B});
  expect_contiguous(chosen, "chosen", kFloat32, {B});
  const Resample a = {dtype(logprobs),
                      B,
                      K,
                      memory<void>(logprobs),
                      memory<void>(rewards),
                      stride(logprobs, 0),
                      stride(rewards, 0),
                      memory<float>(beta),
                      memory<float>(temperature),
                      memory<int64_t>(seed),
                      memory<int64_t>(position),
                      memory<int64_t>(choice),
                      memory<float>(chosen)};
  for (int64_t b = 0; b < B; ++b) {
    if (!(a.temperature[b] >= 0 && a.temperature[b] < __builtin_inff())) {
      refuse("a temperature is not a finite number >= 0");
    }
  }
  if (B == 0) return;
  const int64_t useful = (B * K + kWorthAThread - 1) / kWorthAThread, most = useful < B ? useful : B;
  if (threads > most) threads = static_cast<int>(most);
  const Isa isa = current_isa();
  auto body = [&](int thread, int count) {
    const Range mine = share(B, thread, count);
    for (int64_t b = mine.begin; b < mine.end; ++b) RGTG_DISPATCH(isa, resample(a, b));
  };
  parallel_for(threads, body);
}

}  // namespace

void bind_resample(pybind11::module_& m) {
  m.def("resample", &call, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
