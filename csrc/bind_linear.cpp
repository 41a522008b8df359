#include <cstdint>
#include <vector>

#include "bindings.hpp"
#include "linear.hpp"

namespace rgtg {
namespace {

constexpr int64_t kColumns = 4;

// y[rows, outer] = x w^T + bias on `threads` threads, x and y fp32, w of `dtype`; the addresses are integers, bias may
// be 0. For bf16 weights x is rounded here, not by a parallel operation of the caller's: the threads of that would
// still be spinning on the cores that are needed now.
void run_linear(uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t y, int64_t rows, int64_t inner, int64_t outer,
                int dtype, int threads) {
  const float* const input = reinterpret_cast<const float*>(x);
  thread_local std::vector<uint16_t> room;
  if (dtype == kBFloat16) room.resize(rows * inner);
  uint16_t* const rounded = room.data();
  const Linear p{dtype == kBFloat16 ? static_cast<const void*>(rounded) : input,
                 reinterpret_cast<const void*>(w),
                 reinterpret_cast<const float*>(bias),
                 reinterpret_cast<float*>(y),
                 rows,
                 inner,
                 inner,
                 outer,
                 dtype,
                 false};
  const Isa isa = current_isa();
  pybind11::gil_scoped_release release;
  BarrierState state{};
  auto body = [&](int thread, int n) {
    if (dtype == kBFloat16) {
      const Range part = share(rows, thread, n);
      RGTG_DISPATCH(isa, round_to_bf16(input + part.begin * inner, rounded + part.begin * inner,
                                       (part.end - part.begin) * inner));
      barrier(&state, n);
    }
    const Range mine = share((outer + kColumns - 1) / kColumns, thread, n);
    const int64_t end = mine.end * kColumns < outer ? mine.end * kColumns : outer;
    RGTG_DISPATCH(isa, linear(p, mine.begin * kColumns, end, Upcoming{nullptr, 0}));
  };
  parallel_for(threads, body);
}

}  // namespace

void bind_linear(pybind11::module_& m) { m.def("linear", &run_linear); }

}  // namespace rgtg
