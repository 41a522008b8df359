#include <cstdint>

#include "bindings.hpp"
#include "linear.hpp"

namespace rgtg {
namespace {

constexpr int64_t kColumns = 4;

struct Job {
  Isa isa;
  Linear p;
  int64_t outer;
};

// y[rows, outer] (fp32) = x w^T + bias on `threads` threads; the addresses are integers, bias may be 0.
void run_linear(uintptr_t x, uintptr_t w, uintptr_t bias, uintptr_t y, int64_t rows, int64_t inner, int64_t outer,
                int dtype, int threads) {
  Job job{current_isa(),
          {reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(w), reinterpret_cast<const float*>(bias),
           reinterpret_cast<float*>(y), rows, inner, inner, outer, dtype, false},
          outer};
  pybind11::gil_scoped_release release;
  auto body = [&](int thread, int n) {
    const Range mine = share((job.outer + kColumns - 1) / kColumns, thread, n);
    const int64_t end = mine.end * kColumns < job.outer ? mine.end * kColumns : job.outer;
    RGTG_DISPATCH(job.isa, linear(job.p, mine.begin * kColumns, end, Upcoming{nullptr, 0}));
  };
  parallel_for(threads, body);
}

}  // namespace

void bind_linear(pybind11::module_& m) { m.def("linear", &run_linear); }

}  // namespace rgtg
