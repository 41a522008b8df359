// Python's linear(threads, x, w, bias, scale, y).
#include <cstdint>
#include <optional>
#include <vector>

#include "arguments.hpp"
#include "bindings.hpp"
#include "linear.hpp"
#include "workspace.hpp"

namespace rgtg {
namespace {

constexpr int64_t kColumns = 4;

// y[rows, outer] = x w^T * scale + bias on `threads` threads, x, bias and y fp32, w of any dtype that the kernel takes,
// scale for int8 alone. For bf16 and int8 weights x is rounded here, not by a parallel operation of the caller, whose
// threads would still be spinning on the cores that are needed now.
void run_linear(int threads, const Array& x, const Array& w, const std::optional<Array>& bias,
                const std::optional<Array>& scale, const Array& y) {
  expect_rank(x, "x", 2);
  expect_rank(w, "the weight", 2);
  const int64_t rows = size(x, 0), inner = size(x, 1), outer = size(w, 0);
  if (inner < 1) refuse("x has shape " + listed(shape(x)) + ": use at least one column");
  if (dtype(w) != kInt8) expect_float(w, "the weight", false);
  if (scale.has_value() != (dtype(w) == kInt8)) refuse("int8 weights, and they alone, have a scale");
  expect_contiguous(x, "x", kFloat32, {rows, inner});
  expect_contiguous(w, "the weight", dtype(w), {outer, inner});
  expect_contiguous(y, "y", kFloat32, {rows, outer});
  if (bias) expect_contiguous(*bias, "the bias", kFloat32, {outer});
  if (scale) expect_contiguous(*scale, "the scale", kFloat32, {outer});
  const bool rounds = dtype(w) != kFloat32;
  const float* const input = memory<float>(x);
  thread_local std::vector<uint16_t> buffer;
  if (rounds) buffer.resize(rows * inner);
  uint16_t* const rounded = buffer.data();
  const Isa isa = current_isa();
  thread_local Workspace workspace;
  char* const packed = rounds ? static_cast<char*>(workspace.of(packed_bytes(rows, inner))) : nullptr;
  const Linear p{rounds ? static_cast<const void*>(rounded) : input,
                 memory<void>(w),
                 bias ? memory<float>(*bias) : nullptr,
                 memory<float>(y),
                 rows,
                 inner,
                 inner,
                 outer,
                 dtype(w),
                 false,
                 packed,
                 scale ? memory<float>(*scale) : nullptr};
  BarrierState state{};
  auto body = [&](int thread, int n) {
    if (rounds) {
      const Range part = share(rows, thread, n);
      RGTG_DISPATCH(isa, round_to_bf16(input + part.begin * inner, rounded + part.begin * inner,
                                       (part.end - part.begin) * inner));
      RGTG_DISPATCH(isa, pack_rows(rounded, inner, inner, part, {0, inner}, packed));
      barrier(&state, n);
    }
    const Range mine = share((outer + kColumns - 1) / kColumns, thread, n);
    const int64_t end = mine.end * kColumns < outer ? mine.end * kColumns : outer;
    RGTG_DISPATCH(isa, linear(p, mine.begin * kColumns, end, Prefetch{nullptr, 0}));
  };
  parallel_for(threads, body);
}

}  // namespace

void bind_linear(pybind11::module_& m) {
  m.def("linear", &run_linear, pybind11::call_guard<pybind11::gil_scoped_release>());
}

}  // namespace rgtg
